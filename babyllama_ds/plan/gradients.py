"""Gradients: DeepSpeed's configuration and the sizes of parameters enter; what it takes to bring
gradients from the backward pass to the update leaves, in bytes.

Read off DeepSpeed 0.19.8 (`runtime/zero/stage_1_and_2.py`) and `engine.lean`, which reduces in its
stead where the configuration is that of the shipped bf16 files; tests compare it with what a
profiler sees an engine allocate, to the byte where the gradients are no larger than a bucket.

    lean         gradients wait as they come, until they fill a bucket; then their flat copy in
                 fp32, unless one rank has nothing yet that they would be added to
    DeepSpeed's  they are copied into a buffer made beforehand (`contiguous_gradients`; two with
                 `overlap_comm`), larger ones stay where they are; of each full bucket an fp32 copy,
                 before that (`reduce_scatter`, or no buffer) one in bf16
    fp32         likewise, without the fp32 copy; but what a rank owns is copied once more while it
                 is reduced, and laid flat for the update
    all          the norm is taken gradient by gradient, of fp64 copies

P parameters, N ranks, e bytes of a parameter (bf16 2, fp32 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from babyllama_ds.engine.lean import is_lean
from babyllama_ds.spec.deepspeed import precision
from babyllama_ds.spec.deepspeed_file import ZeroBlock

_BF16, _FP32, _FP64 = 2, 4, 8


@dataclass(frozen=True, kw_only=True)
class GradientBytes:
    """The bytes of the rank that needs most."""

    between: int
    """From one micro-batch to the next of the same batch."""
    owned: int
    """While the backward pass reduces: what it adds to, and what it adds."""
    buckets: int
    """Beside that, at the fullest bucket: what waits to be reduced, its copies, and the gradient
    that finds the bucket full."""
    updating: int
    """During the update."""


def gradient_bytes(
    config: Mapping[str, Any], sizes: Sequence[int], *, ranks: int, accumulates: bool, on_cpu: bool
) -> GradientBytes:
    """What `config` has a rank allocate for the gradients of parameters of these numbers.

    `accumulates`: whether a batch has several micro-batches. A CPU gives memory when it is written
    to: there a buffer costs what is filled of it.
    """
    zero, params = ZeroBlock.model_validate(config["zero_optimization"]), sum(sizes)
    bucket = min(zero.reduce_bucket_size, params)
    shares = _Shares(
        zero=zero,
        owned=-(-params // ranks),
        filled=max(bucket, max(sizes)),
        buffers=(bucket if on_cpu else zero.reduce_bucket_size) * (2 if zero.overlap_comm else 1),
        sizes=sizes,
        ranks=ranks,
        accumulates=accumulates,
    )
    if is_lean(config):
        return _lean(shares)
    return _of_bf16(shares) if precision(config) == "bf16" else _of_fp32(shares)


@dataclass(frozen=True, kw_only=True)
class _Shares:
    """Numbers that the cases are made of."""

    zero: ZeroBlock
    owned: int
    """Gradients that a rank updates by."""
    filled: int
    """In the largest bucket: a gradient that is larger than `reduce_bucket_size` is one of its
    own."""
    buffers: int
    sizes: Sequence[int]
    ranks: int
    accumulates: bool

    @property
    def left_in_place(self) -> int:
        """Without a buffer: what a rank owns, and what waits."""
        return min(sum(self.sizes), self.owned + self.filled)

    @property
    def larger(self) -> int:
        """Elements of the gradients that are larger than a bucket."""
        return sum(size for size in self.sizes if size > self.zero.reduce_bucket_size)

    def next_of(self, sizes: Iterable[int]) -> int:
        """The largest that can come while a bucket is full; the last bucket meets none."""
        return max(sizes, default=0) if self.filled < sum(self.sizes) else 0


def _lean(one: _Shares) -> GradientBytes:
    waiting, copy = _BF16 * (one.filled + one.next_of(one.sizes)), _FP32 * one.filled
    if one.ranks == 1 and not one.accumulates:
        return _kept_in_fp32(one, buckets=waiting)
    if one.filled == sum(one.sizes) and not one.accumulates:
        # What is owned comes when the only bucket is reduced and its gradients are gone.
        return _kept_in_fp32(one, buckets=max(copy, copy + waiting - _FP32 * one.owned))
    return _kept_in_fp32(one, buckets=waiting + copy)


def _of_bf16(one: _Shares) -> GradientBytes:
    zero = one.zero
    fitting = (size for size in one.sizes if size <= zero.reduce_bucket_size)
    held = one.buffers + one.larger + one.next_of(fitting)
    if not zero.contiguous_gradients:
        held = one.left_in_place
    joined = one.filled if zero.reduce_scatter or not zero.contiguous_gradients else 0
    return _kept_in_fp32(one, buckets=_BF16 * (held + joined) + _FP32 * one.filled)


def _kept_in_fp32(one: _Shares, *, buckets: int) -> GradientBytes:
    owned = _FP32 * one.owned
    between = owned if one.accumulates else 0
    updating = owned + _FP64 * max(one.sizes)
    return GradientBytes(between=between, owned=owned, buckets=buckets, updating=updating)


def _of_fp32(one: _Shares) -> GradientBytes:
    zero, whole = one.zero, sum(one.sizes)
    before = one.owned if one.accumulates else 0
    if zero.contiguous_gradients:
        copied, held = one.owned, one.buffers + one.next_of(one.sizes)
        held += one.filled if zero.reduce_scatter and one.ranks > 1 else 0
    else:
        copied, held = 0, one.left_in_place + one.filled
    between = before
    if zero.stage == 1:  # all stay whole until the backward pass of the last micro-batch ends
        between = whole + one.buffers if one.accumulates else 0
        before = whole - one.filled
        held -= one.next_of(one.sizes)
    return GradientBytes(
        between=_FP32 * between,
        owned=_FP32 * (before + copied),
        buckets=_FP32 * held,
        updating=_FP32 * one.owned + max(_FP32 * one.owned, _FP64 * max(one.sizes)),
    )
