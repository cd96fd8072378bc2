# mypy: ignore-errors
"""The elementwise half of the loss as one Triton kernel, for CUDA: see `rows.py` for the formulas.

Logits of a chunk enter in the models' dtypes (bf16, fp16, fp32); CE and KL of each position leave
in fp32, and their gradient takes the place of the student's logits. A program has one row and goes
over it twice in blocks: sums of exponentials relative to a running maximum, then KL and gradient.
All arithmetic is fp32. Nothing but [C, 1] is allocated. Where probabilities are averaged, each
teacher's sum comes from a kernel of its own before that.

Only importable where Triton is. Under `TRITON_INTERPRET=1` the kernels run on a CPU, for tests.

Shapes: C positions of the chunk, V vocabulary, K teachers, 1 kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from babyllama_ds.losses.factors import MAX_TEACHERS, Factors
from babyllama_ds.losses.mixture import Mixture

_MAX_BLOCK = 4096
_NUM_WARPS = 8


def check_driver() -> None:
    """Raise whatever Triton raises where it cannot start a kernel.

    At its first use it builds, with a C compiler and Python's headers, what talks to the card.
    """
    driver.active.get_current_device()


def row_losses(
    student_CV: Tensor,
    teachers_CV: Sequence[Tensor],
    label_C1: Tensor,
    mixture: Mixture,
    factors: Factors | None,
    *,
    log_z_C1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `rows.row_losses` gives for the forward KL, without work spaces."""
    assert len(teachers_CV) <= MAX_TEACHERS, "more teachers than the kernel has places for"
    assert all(each.stride(1) == 1 for each in (student_CV, *teachers_CV)), "rows with gaps"
    num_rows, vocab_size = student_CV.shape
    ce_C1 = torch.zeros(num_rows, 1, dtype=torch.float32, device=student_CV.device)
    kl_C1 = torch.zeros_like(ce_C1)
    if num_rows == 0:
        return ce_C1, kl_C1
    options = {
        "BLOCK": min(_MAX_BLOCK, max(16, triton.next_power_of_2(vocab_size))),
        "num_warps": _NUM_WARPS,
    }
    z_factors_C1 = factors.z_C1 if factors else None
    scale = 1 / mixture.temperature
    of_probabilities = mixture.mean_of == "probabilities"
    parts_KC2 = ce_C1.new_empty(len(teachers_CV) if of_probabilities else 0, num_rows, 2)
    for teacher_CV, parts_C2 in zip(teachers_CV, parts_KC2, strict=False):
        _log_sum_exp_kernel[(num_rows,)](
            teacher_CV, parts_C2, teacher_CV.stride(0), vocab_size, scale, **options
        )
    unused = [student_CV] * (MAX_TEACHERS - len(teachers_CV))
    places = [*teachers_CV, *unused]
    shares = [*mixture.shares, *(0.0 for _ in unused)]
    _row_kernel[(num_rows,)](
        student_CV,
        *places,
        *(each.stride(0) for each in places),
        *shares,
        label_C1,
        factors.ce_C1 if factors else ce_C1,
        factors.kl_C1 if factors else kl_C1,
        z_factors_C1 if z_factors_C1 is not None else ce_C1,
        parts_KC2,
        ce_C1,
        kl_C1,
        log_z_C1 if log_z_C1 is not None else ce_C1,
        student_CV.stride(0),
        num_rows,
        vocab_size,
        scale,
        NUM_TEACHERS=len(teachers_CV),
        OF_PROBABILITIES=of_probabilities,
        WARM=mixture.temperature != 1,
        WITH_GRADIENT=factors is not None,
        WITH_Z=z_factors_C1 is not None,
        KEEP_LOG_Z=log_z_C1 is not None,
        **options,
    )
    return ce_C1, kl_C1


