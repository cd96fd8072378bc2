"""From logits to losses, row by row: the elementwise half of the loss.

    CE = log Σ exp(z) − z_y                              ∂CE/∂z = softmax(z) − onehot(y)
    KL = Σ p · (log p − z/T) + log Σ exp(z/T)            ∂KL/∂z = (softmax(z/T) − p) / T

    `mean_of: logits`         p = softmax( Σ s_k t_k / T )
    `mean_of: probabilities`  p = Σ s_k softmax( t_k / T )            shares s_k of sum 1

Logits of the student and its teachers on a chunk of positions enter, in the models' dtypes; CE
and KL of each position leave, and their gradient takes the place of the student's logits. Between
the two everything has the dtype of the work spaces (fp32, or fp64 for fp64 models) and every row
is taken less its maximum. Distributions stay unnormalised: each sum of exponentials goes into the
factor of a later pass, since passes over [C, V] are what this costs.

Shapes: C positions of the chunk, V vocabulary, 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MeanOf = Literal["logits", "probabilities"]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How p is made of the teachers' logits."""

    shares: tuple[float, ...]
    """Each teacher's part of the mean; their sum is 1."""
    temperature: float
    """T, dividing the logits of teachers and student in the KL."""
    mean_of: MeanOf


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What multiplies ∂CE/∂z and T · ∂KL/∂z in each position's gradient; 0 leaves one out."""

    ce_C1: Tensor
    kl_C1: Tensor

    def of(self, rows: slice) -> Factors:
        """Those of some positions."""
        return Factors(ce_C1=self.ce_C1[rows], kl_C1=self.kl_C1[rows])


def row_losses(
    student_CV: Tensor,
    teachers_CV: Sequence[Tensor],
    label_C1: Tensor,
    mixture: Mixture,
    factors: Factors | None,
    work: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """(CE, KL) of each position, `[C, 1]` both; KL is 0 without teachers.

    With `factors`, the gradient overwrites `student_CV`. A position without a label takes any
    token for `label_C1`; dropping its CE is up to the caller. `work` holds `num_work` spaces,
    overwritten, of any number of rows: as many positions are done at a time.
    """
    if takes_kernel(student_CV.dtype, student_CV.device, len(teachers_CV)):
        kernels = _kernels()
        assert kernels is not None
        losses: tuple[Tensor, Tensor] = kernels.row_losses(
            student_CV, teachers_CV, label_C1, mixture, factors
        )
        return losses
    parts = [
        _tile_losses(
            student_CV[rows],
            [teacher_CV[rows] for teacher_CV in teachers_CV],
            label_C1[rows],
            mixture,
            factors and factors.of(rows),
            spaces,
        )
        for rows, spaces in tiles(len(student_CV), work)
    ]
    return joined(parts)


def num_work(dtype: torch.dtype, device: torch.device, num_teachers: int) -> int:
    """How many work spaces `row_losses` asks for."""
    if takes_kernel(dtype, device, num_teachers):
        return 0
    return 3 if num_teachers else 1


def takes_kernel(dtype: torch.dtype, device: torch.device, num_teachers: int) -> bool:
    """Whether student logits of this kind go through the Triton kernel.

    Where CUDA comes without Triton, that is said once in the log.
    """
    if device.type != "cuda" or dtype == torch.float64:
        return False
    kernels = _kernels()
    return kernels is not None and num_teachers <= kernels.MAX_TEACHERS


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from babyllama_ds.losses import triton_rows
    except ImportError as error:
        log.warning(
            "the loss takes PyTorch's operators on CUDA, which is slower than its kernel: %s", error
        )
        return None
    return triton_rows


def tiles(num_rows: int, work: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of so many rows as the work spaces have, and of the spaces as many."""
    step = len(work[0])
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        yield rows, [space[: rows.stop - rows.start] for space in work]


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(CE, KL) of all tiles' positions."""
    ces, kls = zip(*parts, strict=True)
    return torch.cat(ces), torch.cat(kls)


def _tile_losses(
    student_CV: Tensor,
    teachers_CV: Sequence[Tensor],
    label_C1: Tensor,
    mixture: Mixture,
    factors: Factors | None,
    work: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    x = work[0].copy_(student_CV)
    x.sub_(x.amax(-1, keepdim=True))
    label_logit_C1 = x.gather(-1, label_C1)
    if not teachers_CV:
        sum_C1 = x.exp_().sum(-1, keepdim=True)
        kl_C1 = torch.zeros_like(sum_C1)
        if factors:
            x.mul_(factors.ce_C1 / sum_C1)
    else:
        sum_C1, kl_C1 = _soft_rows(x, teachers_CV, mixture, factors, work[1], work[2])
    if factors:
        x.scatter_add_(-1, label_C1, -factors.ce_C1)
        student_CV.copy_(x)
    return sum_C1.log() - label_logit_C1, kl_C1


def _soft_rows(
    x: Tensor,
    teachers_CV: Sequence[Tensor],
    mixture: Mixture,
    factors: Factors | None,
    y: Tensor,
    p: Tensor,
) -> tuple[Tensor, Tensor]:
    """Σ exp(x) and the KL; with `factors`, x becomes the gradient but for the label's part."""
    temperature = mixture.temperature
    p_sum_C1 = mix(teachers_CV, mixture, out=p, log_out=y)
    y.add_(x, alpha=-1 / temperature)  # log p − z/T but for constants of the row
    kl_C1 = y.mul_(p).sum(-1, keepdim=True) / p_sum_C1 - p_sum_C1.log()

    if temperature == 1:
        exp_C1 = q_sum_C1 = x.exp_().sum(-1, keepdim=True)
    else:
        torch.mul(x, 1 / temperature, out=y).exp_()
        q_sum_C1 = y.sum(-1, keepdim=True)
        exp_C1 = x.exp_().sum(-1, keepdim=True)
    kl_C1 += q_sum_C1.log()

    if factors and temperature == 1:
        x.mul_((factors.ce_C1 + factors.kl_C1) / q_sum_C1)
    elif factors:
        x.mul_(factors.ce_C1 / exp_C1).addcmul_(y, factors.kl_C1 / q_sum_C1)
    if factors:
        x.addcmul_(p, factors.kl_C1 / p_sum_C1, value=-1)
    return exp_C1, kl_C1


def mix(teachers_CV: Sequence[Tensor], mixture: Mixture, *, out: Tensor, log_out: Tensor) -> Tensor:
    """p times a number of each row, in `out`; its logarithm in `log_out`; the numbers, `[C, 1]`."""
    by_kind = _mix_logits if mixture.mean_of == "logits" else _mix_probabilities
    return by_kind(teachers_CV, mixture, out, log_out)


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
