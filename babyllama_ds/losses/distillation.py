"""Cross-entropy and ensemble distillation from hidden states, without ever holding all logits.

    L = α · Σ CE(z, y) / n_ce + (1 − α) · T² · Σ KL( p ‖ softmax(z/T) ) / n_kl
        + w · Σ (log Σ exp z)² / n_ce

    `mean_of: logits`         p = softmax( Σ w_k t_k / (T Σ w_k) )      (raw logits, as published)
    `mean_of: probabilities`  p = Σ w_k softmax(t_k / T) / Σ w_k

with student logits z, teacher logits t_k, labels y. CE is summed over labelled positions, the
forward KL (teachers to student) over valid positions, each window's last included. The caller
gives n_ce and n_kl (`weights.loss_counts`). Published as BabyLlama (arXiv 2308.02019) and
BabyLlama-2 (arXiv 2409.17312); their code takes the mean of raw logits and
`KLDivLoss("batchmean")` on [B, S, V]. The T² is Hinton et al.'s (arXiv 1503.02531, section 2).
Another divergence than the forward KL may be taken (`divergences.py`), with the same T² and n_kl.
The last term, over labelled positions too, is the z-loss of PaLM (arXiv 2204.02311, section 5); its
weight w is its own, 0 unless asked for, and α does not touch it.

The gradient is made on the way, chunk by chunk over positions, from

    ∂CE/∂z = softmax(z) − onehot(y)          ∂(T² KL)/∂z = T · (softmax(z/T) − p)
    ∂(log Z)²/∂z = 2 log Z · softmax(z)

so that no [N, V] tensor of any model exists, forward or backward; backward only scales what
forward made. Matrix products run in the model's dtype, everything between them (`rows.py`) in
fp32, or fp64 for fp64 models. The gradient of the head is summed over chunks in fp32. Where raw
logits of equal votes are averaged, no teacher's own are formed: their sum is one product of the
teachers' states side by side with their heads side by side (`chunks.Voter`).
Instead of p itself its k most likely tokens may be given, all others as one (`topk.py`).

Hidden states, heads, labels, masks and counts enter; a scalar with a graph and two sums for
logging leave, for the training step.

Shapes: N positions (batch and time, flattened), C positions of a chunk, D hidden size (each model
its own), V vocabulary, P rows of a head (P ≥ V, padded), 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from babyllama_ds.losses.chunks import TeacherStates, chunks, logits_into
from babyllama_ds.losses.divergences import FORWARD_KL, Divergence
from babyllama_ds.losses.factors import Factors
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.mixture import MeanOf, Mixture
from babyllama_ds.losses.rows import num_work, row_losses
from babyllama_ds.losses.topk import (
    TOP_K_WORK,
    TopKTargets,
    mixture_of,
    top_k_row_losses,
    voters_of,
)

__all__ = [
    "IGNORED_LABEL",
    "CrossEntropyLoss",
    "DistillationLoss",
    "Divergence",
    "TeacherStates",
    "TopKTargets",
    "cross_entropy_loss",
    "cross_entropy_sum",
    "distillation_loss",
]

IGNORED_LABEL = -100
"""The label of a position without one."""


@dataclass(frozen=True)
class DistillationLoss:
    """`loss` has a graph; the sums, over this call's positions, are detached and unweighted.

    `kl_sum` is of the divergence that was asked for, without the factor T². All are fp32 (fp64 for
    fp64 models).
    """

    loss: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    z_sum: Tensor | None = None
    """Σ (log Z)² over labelled positions; none without a z-loss."""


@dataclass(frozen=True)
class CrossEntropyLoss:
    """`loss` has a graph; the sums, over this call's positions, are detached."""

    loss: Tensor
    ce_sum: Tensor
    z_sum: Tensor | None = None
    """As that of `DistillationLoss`."""


