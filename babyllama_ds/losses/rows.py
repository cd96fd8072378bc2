"""From logits to losses, row by row: the elementwise half of the loss.

    CE = log Z − z_y,  Z = Σ exp(z)                      ∂CE/∂z = softmax(z) − onehot(y)
    KL = Σ p · (log p − z/T) + log Σ exp(z/T)            ∂KL/∂z = (softmax(z/T) − p) / T
    z-loss = (log Z)²                                    ∂/∂z = 2 log Z · softmax(z)

with p the teachers' mixture (`mixture.py`). In the place of this KL another divergence between
teachers and student may stand (`divergences.py`).

Logits of the student and its teachers on a chunk of positions enter, in the models' dtypes; CE
and divergence of each position leave, and their gradient takes the place of the student's logits.
Between the two everything has the dtype of the work spaces (fp32, or fp64 for fp64 models) and
every row is taken less its maximum. Distributions stay unnormalised: each sum of exponentials goes
into the factor of a later pass, since passes over [C, V] are what this costs.

Shapes: C positions of the chunk, V vocabulary, 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from babyllama_ds.errors import first_line
from babyllama_ds.losses.divergences import (
    FORWARD_KL,
    Divergence,
    DivergenceKind,
    divergence_rows,
    num_spare,
)
from babyllama_ds.losses.factors import MAX_TEACHERS, Factors
from babyllama_ds.losses.mixture import Mixture, log_mix, mix

log = logging.getLogger(__name__)

KERNEL_REMEDY = "it takes a C compiler and Python's headers: apt install gcc python3-dev"
"""Where Triton is there and cannot start a kernel."""


def row_losses(
    student_CV: Tensor,
    teachers_CV: Sequence[Tensor],
    label_C1: Tensor,
    mixture: Mixture,
    factors: Factors | None,
    work: Sequence[Tensor],
    *,
    divergence: Divergence = FORWARD_KL,
    log_z_C1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(CE, divergence) of each position, `[C, 1]` both; the latter is 0 without teachers.

    With `factors`, the gradient overwrites `student_CV`. A position without a label takes any
    token for `label_C1`; dropping its CE is up to the caller. `work` holds `num_work` spaces,
    overwritten, of any number of rows: as many positions are done at a time. `log_z_C1`, where
    given, becomes log Z.
    """
    if takes_kernel(student_CV.dtype, student_CV.device, len(teachers_CV), divergence):
        kernels = _kernels()
        assert kernels is not None
        losses: tuple[Tensor, Tensor] = kernels.row_losses(
            student_CV, teachers_CV, label_C1, mixture, factors, log_z_C1=log_z_C1
        )
        return losses
    parts = [
        _tile_losses(
            student_CV[rows],
            [teacher_CV[rows] for teacher_CV in teachers_CV],
            label_C1[rows],
            mixture,
            divergence,
            factors and factors.of(rows),
            spaces,
            None if log_z_C1 is None else log_z_C1[rows],
        )
        for rows, spaces in tiles(len(student_CV), work)
    ]
    return joined(parts)


def num_work(
    dtype: torch.dtype,
    device: torch.device,
    num_teachers: int,
    divergence: Divergence = FORWARD_KL,
) -> int:
    """How many work spaces `row_losses` asks for."""
    if takes_kernel(dtype, device, num_teachers, divergence):
        return 0
    return work_of_divergence(divergence.kind) if num_teachers else 1


def work_of_divergence(kind: DivergenceKind) -> int:
    """How many work spaces PyTorch's operators need, where there are teachers."""
    return 3 if kind == "forward_kl" else 4 + num_spare(kind)


def takes_kernel(
    dtype: torch.dtype,
    device: torch.device,
    num_teachers: int,
    divergence: Divergence = FORWARD_KL,
) -> bool:
    """Whether student logits of this kind go through the Triton kernel.

    Where CUDA comes without it, that is said once in the log.
    """
    if device.type != "cuda" or dtype == torch.float64:
        return False
    if num_teachers and divergence.kind != "forward_kl":
        _say_without_kernel(f"there is no kernel for {divergence.kind}")
        return False
    return is_kernels_work(divergence.kind, num_teachers) and _kernels() is not None


def is_kernels_work(kind: DivergenceKind, num_teachers: int) -> bool:
    """Whether the Triton kernel does this, on a machine that has Triton."""
    return num_teachers == 0 or (kind == "forward_kl" and num_teachers <= MAX_TEACHERS)


