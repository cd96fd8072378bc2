"""How long every stage takes, where that is known, and what it is said to rest on."""

from __future__ import annotations

from babyllama_ds.plan.basis import Basis
from babyllama_ds.plan.machines import UTILISATION


def seconds(basis: Basis, ranks: int) -> dict[str, float] | None:
    """Seconds of each stage on so many ranks; none: no speed is known."""
    if basis.measured is not None:
        planned = {stage.name for stage in basis.work.stages}
        return {one.name: one.seconds for one in basis.measured.stages if one.name in planned}
    speed = _flops_a_second(basis)
    if speed is None:
        return None
    return {stage.name: stage.flops.total / (speed * ranks) for stage in basis.work.stages}


def assumed_speed(basis: Basis) -> str:
    """Where times come from, where they were not measured."""
    if basis.question.rate is not None:
        return f"speed: {basis.question.rate}, for each rank; other stages by their FLOPs"
    peak = _peak_flops(basis)
    if peak is not None:
        return (
            f"speed: {UTILISATION:.0%} of the {basis.machine.name}'s "
            f"{peak / 1e12:g} TFLOP/s (dense bf16); give --rate where one was measured"
        )
    if basis.machine.peak_flops is not None:
        return "time: not known; a card's peak is that of bf16, give a measured --rate"
    return "time: not known; name a card with --gpu or give a measured --rate"


def _flops_a_second(basis: Basis) -> float | None:
    """FLOP/s of one rank: measured, or the card's peak times what is assumed of it."""
    rate = basis.question.rate
    if rate is not None:
        student = basis.student
        return rate.flops_a_second(student.flops.steps / student.tokens)
    peak = _peak_flops(basis)
    return None if peak is None else peak * UTILISATION


def _peak_flops(basis: Basis) -> float | None:
    """The card's, which is that of bf16: in fp32 none is known."""
    return None if basis.precision == "fp32" else basis.machine.peak_flops