@triton.jit
def _log_sum_exp_kernel(logits, parts, stride, vocab_size, scale, BLOCK: tl.constexpr):
    """log Σ exp(logits · scale) of a row, as the maximum and the rest: `parts` is [C, 2]."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    running_max = -float("inf")
    running_sum = 0.0
    for first in range(0, vocab_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        x = tl.load(start + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
        new_max = tl.maximum(running_max, tl.max(x, 0))
        running_sum = running_sum * tl.exp(running_max - new_max) + tl.sum(tl.exp(x - new_max), 0)
        running_max = new_max
    tl.store(parts + 2 * row, running_max)
    tl.store(parts + 2 * row + 1, tl.log(running_sum))


@triton.jit
def _scaled(teacher, stride, share, row, columns, inside):
    """A teacher's logits times its share, 0 outside the row."""
    start = teacher + row * stride
    return tl.load(start + columns, mask=inside, other=0.0).to(tl.float32) * share


@triton.jit
def _probability(teacher, stride, share, parts, row, columns, inside, scale):
    """A teacher's probabilities times its share; `parts` of its log Σ exp in this row."""
    x = _scaled(teacher, stride, scale, row, columns, inside)
    log_p = x - tl.load(parts) - tl.load(parts + 1)
    return tl.where(inside, tl.exp(log_p), 0.0) * share


@triton.jit
def _mean_logits(
    t0, t1, t2, t3, t4, t5, t6, t7,
    d0, d1, d2, d3, d4, d5, d6, d7,
    s0, s1, s2, s3, s4, s5, s6, s7,
    row, columns, inside, scale, NUM_TEACHERS: tl.constexpr,
):  # fmt: skip
    """Σ s_k t_k · scale, −inf outside the row."""
    u = _scaled(t0, d0, s0, row, columns, inside)
    if NUM_TEACHERS > 1:
        u += _scaled(t1, d1, s1, row, columns, inside)
    if NUM_TEACHERS > 2:
        u += _scaled(t2, d2, s2, row, columns, inside)
    if NUM_TEACHERS > 3:
        u += _scaled(t3, d3, s3, row, columns, inside)
    if NUM_TEACHERS > 4:
        u += _scaled(t4, d4, s4, row, columns, inside)
    if NUM_TEACHERS > 5:
        u += _scaled(t5, d5, s5, row, columns, inside)
    if NUM_TEACHERS > 6:
        u += _scaled(t6, d6, s6, row, columns, inside)
    if NUM_TEACHERS > 7:
        u += _scaled(t7, d7, s7, row, columns, inside)
    return tl.where(inside, u * scale, -float("inf"))


@triton.jit
def _mean_probability(
    t0, t1, t2, t3, t4, t5, t6, t7,
    d0, d1, d2, d3, d4, d5, d6, d7,
    s0, s1, s2, s3, s4, s5, s6, s7,
    parts, num_rows, row, columns, inside, scale, NUM_TEACHERS: tl.constexpr,
):  # fmt: skip
    """Σ s_k softmax(t_k · scale), 0 outside the row; `parts` is [K, C, 2]."""
    of_row = parts + 2 * row
    p = _probability(t0, d0, s0, of_row, row, columns, inside, scale)
    if NUM_TEACHERS > 1:
        of_row += 2 * num_rows
        p += _probability(t1, d1, s1, of_row, row, columns, inside, scale)
    if NUM_TEACHERS > 2:
        of_row += 2 * num_rows
        p += _probability(t2, d2, s2, of_row, row, columns, inside, scale)
    if NUM_TEACHERS > 3:
        of_row += 2 * num_rows
        p += _probability(t3, d3, s3, of_row, row, columns, inside, scale)
    if NUM_TEACHERS > 4:
        of_row += 2 * num_rows
        p += _probability(t4, d4, s4, of_row, row, columns, inside, scale)
    if NUM_TEACHERS > 5:
        of_row += 2 * num_rows
        p += _probability(t5, d5, s5, of_row, row, columns, inside, scale)
    if NUM_TEACHERS > 6:
        of_row += 2 * num_rows
        p += _probability(t6, d6, s6, of_row, row, columns, inside, scale)
    if NUM_TEACHERS > 7:
        of_row += 2 * num_rows
        p += _probability(t7, d7, s7, of_row, row, columns, inside, scale)
    return p


