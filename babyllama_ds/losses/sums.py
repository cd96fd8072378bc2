"""The pass over the chunks: what is summed over all positions, and its gradient made on the way.

    ∂CE/∂z = softmax(z) − onehot(y)          ∂(T² KL)/∂z = T · (softmax(z/T) − p)
    ∂(log Z)²/∂z = 2 log Z · softmax(z)

of the terms of the loss (`distillation.py`), chunk by chunk over positions, so that no [N, V]
tensor of any model exists. Matrix products run in the model's dtype, everything between them
(`rows.py`) in fp32, or fp64 for fp64 models. The gradient of the head is summed over chunks in
fp32. Where raw logits of equal votes are averaged, no teacher's own are formed: their sum is one
product of the teachers' states side by side with their heads side by side (`voters.py`).

Hidden states, a head and the terms enter; CE, KL and log Z of each position, and the gradients of
their weighted sum, leave, for the graph.

Shapes: N positions (batch and time, flattened), C positions of a chunk, R of a tile (R ≤ C),
D hidden size (each model its own), V vocabulary, P rows of a head (P ≥ V, padded), 1 a dimension
kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from babyllama_ds.losses.chunks import chunks
from babyllama_ds.losses.divergences import FORWARD_KL, Divergence
from babyllama_ds.losses.factors import Factors
from babyllama_ds.losses.heads import Head, logits_into
from babyllama_ds.losses.mixture import Mixture
from babyllama_ds.losses.rows import num_work, row_losses
from babyllama_ds.losses.topk import TOP_K_WORK, TopKTargets, top_k_row_losses
from babyllama_ds.losses.voters import TeacherStates, voters_of

IGNORED_LABEL = -100
"""The label of a position without one."""


@dataclass(frozen=True, kw_only=True)
class Terms:
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


class Wanted(NamedTuple):
    """The gradients that autograd will ask for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


@dataclass
class Sums:
    """CE, KL and log Z of each position; gradients of the weighted sum, None if not wanted."""

    ce_N1: Tensor
    kl_N1: Tensor
    log_z_N1: Tensor | None
    """0 where there is no label; none without a z-loss."""
    grad_hidden_ND: Tensor | None
    grad_weight_PD: Tensor | None
    grad_bias_P: Tensor | None


def sum_over_chunks(hidden_ND: Tensor, head: Head, terms: Terms, wanted: Wanted) -> Sums:
    """Logits, losses and gradients of one chunk of positions after another."""
    _check_shapes(hidden_ND, head, terms)
    sums = _zeros(hidden_ND, head, wanted, with_z=terms.z_weight != 0)
    dtype = sums.ce_N1.dtype
    labelled_N1 = (terms.labels_N != IGNORED_LABEL)[:, None]
    label_N1 = torch.where(labelled_N1, terms.labels_N[:, None], 0)
    valid_N1 = terms.valid_N[:, None]
    # Zeroed, what lies at an unused position cannot spoil a product, and nobody has to wait for
    # a count of the used ones.
    unused_N1 = ~(labelled_N1 | valid_N1)
    voters, mixture = voters_of(states_of(terms.teachers), terms.mixture, terms.vocab_size)

    for rows, buffers in chunks(
        [hidden_ND, *(voter.hidden_ND for voter in voters)],
        vocab_size=terms.vocab_size,
        num_work=_num_work(hidden_ND, terms, len(voters)),
        dtype=dtype,
        chunk_tokens=terms.chunk_tokens,
    ):
        hidden_CD = hidden_ND[rows].masked_fill(unused_N1[rows], 0)
        student_CV, *voters_CV = buffers.logits_CV
        logits_into(student_CV, hidden_CD, head)
        for voter_CV, voter in zip(voters_CV, voters, strict=True):
            voter.logits_into(voter_CV, rows, unused_N1[rows])
        factors = None
        if any(wanted):
            factors = Factors(
                ce_C1=labelled_N1[rows].to(dtype) * terms.ce_weight,
                kl_C1=valid_N1[rows].to(dtype) * (terms.kl_weight / mixture.temperature),
                z_C1=labelled_N1[rows].to(dtype) * terms.z_weight if terms.z_weight else None,
            )
        log_z_C1 = None if sums.log_z_N1 is None else sums.log_z_N1[rows]
        if isinstance(terms.teachers, TopKTargets):
            ce_C1, kl_C1 = top_k_row_losses(
                student_CV,
                terms.teachers.chunk(rows, valid_N1[rows]),
                label_N1[rows],
                mixture.temperature,
                factors,
                buffers.work_RV,
                log_z_C1=log_z_C1,
            )
        else:
            ce_C1, kl_C1 = row_losses(
                student_CV,
                voters_CV,
                label_N1[rows],
                mixture,
                factors,
                buffers.work_RV,
                divergence=terms.divergence,
                log_z_C1=log_z_C1,
            )
        sums.ce_N1[rows] = ce_C1.masked_fill(~labelled_N1[rows], 0)
        sums.kl_N1[rows] = kl_C1.masked_fill(~valid_N1[rows], 0)
        if log_z_C1 is not None:
            log_z_C1.masked_fill_(~labelled_N1[rows], 0)
        _add_gradients(sums, rows, student_CV, hidden_CD, head)
    return _in_dtypes_of(sums, head)


