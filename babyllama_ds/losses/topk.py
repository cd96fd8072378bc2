"""The ensemble's k most likely tokens, all others as one bucket: targets that outlive the teachers.

    KL = Σ_K p_j (log p_j − log q_j) + p_tail (log p_tail − log q_tail)        q = softmax(z/T)
    p_tail = 1 − Σ_K p_j          q_tail = Σ_{j ∉ K} q_j

    ∂KL/∂z_j = (q_j − p_j) / T                         j among the k
             = (q_j − p_tail q_j / q_tail) / T         j in the tail

This is the exact KL of distributions over k + 1 outcomes, and so never above the KL of the full
ones (data processing): what is lost is how the teachers split the tail. With k = V it is exact.

Teachers' states enter and targets leave (`top_k_targets`); targets and the student's logits of a
chunk enter, its losses leave, and their gradient takes the place of the logits
(`top_k_row_losses`). The tail is summed over its own tokens, relative to its own largest logit:
1 − Σ_K q would lose all digits of a small tail, and a tail far below the k would underflow.

Shapes: N positions, C positions of a chunk, V vocabulary, K tokens kept, 1 kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from babyllama_ds.losses.chunks import chunks
from babyllama_ds.losses.factors import Factors
from babyllama_ds.losses.mixture import MeanOf, Mixture, mix
from babyllama_ds.losses.rows import joined, tiles
from babyllama_ds.losses.voters import TeacherStates, mixture_of, voters_of

TOP_K_WORK = 2
"""How many work spaces `top_k_row_losses` and the making of targets ask for."""


@dataclass(frozen=True)
class TopKTargets:
    """p of the module's formula, k numbers a position; both may be stored narrower than fp32."""

    token_ids_NK: Tensor
    """Distinct token ids of each position, any integer dtype, in any order."""
    log_probs_NK: Tensor
    """Their log-probabilities at the temperature of the loss, any float dtype. What is missing to
    a sum of 1 is the tail's; where rounding makes the sum exceed 1, it is divided by it."""

    def chunk(self, rows: slice, valid_C1: Tensor) -> TopKTargets:
        """The targets of some positions, ids int64; what lies at invalid positions is replaced."""
        ids_CK = self.token_ids_NK[rows].to(torch.int64)
        any_k_ids = torch.arange(ids_CK.shape[1], device=ids_CK.device)
        return TopKTargets(
            torch.where(valid_C1, ids_CK, any_k_ids),
            self.log_probs_NK[rows].masked_fill(~valid_C1, 0),
        )