@functools.cache
def why_no_kernel() -> str | None:
    """Why Triton can start nothing on this machine's cards; none: it can.

    At its first use Triton builds what talks to the card: a second.
    """
    try:  # where it is asked for: Triton is not everywhere, and takes its time to load
        from babyllama_ds.losses import triton_rows

        triton_rows.check_driver()
    except Exception as error:  # no Triton, no compiler of C, no headers of Python, an old driver
        return first_line(error)
    return None


@functools.cache
def _kernels() -> ModuleType | None:
    if (why := why_no_kernel()) is not None:
        _say_without_kernel(f"{why} ({KERNEL_REMEDY})")
        return None
    from babyllama_ds.losses import triton_rows

    return triton_rows


@functools.cache
def _say_without_kernel(why: str) -> None:
    log.warning(
        "the loss takes PyTorch's operators on CUDA, which is slower than its kernel: %s", why
    )


def tiles(num_rows: int, work: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of as many rows as the work spaces have, each with spaces of its length."""
    step = len(work[0])
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        yield rows, [space[: rows.stop - rows.start] for space in work]


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(CE, divergence) of all tiles' positions."""
    ces, kls = zip(*parts, strict=True)
    return torch.cat(ces), torch.cat(kls)


def _tile_losses(
    student_CV: Tensor,
    teachers_CV: Sequence[Tensor],
    label_C1: Tensor,
    mixture: Mixture,
    divergence: Divergence,
    factors: Factors | None,
    work: Sequence[Tensor],
    log_z_C1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = work[0].copy_(student_CV)
    max_C1 = x.amax(-1, keepdim=True)
    x.sub_(max_C1)
    label_logit_C1 = x.gather(-1, label_C1)
    if not teachers_CV:
        sum_C1 = x.exp_().sum(-1, keepdim=True)
        log_sum_C1, soft_C1 = sum_C1.log(), torch.zeros_like(sum_C1)
        if factors:
            x.mul_(factors.hard_C1(max_C1, log_sum_C1) / sum_C1)
    elif divergence.kind == "forward_kl":
        log_sum_C1, soft_C1 = _forward_rows(x, max_C1, teachers_CV, mixture, factors, work[1:])
    else:
        log_sum_C1, soft_C1 = _other_rows(
            x, max_C1, teachers_CV, mixture, divergence, factors, work[1:]
        )
    if factors:
        x.scatter_add_(-1, label_C1, -factors.ce_C1)
        student_CV.copy_(x)
    if log_z_C1 is not None:
        torch.add(max_C1, log_sum_C1, out=log_z_C1)
    return log_sum_C1 - label_logit_C1, soft_C1


def _forward_rows(
    x: Tensor,
    max_C1: Tensor,
    teachers_CV: Sequence[Tensor],
    mixture: Mixture,
    factors: Factors | None,
    work: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """log Σ exp(x) and the KL; with `factors`, x becomes the gradient but for the label's part."""
    y, p = work
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
    log_sum_C1 = exp_C1.log()

    if factors and temperature == 1:
        x.mul_((factors.hard_C1(max_C1, log_sum_C1) + factors.kl_C1) / q_sum_C1)
    elif factors:
        hard_C1 = factors.hard_C1(max_C1, log_sum_C1)
        x.mul_(hard_C1 / exp_C1).addcmul_(y, factors.kl_C1 / q_sum_C1)
    if factors:
        x.addcmul_(p, factors.kl_C1 / p_sum_C1, value=-1)
    return log_sum_C1, kl_C1


def _other_rows(
    x: Tensor,
    max_C1: Tensor,
    teachers_CV: Sequence[Tensor],
    mixture: Mixture,
    divergence: Divergence,
    factors: Factors | None,
    work: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """As `_forward_rows`, of the other divergences."""
    log_p, log_q, q, *spare = work
    temperature = mixture.temperature
    log_mix(teachers_CV, mixture, out=log_p, spare=spare[0])
    torch.mul(x, 1 / temperature, out=log_q)
    q_sum_C1 = torch.exp(log_q, out=q).sum(-1, keepdim=True)
    q.div_(q_sum_C1)
    log_q.sub_(q_sum_C1.log())
    soft_C1 = divergence_rows(divergence, log_p, log_q, q, spare)
    if temperature == 1:
        exp_C1 = q_sum_C1
        x.copy_(q)
    else:
        exp_C1 = x.exp_().sum(-1, keepdim=True)
        x.div_(exp_C1)
    log_sum_C1 = exp_C1.log()
    if factors:
        x.mul_(factors.hard_C1(max_C1, log_sum_C1)).addcmul_(log_p, factors.kl_C1)
    return log_sum_C1, soft_C1