@triton.jit
def _row_kernel(
    student,
    t0, t1, t2, t3, t4, t5, t6, t7,
    d0, d1, d2, d3, d4, d5, d6, d7,
    s0, s1, s2, s3, s4, s5, s6, s7,
    labels, ce_factors, kl_factors, z_factors, parts, ces, kls, log_zs,
    stride, num_rows, vocab_size, scale,
    NUM_TEACHERS: tl.constexpr,
    OF_PROBABILITIES: tl.constexpr,
    WARM: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WITH_Z: tl.constexpr,
    KEEP_LOG_Z: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """CE, KL and gradient of a row: logits, row strides and shares of the teachers come first."""
    row = tl.program_id(0).to(tl.int64)  # a chunk's logits may be more than 2^31
    start = student + row * stride
    label = tl.load(labels + row)
    label_logit = tl.load(start + label).to(tl.float32)

    z_max = -float("inf")
    z_sum = 0.0
    soft_sum = 0.0
    u_max = -float("inf")
    u_sum = 0.0
    for first in range(0, vocab_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        z = tl.load(start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(z_max, tl.max(z, 0))
        z_sum = z_sum * tl.exp(z_max - new_max) + tl.sum(tl.exp(z - new_max), 0)
        if WARM and NUM_TEACHERS > 0:
            soft_sum = soft_sum * tl.exp((z_max - new_max) * scale)
            soft_sum += tl.sum(tl.exp((z - new_max) * scale), 0)
        z_max = new_max
        if NUM_TEACHERS > 0 and not OF_PROBABILITIES:
            u = _mean_logits(
                t0, t1, t2, t3, t4, t5, t6, t7,
                d0, d1, d2, d3, d4, d5, d6, d7,
                s0, s1, s2, s3, s4, s5, s6, s7,
                row, columns, inside, scale, NUM_TEACHERS,
            )  # fmt: skip
            new_u_max = tl.maximum(u_max, tl.max(u, 0))
            u_sum = u_sum * tl.exp(u_max - new_u_max) + tl.sum(tl.exp(u - new_u_max), 0)
            u_max = new_u_max
    if not WARM:
        soft_sum = z_sum
    tl.store(ces + row, z_max - label_logit + tl.log(z_sum))
    if KEEP_LOG_Z:
        tl.store(log_zs + row, z_max + tl.log(z_sum))

    if NUM_TEACHERS > 0 or WITH_GRADIENT:
        ce_factor = tl.load(ce_factors + row)
        kl_factor = tl.load(kl_factors + row)
        log_z_sum = tl.log(z_sum)
        hard_factor = ce_factor
        if WITH_Z:
            hard_factor += 2 * tl.load(z_factors + row) * (z_max + log_z_sum)
        if NUM_TEACHERS > 0:
            log_soft_sum = tl.log(soft_sum)
            if not OF_PROBABILITIES:
                log_u_sum = tl.log(u_sum)
        kl = 0.0
        for first in range(0, vocab_size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            # Less its maximum, as the teachers' are: the logarithms below are of numbers near 1.
            z = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32) - z_max
            gradient = hard_factor * tl.exp(z - log_z_sum)
            if NUM_TEACHERS > 0:
                if OF_PROBABILITIES:
                    p = _mean_probability(
                        t0, t1, t2, t3, t4, t5, t6, t7,
                        d0, d1, d2, d3, d4, d5, d6, d7,
                        s0, s1, s2, s3, s4, s5, s6, s7,
                        parts, num_rows, row, columns, inside, scale, NUM_TEACHERS,
                    )  # fmt: skip
                    log_p = tl.log(tl.maximum(p, 1.1754944e-38))  # 0 · log(tiny) is 0
                else:
                    u = _mean_logits(
                        t0, t1, t2, t3, t4, t5, t6, t7,
                        d0, d1, d2, d3, d4, d5, d6, d7,
                        s0, s1, s2, s3, s4, s5, s6, s7,
                        row, columns, inside, scale, NUM_TEACHERS,
                    )  # fmt: skip
                    log_p = u - u_max - log_u_sum
                    p = tl.exp(log_p)
                log_q = z * scale - log_soft_sum
                kl += tl.sum(tl.where(inside, p * (log_p - log_q), 0.0), 0)
                gradient += kl_factor * (tl.exp(log_q) - p)
            if WITH_GRADIENT:
                gradient = tl.where(columns == label, gradient - ce_factor, gradient)
                tl.store(start + columns, gradient.to(student.dtype.element_ty), mask=inside)
        tl.store(kls + row, kl)