def distillation_loss(
    student_hidden_ND: Tensor,
    student_head: Head,
    labels_N: Tensor,
    valid_N: Tensor,
    teachers: Sequence[TeacherStates] | TopKTargets,
    *,
    alpha: float,
    temperature: float,
    mean_of: MeanOf,
    ce_count: float,
    kl_count: float,
    vocab_size: int,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    divergence: Divergence = FORWARD_KL,
    z_loss: float = 0.0,
) -> DistillationLoss:
    """The loss of the module's formula times `scale`, with its gradient already made.

    `labels_N` int64 holds the next token of each position, or `IGNORED_LABEL`; `valid_N` bool is
    false for padding. What lies at a position that is neither labelled nor valid has no effect,
    even NaN. `ce_count` and `kl_count` (≥ 1) are those of the global optimizer batch; `scale`
    undoes what the engine divides by (ranks × accumulation steps). With `alpha` 1 the KL is still
    measured, with `alpha` 0 the CE. `chunk_tokens` bounds the positions whose logits exist at one
    time; None chooses. `teachers` are their states, or the k most likely tokens of their mixture
    at this temperature (`topk.py`), into which `mean_of` has gone; these have no divergence but the
    forward KL. `z_loss` is the weight of the z-loss. Nothing of them is kept for
    backward, so that their tensors may come from inference mode.
    """
    objective = _Objective(
        labels_N=labels_N,
        valid_N=valid_N,
        teachers=teachers,
        mixture=mixture_of(
            _states(teachers),
            temperature=temperature,
            mean_of=mean_of,
        ),
        ce_weight=alpha * scale / ce_count,
        kl_weight=(1 - alpha) * temperature**2 * scale / kl_count,
        z_weight=z_loss * scale / ce_count,
        divergence=divergence,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )
    return _loss(student_hidden_ND, student_head, objective)


def cross_entropy_loss(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    ce_count: float,
    vocab_size: int,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
) -> CrossEntropyLoss:
    """Σ CE / `ce_count` · `scale`: the loss of training without teachers, by the same machinery.

    `z_loss` is the weight of the z-loss.
    """
    weight = scale / ce_count
    objective = _without_teachers(labels_N, weight, vocab_size, chunk_tokens, z_loss * weight)
    result = _loss(hidden_ND, head, objective)
    return CrossEntropyLoss(result.loss, result.ce_sum, result.z_sum)


def cross_entropy_sum(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int | None = None,
    per_token: bool = False,
) -> Tensor:
    """Σ CE in nats, no graph; with `per_token` that of each position, `[N]`, 0 if unlabelled."""
    objective = _without_teachers(labels_N, 1.0, vocab_size, chunk_tokens)
    with torch.no_grad():
        ce_N1 = _over_chunks(hidden_ND, head, objective, _Wanted()).ce_N1
    return ce_N1.squeeze(1) if per_token else ce_N1.sum()


# -- the graph ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Objective:
    """What is summed over the positions, and with what weights it makes the loss."""

    labels_N: Tensor
    valid_N: Tensor
    teachers: Sequence[TeacherStates] | TopKTargets
    mixture: Mixture
    divergence: Divergence
    ce_weight: float
    kl_weight: float
    z_weight: float
    """0: there is no z-loss."""
    vocab_size: int
    chunk_tokens: int | None


def _without_teachers(
    labels_N: Tensor,
    ce_weight: float,
    vocab_size: int,
    chunk_tokens: int | None,
    z_weight: float = 0.0,
) -> _Objective:
    return _Objective(
        labels_N=labels_N,
        valid_N=torch.zeros_like(labels_N, dtype=torch.bool),
        teachers=(),
        mixture=Mixture(shares=(), temperature=1.0, mean_of="logits"),
        divergence=FORWARD_KL,
        ce_weight=ce_weight,
        kl_weight=0.0,
        z_weight=z_weight,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )


class _Wanted(NamedTuple):
    """The gradients that autograd will ask for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class _GradientMadeInForward(torch.autograd.Function):
    """(loss, Σ CE, Σ KL, Σ (log Z)²): forward makes the loss's gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_PD: Tensor,
        bias_P: Tensor | None,
        states_are_logits: bool,
        objective: _Objective,
        wanted: _Wanted,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        sums = _over_chunks(
            hidden_ND, Head(weight_PD, bias_P, states_are_logits), objective, wanted
        )
        ce_sum, kl_sum = sums.ce_N1.sum(), sums.kl_N1.sum()
        ctx.save_for_backward(sums.grad_hidden_ND, sums.grad_weight_PD, sums.grad_bias_P)
        loss = objective.ce_weight * ce_sum + objective.kl_weight * kl_sum
        if sums.log_z_N1 is None:
            ctx.mark_non_differentiable(ce_sum, kl_sum)
            return loss, ce_sum, kl_sum, None
        z_sum = sums.log_z_N1.square().sum()
        ctx.mark_non_differentiable(ce_sum, kl_sum, z_sum)
        return loss + objective.z_weight * z_sum, ce_sum, kl_sum, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return *grads, None, None, None


