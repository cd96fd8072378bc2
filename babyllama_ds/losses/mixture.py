"""The teachers' mixture p: logits on a chunk of positions enter, p and its logarithm leave.

    `mean_of: logits`         p = softmax( Σ s_k t_k / T )
    `mean_of: probabilities`  p = Σ s_k softmax( t_k / T )            shares s_k of sum 1

Everything is written into work spaces, whose dtype it has (fp32, or fp64 for fp64 models).

Shapes: C positions of the chunk, V vocabulary, 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MeanOf = Literal["logits", "probabilities"]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How p is made of the teachers' logits."""

    shares: tuple[float, ...]
    """Each teacher's part of the mean; their sum is 1."""
    temperature: float
    """T, dividing the logits of teachers and student in the KL."""
    mean_of: MeanOf


def mix(teachers_CV: Sequence[Tensor], mixture: Mixture, *, out: Tensor, log_out: Tensor) -> Tensor:
    """p times a factor of each row, in `out`; its logarithm in `log_out`; the factors, `[C, 1]`.

    Where p underflows its logarithm may be that of the smallest number: right for sums weighed by
    p, and for no others.
    """
    by_kind = _mix_logits if mixture.mean_of == "logits" else _mix_probabilities
    return by_kind(teachers_CV, mixture, out, log_out)


def log_mix(
    teachers_CV: Sequence[Tensor], mixture: Mixture, *, out: Tensor, spare: Tensor
) -> Tensor:
    """log p in `out`, also where p itself would underflow; `spare` is overwritten."""
    if mixture.mean_of == "logits":
        sum_C1 = _mix_logits(teachers_CV, mixture, spare, out)
        return out.sub_(sum_C1.log_())
    for k, (teacher, share) in enumerate(zip(teachers_CV, mixture.shares, strict=True)):
        log_t = spare if k else out
        log_t.copy_(teacher).mul_(1 / mixture.temperature)
        log_t.sub_(log_t.logsumexp(-1, keepdim=True) - math.log(share))
        if k:
            _log_add(out, spare)
    return out


def _log_add(a: Tensor, b: Tensor) -> None:
    """log(exp a + exp b) in the place of a. Rounds alike at any place (`divergences._ratios`)."""
    torch.sub(b, a, out=b)
    # log(1 + exp d) = max(d, 0) + log(1 + exp −|d|)
    a.add_(b.clamp(min=0))
    a.add_(b.abs_().neg_().exp_().log1p_())


def _mix_logits(
    teachers_CV: Sequence[Tensor], mixture: Mixture, p: Tensor, log_p: Tensor
) -> Tensor:
    for k, (teacher, share) in enumerate(zip(teachers_CV, mixture.shares, strict=True)):
        if k == 0:
            log_p.copy_(teacher).mul_(share / mixture.temperature)
        else:  # through p, for adding another dtype would allocate its converted copy
            log_p.add_(p.copy_(teacher), alpha=share / mixture.temperature)
    log_p.sub_(log_p.amax(-1, keepdim=True))
    return torch.exp(log_p, out=p).sum(-1, keepdim=True)


def _mix_probabilities(
    teachers_CV: Sequence[Tensor], mixture: Mixture, p: Tensor, log_p: Tensor
) -> Tensor:
    p.zero_()
    for teacher, share in zip(teachers_CV, mixture.shares, strict=True):
        exp_t = log_p.copy_(teacher).mul_(1 / mixture.temperature)
        exp_t.sub_(exp_t.amax(-1, keepdim=True)).exp_()
        p.addcmul_(exp_t, share / exp_t.sum(-1, keepdim=True))
    # Where p is 0, 0 · log(tiny) is the 0 that 0 · log 0 stands for.
    torch.clamp(p, min=torch.finfo(p.dtype).tiny, out=log_p).log_()
    return torch.ones_like(p[:, :1])
