"""Two trainings of a case enter; where they differ by more than rounding explains leaves.

fp32 is judged by its difference from float64, bf16 by that difference beside the one of a plain
bf16 training: a low precision is as good as its errors, not as its distance from another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from babyllama_ds.engine.proof.case import Case, Trace
from babyllama_ds.engine.proof.plain import train_plainly

FP32_GRADIENT = 2e-5
"""Largest difference of a gradient from float64's, relative to the parameter's largest gradient."""
FP32_CHANGE = 2e-4
"""The same of a weight's change over all steps."""
NORM = 1e-5
"""Relative difference of the gradient norm from that of the gradients themselves."""
BF16_STRAY = 0.1
"""How far bf16 gradients may stray from a plain bf16 training's, in units of that one's own error.
Micro-batches are the same, so only the order of fp32 sums differs."""
BF16_CHANGE = 2.0
"""How large the error of a parameter's change may be after all steps, in units of the plain bf16
training's. Where fp32 sums are in another order, the first rounding of a weight that tips the other
way makes it another training, with errors of its own: of a norm's 24 weights they were seen up to
1.7 times as large."""
BF16_CHANGES = 1.25
"""The same of all parameters together, where chance has little say: 1.12 was seen, and 1.35 or more
of an optimizer with another rate (by 2 %), beta or epsilon."""
COMPILED_ERROR = 2.0
"""How large the error of a gradient may be in a compiled training, whose fused kernels round
elsewhere: those of a norm's 24 weights were seen up to 1.7 times as large, of 600 batches."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something of a trace that is not as it should be: by how much, and the most allowed."""

    what: str
    size: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.what}: off by {self.size:.2g}, allowed {self.allowed:.2g}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of a case.

    `error` is the largest of its gradients: in fp32 relative to float64's largest element, in bf16
    in units of the plain bf16 training's error.
    """

    differences: Sequence[Difference]
    error: float


def judge(case: Case, trace: Trace, *, num_ranks: int, device: torch.device) -> Verdict:
    """Train the case plainly here, and compare with what `num_ranks` ranks showed."""

    def plainly(dtype: torch.dtype) -> Trace:
        return train_plainly(case, num_ranks=num_ranks, dtype=dtype, device=device)

    exact = plainly(torch.float64)
    missing = sorted(exact.keys() - trace.keys())
    if missing:
        gone = [Difference(what=f"{what} (missing)", size=inf, allowed=0.0) for what in missing]
        return Verdict(differences=gone, error=inf)
    if case.precision == "fp32":
        found = list(_fp32(trace, exact))
        error = max(each.size for each in found if each.what.startswith("gradient"))
    else:
        plain = plainly(torch.bfloat16)
        found = list(_bf16(trace, exact, plain, compiled=case.compiled))
        error = max(_error(trace, exact, plain, what) for what in gradients_of(exact))
    found.append(_norm(trace))
    # `not <=` and not `>`: what is not a number is a difference.
    wrong = [each for each in found if not each.size <= each.allowed]
    return Verdict(differences=wrong, error=error)


def gradients_of(trace: Trace) -> list[str]:
    """The names of a trace's gradients."""
    return [what for what in trace if what.startswith("gradient of ")]


def _fp32(trace: Trace, exact: Trace) -> Iterator[Difference]:
    for what in _tensors(exact):
        allowed = FP32_GRADIENT if what.startswith("gradient") else FP32_CHANGE
        scale = exact[what].abs().max()
        size = (trace[what] - exact[what]).abs().max() / scale if scale else trace[what].abs().max()
        yield Difference(what=what, size=float(size), allowed=allowed)


def _bf16(trace: Trace, exact: Trace, plain: Trace, *, compiled: bool) -> Iterator[Difference]:
    for what in gradients_of(exact):
        if compiled:
            size, allowed = _error(trace, exact, plain, what), COMPILED_ERROR
        else:
            size, allowed = _ratio(trace[what] - plain[what], plain[what] - exact[what]), BF16_STRAY
        yield Difference(what=what, size=size, allowed=allowed)
    changes = [what for what in exact if what.startswith("change of ")]
    for what in changes:
        yield Difference(what=what, size=_error(trace, exact, plain, what), allowed=BF16_CHANGE)
    ours, unit = (
        torch.cat([(each[what] - exact[what]).flatten() for what in changes])
        for each in (trace, plain)
    )
    yield Difference(what="change of all weights", size=_ratio(ours, unit), allowed=BF16_CHANGES)


def _error(trace: Trace, exact: Trace, plain: Trace, what: str) -> float:
    """A tensor's error against float64, in units of the plain bf16 training's."""
    return _ratio(trace[what] - exact[what], plain[what] - exact[what])


def _ratio(ours: Tensor, unit: Tensor) -> float:
    numerator, denominator = float(ours.double().norm()), float(unit.double().norm())
    if denominator == 0:
        return 0.0 if numerator == 0 else inf
    return numerator / denominator


def _norm(trace: Trace) -> Difference:
    norm = torch.stack([trace[what].double().norm() for what in gradients_of(trace)]).norm()
    size = (trace["gradient norm"] - norm).abs() / norm
    return Difference(what="gradient norm", size=float(size), allowed=NORM)


def _tensors(trace: Trace) -> list[str]:
    return [what for what in trace if what != "gradient norm"]