# One clean graph break. The public torch.compiler.disable would import all of dynamo right here.
@_disable_dynamo
def _loss(hidden_ND: Tensor, head: Head, objective: _Objective) -> DistillationLoss:
    differentiable = hidden_ND, head.weight_PD, head.bias_P
    wanted = _Wanted(
        *(torch.is_grad_enabled() and t is not None and t.requires_grad for t in differentiable)
    )
    results = _GradientMadeInForward.apply(  # type: ignore[no-untyped-call]
        *differentiable, head.states_are_logits, objective, wanted
    )
    return DistillationLoss(*results)


# -- the pass over the chunks ---------------------------------------------------------------------


@dataclass
class _Sums:
    """CE, KL and log Z of each position; gradients of the weighted sum, None if not wanted."""

    ce_N1: Tensor
    kl_N1: Tensor
    log_z_N1: Tensor | None
    """0 where there is no label; none without a z-loss."""
    grad_hidden_ND: Tensor | None
    grad_weight_PD: Tensor | None
    grad_bias_P: Tensor | None


def _over_chunks(hidden_ND: Tensor, head: Head, objective: _Objective, wanted: _Wanted) -> _Sums:
    """Logits, losses and gradients of one chunk of positions after another."""
    _check_shapes(hidden_ND, head, objective)
    sums = _zeros(hidden_ND, head, wanted, with_z=objective.z_weight != 0)
    dtype = sums.ce_N1.dtype
    labelled_N1 = (objective.labels_N != IGNORED_LABEL)[:, None]
    label_N1 = torch.where(labelled_N1, objective.labels_N[:, None], 0)
    valid_N1 = objective.valid_N[:, None]
    # Zeroed, what lies at an unused position cannot spoil a product, and nobody has to wait for
    # a count of the used ones.
    unused_N1 = ~(labelled_N1 | valid_N1)
    voters, mixture = voters_of(
        _states(objective.teachers), objective.mixture, objective.vocab_size
    )

    for rows, buffers in chunks(
        [hidden_ND, *(voter.hidden_ND for voter in voters)],
        vocab_size=objective.vocab_size,
        num_work=_num_work(hidden_ND, objective, len(voters)),
        dtype=dtype,
        chunk_tokens=objective.chunk_tokens,
    ):
        hidden_CD = hidden_ND[rows].masked_fill(unused_N1[rows], 0)
        student_CV, *voters_CV = buffers.logits_CV
        logits_into(student_CV, hidden_CD, head)
        for voter_CV, voter in zip(voters_CV, voters, strict=True):
            voter.logits_into(voter_CV, rows, unused_N1[rows])
        soft: Sequence[Tensor] | TopKTargets = voters_CV
        if isinstance(objective.teachers, TopKTargets):
            soft = objective.teachers.chunk(rows, valid_N1[rows])
        factors = Factors(
            ce_C1=labelled_N1[rows].to(dtype) * objective.ce_weight,
            kl_C1=valid_N1[rows].to(dtype) * (objective.kl_weight / mixture.temperature),
            z_C1=labelled_N1[rows].to(dtype) * objective.z_weight if objective.z_weight else None,
        )
        log_z_C1 = None if sums.log_z_N1 is None else sums.log_z_N1[rows]
        ce_C1, kl_C1 = _row_losses(
            student_CV,
            soft,
            label_N1[rows],
            mixture,
            factors if any(wanted) else None,
            buffers.work_RV,
            divergence=objective.divergence,
            log_z_C1=log_z_C1,
        )
        sums.ce_N1[rows] = ce_C1.masked_fill(~labelled_N1[rows], 0)
        sums.kl_N1[rows] = kl_C1.masked_fill(~valid_N1[rows], 0)
        if log_z_C1 is not None:
            log_z_C1.masked_fill_(~labelled_N1[rows], 0)
        _add_gradients(sums, rows, student_CV, hidden_CD, head)
    return _in_dtypes_of(sums, head)


def _states(teachers: Sequence[TeacherStates] | TopKTargets) -> Sequence[TeacherStates]:
    return () if isinstance(teachers, TopKTargets) else teachers


def _num_work(hidden_ND: Tensor, objective: _Objective, num_voters: int) -> int:
    if isinstance(objective.teachers, TopKTargets):
        return TOP_K_WORK
    return num_work(hidden_ND.dtype, hidden_ND.device, num_voters, objective.divergence)


