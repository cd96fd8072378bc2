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

The gradient is made on the way, chunk by chunk over positions (`sums.py`), so that no [N, V] tensor
of any model exists, forward or backward; backward only scales what forward made. Instead of p
itself its k most likely tokens may be given, all others as one (`topk.py`).

Hidden states, heads, labels, masks and counts enter; a scalar with a graph and two sums for
logging leave, for the training step.

Shapes: N positions (batch and time, flattened), D hidden size (each model its own), V vocabulary,
P rows of a head (P ≥ V, padded), 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from babyllama_ds.losses.divergences import FORWARD_KL, Divergence
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.mixture import MeanOf, Mixture
from babyllama_ds.losses.sums import IGNORED_LABEL, Terms, Wanted, states_of, sum_over_chunks
from babyllama_ds.losses.topk import TopKTargets
from babyllama_ds.losses.voters import TeacherStates, mixture_of

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
    terms = Terms(
        labels_N=labels_N,
        valid_N=valid_N,
        teachers=teachers,
        mixture=mixture_of(
            states_of(teachers),
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
    return _loss(student_hidden_ND, student_head, terms)


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
    terms = _without_teachers(labels_N, weight, vocab_size, chunk_tokens, z_loss * weight)
    result = _loss(hidden_ND, head, terms)
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
    terms = _without_teachers(labels_N, 1.0, vocab_size, chunk_tokens)
    with torch.no_grad():
        ce_N1 = sum_over_chunks(hidden_ND, head, terms, Wanted()).ce_N1
    return ce_N1.squeeze(1) if per_token else ce_N1.sum()


def _without_teachers(
    labels_N: Tensor,
    ce_weight: float,
    vocab_size: int,
    chunk_tokens: int | None,
    z_weight: float = 0.0,
) -> Terms:
    return Terms(
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


# -- the graph ------------------------------------------------------------------------------------


class _GradientMadeInForward(torch.autograd.Function):
    """(loss, Σ CE, Σ KL, Σ (log Z)²): forward makes the loss's gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_PD: Tensor,
        bias_P: Tensor | None,
        states_are_logits: bool,
        terms: Terms,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        sums = sum_over_chunks(hidden_ND, Head(weight_PD, bias_P, states_are_logits), terms, wanted)
        ce_sum, kl_sum = sums.ce_N1.sum(), sums.kl_N1.sum()
        ctx.save_for_backward(sums.grad_hidden_ND, sums.grad_weight_PD, sums.grad_bias_P)
        loss = terms.ce_weight * ce_sum + terms.kl_weight * kl_sum
        if sums.log_z_N1 is None:
            ctx.mark_non_differentiable(ce_sum, kl_sum)
            return loss, ce_sum, kl_sum, None
        z_sum = sums.log_z_N1.square().sum()
        ctx.mark_non_differentiable(ce_sum, kl_sum, z_sum)
        return loss + terms.z_weight * z_sum, ce_sum, kl_sum, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return *grads, None, None, None


# One clean graph break. The public torch.compiler.disable would import all of dynamo right here.
@_disable_dynamo
def _loss(hidden_ND: Tensor, head: Head, terms: Terms) -> DistillationLoss:
    differentiable = hidden_ND, head.weight_PD, head.bias_P
    wanted = Wanted(
        *(torch.is_grad_enabled() and t is not None and t.requires_grad for t in differentiable)
    )
    results = _GradientMadeInForward.apply(  # type: ignore[no-untyped-call]
        *differentiable, head.states_are_logits, terms, wanted
    )
    return DistillationLoss(*results)