def states_of(teachers: Sequence[TeacherStates] | TopKTargets) -> Sequence[TeacherStates]:
    """The teachers' own; none where only their most likely tokens are given."""
    return () if isinstance(teachers, TopKTargets) else teachers


def _num_work(hidden_ND: Tensor, terms: Terms, num_voters: int) -> int:
    if isinstance(terms.teachers, TopKTargets):
        return TOP_K_WORK
    return num_work(hidden_ND.dtype, hidden_ND.device, num_voters, terms.divergence)


def _check_shapes(hidden_ND: Tensor, head: Head, terms: Terms) -> None:
    num_positions = hidden_ND.shape[0]
    assert hidden_ND.ndim == 2, "positions are to be flattened"
    assert head.states_are_logits or hidden_ND.dtype == head.weight_PD.dtype, (
        "hidden states and head differ in dtype"
    )
    assert terms.labels_N.shape == (num_positions,), "not one label for each position"
    assert terms.valid_N.shape == (num_positions,), "not one validity for each position"
    assert all(t.hidden_ND.shape[0] == num_positions for t in states_of(terms.teachers)), (
        "teachers saw other positions"
    )
    if isinstance(terms.teachers, TopKTargets):
        assert terms.teachers.log_probs_NK.shape == terms.teachers.token_ids_NK.shape
        assert len(terms.teachers.token_ids_NK) == num_positions, "targets of other positions"
        assert terms.divergence == FORWARD_KL, "the most likely tokens give no other divergence"
    assert terms.chunk_tokens is None or terms.chunk_tokens > 0, "an empty chunk"


def _zeros(hidden_ND: Tensor, head: Head, wanted: Wanted, *, with_z: bool) -> Sums:
    """The sums before the first chunk, in fp32 or better, but for the gradient that is no sum."""
    num_positions = hidden_ND.shape[0]
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    return Sums(
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
    sums: Sums, rows: slice, grad_logits_CV: Tensor, hidden_CD: Tensor, head: Head
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


def _in_dtypes_of(sums: Sums, head: Head) -> Sums:
    """The head's gradients, summed, in the dtype that autograd expects of them."""
    if sums.grad_weight_PD is not None:
        sums.grad_weight_PD = sums.grad_weight_PD.to(head.weight_PD.dtype)
    if sums.grad_bias_P is not None and head.bias_P is not None:
        sums.grad_bias_P = sums.grad_bias_P.to(head.bias_P.dtype)
    return sums