def _row_losses(
    student_CV: Tensor,
    teachers: Sequence[Tensor] | TopKTargets,
    label_C1: Tensor,
    mixture: Mixture,
    factors: Factors | None,
    work: Sequence[Tensor],
    *,
    divergence: Divergence,
    log_z_C1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if isinstance(teachers, TopKTargets):
        return top_k_row_losses(
            student_CV,
            teachers,
            label_C1,
            mixture.temperature,
            factors,
            work,
            log_z_C1=log_z_C1,
        )
    return row_losses(
        student_CV,
        teachers,
        label_C1,
        mixture,
        factors,
        work,
        divergence=divergence,
        log_z_C1=log_z_C1,
    )


def _check_shapes(hidden_ND: Tensor, head: Head, objective: _Objective) -> None:
    num_positions = hidden_ND.shape[0]
    assert hidden_ND.ndim == 2, "positions are to be flattened"
    assert head.states_are_logits or hidden_ND.dtype == head.weight_PD.dtype, (
        "hidden states and head differ in dtype"
    )
    assert objective.labels_N.shape == (num_positions,), "not one label for each position"
    assert objective.valid_N.shape == (num_positions,), "not one validity for each position"
    assert all(t.hidden_ND.shape[0] == num_positions for t in _states(objective.teachers)), (
        "teachers saw other positions"
    )
    if isinstance(objective.teachers, TopKTargets):
        assert objective.teachers.log_probs_NK.shape == objective.teachers.token_ids_NK.shape
        assert len(objective.teachers.token_ids_NK) == num_positions, "targets of other positions"
        assert objective.divergence == FORWARD_KL, "the most likely tokens give no other divergence"
    assert objective.chunk_tokens is None or objective.chunk_tokens > 0, "an empty chunk"


def _zeros(hidden_ND: Tensor, head: Head, wanted: _Wanted, *, with_z: bool) -> _Sums:
    """The sums before the first chunk, in fp32 or better, but for the gradient that is no sum."""
    num_positions = hidden_ND.shape[0]
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    return _Sums(
        ce_N1=hidden_ND.new_zeros(num_positions, 1, dtype=dtype),
        kl_N1=hidden_ND.new_zeros(num_positions, 1, dtype=dtype),
        log_z_N1=hidden_ND.new_zeros(num_positions, 1, dtype=dtype) if with_z else None,
        grad_hidden_ND=hidden_ND.new_empty(hidden_ND.shape) if wanted.hidden else None,
        grad_weight_PD=torch.zeros_like(head.weight_PD, dtype=dtype) if wanted.weight else None,
        grad_bias_P=torch.zeros_like(head.bias_P, dtype=dtype)
        if head.bias_P is not None and wanted.bias
        else None,
    )


def _add_gradients(
    sums: _Sums, rows: slice, grad_logits_CV: Tensor, hidden_CD: Tensor, head: Head
) -> None:
    """A chunk's part of the gradients; padding rows of the head keep 0."""
    vocab_size = grad_logits_CV.shape[1]
    if sums.grad_hidden_ND is not None and head.states_are_logits:
        sums.grad_hidden_ND[rows, :vocab_size] = grad_logits_CV
        sums.grad_hidden_ND[rows, vocab_size:] = 0
    elif sums.grad_hidden_ND is not None:
        weight_VD, _ = head.rows(vocab_size)
        torch.mm(grad_logits_CV, weight_VD, out=sums.grad_hidden_ND[rows])
    if sums.grad_weight_PD is not None:
        grad_VD = sums.grad_weight_PD[:vocab_size]
        if grad_VD.dtype == hidden_CD.dtype:
            grad_VD.addmm_(grad_logits_CV.T, hidden_CD)
        else:
            grad_VD.add_(grad_logits_CV.T @ hidden_CD)
    if sums.grad_bias_P is not None:
        sums.grad_bias_P[:vocab_size].add_(grad_logits_CV.sum(0, dtype=sums.grad_bias_P.dtype))


def _in_dtypes_of(sums: _Sums, head: Head) -> _Sums:
    """The head's gradients, summed, in the dtype that autograd expects of them."""
    if sums.grad_weight_PD is not None:
        sums.grad_weight_PD = sums.grad_weight_PD.to(head.weight_PD.dtype)
    if sums.grad_bias_P is not None and head.bias_P is not None:
        sums.grad_bias_P = sums.grad_bias_P.to(head.bias_P.dtype)
    return sums