def top_k_targets(
    teachers: Sequence[TeacherStates],
    *,
    k: int,
    temperature: float,
    mean_of: MeanOf,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> TopKTargets:
    """The k most likely tokens of the ensemble at every position, the most likely first; no graph.

    Ids are int32, log-probabilities fp32 (fp64 for fp64 teachers). No logits are held beyond a
    chunk of `chunk_tokens` positions; None chooses.
    """
    assert 0 < k <= vocab_size, "more tokens than the vocabulary has"
    mixture = mixture_of(teachers, temperature=temperature, mean_of=mean_of)
    voters, mixture = voters_of(teachers, mixture, vocab_size)
    hidden_ND = [voter.hidden_ND for voter in voters]
    num_positions, device = hidden_ND[0].shape[0], hidden_ND[0].device
    dtype = torch.promote_types(hidden_ND[0].dtype, torch.float32)
    ids_NK = torch.empty(num_positions, k, dtype=torch.int32, device=device)
    log_probs_NK = torch.empty(num_positions, k, dtype=dtype, device=device)
    with torch.no_grad():
        for rows, buffers in chunks(
            hidden_ND,
            vocab_size=vocab_size,
            num_work=TOP_K_WORK,
            dtype=dtype,
            chunk_tokens=chunk_tokens,
        ):
            voters_CV = [
                voter.logits_into(buffer, rows)
                for buffer, voter in zip(buffers.logits_CV, voters, strict=True)
            ]
            for part, work in tiles(len(voters_CV[0]), buffers.work_RV):
                log_p, ids = _top_k([each[part] for each in voters_CV], mixture, k, work)
                log_probs_NK[rows][part] = log_p
                ids_NK[rows][part] = ids.to(torch.int32)
    return TopKTargets(ids_NK, log_probs_NK)


def _top_k(
    voters_CV: Sequence[Tensor], mixture: Mixture, k: int, work: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    p_CV, log_p_CV = work
    sum_C1 = mix(voters_CV, mixture, out=p_CV, log_out=log_p_CV)
    log_p_CK, ids_CK = log_p_CV.topk(k, dim=-1)
    return log_p_CK - sum_C1.log(), ids_CK


def top_k_row_losses(
    student_CV: Tensor,
    targets: TopKTargets,
    label_C1: Tensor,
    temperature: float,
    factors: Factors | None,
    work: Sequence[Tensor],
    *,
    log_z_C1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(CE, KL) of each position, `[C, 1]` both; with `factors` the gradient overwrites the logits.

    `targets` are these positions', ids int64; `work` holds two spaces, overwritten. Otherwise as
    `rows.row_losses`.
    """
    parts = [
        _tile_losses(
            student_CV[rows],
            targets.token_ids_NK[rows],
            targets.log_probs_NK[rows],
            label_C1[rows],
            temperature,
            factors and factors.of(rows),
            spaces,
            None if log_z_C1 is None else log_z_C1[rows],
        )
        for rows, spaces in tiles(len(student_CV), work)
    ]
    return joined(parts)


def _tile_losses(
    student_CV: Tensor,
    ids_CK: Tensor,
    log_probs_CK: Tensor,
    label_C1: Tensor,
    temperature: float,
    factors: Factors | None,
    work: Sequence[Tensor],
    log_z_C1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x, y = work
    x.copy_(student_CV)
    label_logit_C1 = x.gather(-1, label_C1)
    top_CK = x.gather(-1, ids_CK)
    # What follows on [C, V] is of the tail alone: relative to m, the k count nothing there.
    x.scatter_(-1, ids_CK, -torch.inf)
    m_C1 = x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)  # k = V: an empty tail
    x.sub_(m_C1)
    warm = temperature != 1
    if warm:
        torch.mul(x, 1 / temperature, out=y).exp_()
    x.exp_()
    hard = _Split.of(top_CK, m_C1, x)
    soft = _Split.of(top_CK / temperature, m_C1 / temperature, y) if warm else hard

    log_p_CK, p_tail_C1 = _whole(log_probs_CK.to(x.dtype), vocab_size=x.shape[1])
    p_CK = log_p_CK.exp()
    kl_C1 = (p_CK * (log_p_CK - soft.log_top_CK)).sum(-1, keepdim=True)
    kl_C1 += torch.where(p_tail_C1 > 0, p_tail_C1 * (p_tail_C1.log() - soft.log_tail_C1), 0)

    if log_z_C1 is not None:
        log_z_C1.copy_(hard.log_sum_C1)
    if factors:
        hard_factor_C1 = factors.hard_C1(hard.log_sum_C1)
        top_grad_CK = hard_factor_C1 * hard.log_top_CK.exp()
        top_grad_CK += factors.kl_C1 * (soft.log_top_CK.exp() - p_CK)
        # exp(z_j − m) times these are q_j and p_tail q_j / q_tail, were q_tail ever so small.
        pull_C1 = torch.where(p_tail_C1 > 0, p_tail_C1 / soft.sum_C1, 0)
        soft_C1 = factors.kl_C1 * (soft.unit_C1 - pull_C1)
        hard_C1 = hard_factor_C1 * hard.unit_C1
        if warm:
            x.mul_(hard_C1).addcmul_(y, soft_C1)
        else:
            x.mul_(hard_C1 + soft_C1)
        x.scatter_(-1, ids_CK, top_grad_CK)
        x.scatter_add_(-1, label_C1, -factors.ce_C1)
        student_CV.copy_(x)
    return hard.log_sum_C1 - label_logit_C1, kl_C1


@dataclass(frozen=True)
class _Split:
    """A softmax in two parts: the k, and the tail relative to its largest logit m."""

    log_top_CK: Tensor
    """log q_j of the k."""
    log_tail_C1: Tensor
    """log q_tail; −inf where there is none."""
    log_sum_C1: Tensor
    """log Σ exp over all tokens."""
    sum_C1: Tensor
    """Σ exp(z − m) over the tail, ≥ 1; 0 where there is none."""
    unit_C1: Tensor
    """q_j / exp(z_j − m), of the tail."""

    @classmethod
    def of(cls, top_CK: Tensor, m_C1: Tensor, tail_exp_CV: Tensor) -> _Split:
        sum_C1 = tail_exp_CV.sum(-1, keepdim=True)
        log_tail_sum_C1 = m_C1 + sum_C1.log()
        log_sum_C1 = torch.logaddexp(top_CK.logsumexp(-1, keepdim=True), log_tail_sum_C1)
        return cls(
            log_top_CK=top_CK - log_sum_C1,
            log_tail_C1=log_tail_sum_C1 - log_sum_C1,
            log_sum_C1=log_sum_C1,
            sum_C1=sum_C1,
            unit_C1=torch.exp(m_C1 - log_sum_C1),
        )


def _whole(log_probs_CK: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the tail's probability, `[C, 1]`, that sum to 1 for certain."""
    sum_C1 = log_probs_CK.exp().sum(-1, keepdim=True)
    if log_probs_CK.shape[1] == vocab_size:
        return log_probs_CK - sum_C1.log(), torch.zeros_like(sum_C1)
    return log_probs_CK - sum_C1.clamp(min=1).log(), (1 - sum_C1).clamp_(min=0)
