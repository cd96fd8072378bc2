"""What gradients take against what torch's profiler sees an engine allocate and free.

One micro-batch after another goes through DeepSpeed's engine, in a world of one rank. The model
keeps next to nothing for its backward pass, so that the most allocated in it are its gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from babyllama_ds.engine.lean import is_lean
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.plan.gradients import GradientBytes, gradient_bytes
from babyllama_ds.spec.training import TrainingSpec

WIDTH = 256
EQUAL = (100,) * 10
"""Rows of the model's matrices."""
SCALARS = 4_000
"""Bytes of losses, norms and the like, where a gradient has 51,200 or more."""

Case = tuple[str, dict[str, Any], int]
"""Precision, what is changed of ZeRO, and the rows of a bucket."""
LEAN: dict[str, Case] = {
    "lean": ("bf16", {}, 300),
    "one bucket": ("bf16", {}, 5_000),
    "matrices larger than a bucket": ("bf16", {}, 50),
}
OTHERS: dict[str, Case] = {
    "scattered": ("bf16", {"reduce_scatter": True}, 300),
    "beside the backward pass": ("bf16", {"overlap_comm": True}, 300),
    "both": ("bf16", {"reduce_scatter": True, "overlap_comm": True}, 300),
    "no buffer": ("bf16", {"reduce_scatter": True, "contiguous_gradients": False}, 300),
    "fp32": ("fp32", {}, 300),
    "fp32, two buffers": ("fp32", {"overlap_comm": True}, 300),
    "fp32, no buffer": ("fp32", {"contiguous_gradients": False}, 300),
    "fp32, scattered": ("fp32", {"reduce_scatter": True}, 300),
    "fp32, stage 1": ("fp32", {"stage": 1}, 300),
}


class Rows(nn.Module):
    """Matrices, each multiplied by one vector: a gradient is as large as its matrix."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(nn.Parameter(torch.rand(n, WIDTH)) for n in rows)

    def forward(self) -> Tensor:
        ones_D = torch.ones(WIDTH, dtype=self.matrices[0].dtype)
        return torch.stack([(matrix_ND @ ones_D).sum() for matrix_ND in self.matrices]).sum()


@pytest.fixture
def make_engine(
    alone: torch.device, engine_config: Callable[..., dict[str, Any]]
) -> Iterator[Callable[..., tuple[TrainingEngine, dict[str, Any]]]]:
    """An engine by its matrices, its micro-batches and what is changed of ZeRO, and its dict."""
    made = []

    def make(
        rows: tuple[int, ...], micro_batches: int, precision: str, **zero: Any
    ) -> tuple[TrainingEngine, dict[str, Any]]:
        training = TrainingSpec(
            batch_windows=micro_batches, micro_batch=1, epochs=1.0, learning_rate=1e-2
        )
        config = engine_config(training, precision=precision)
        config["zero_optimization"] = {**config["zero_optimization"], **zero}
        made.append(TrainingEngine(Rows(rows), training=training, config=config, device=alone))
        return made[-1], config

    yield make
    for engine in made:
        engine.destroy()


def measured(engine: TrainingEngine, micro_batches: int) -> dict[str, int]:
    """The most bytes in each part of a second batch, above those before its backward passes.

    Collectives are left out: a world of one has nothing to add, and the thread that would do it
    holds what it was given for a moment longer.
    """
    with (
        patch("deepspeed.comm.all_reduce", lambda *_, **__: None),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        for number in range(2 * micro_batches):
            last = number == 2 * micro_batches - 1
            loss = engine.forward()
            first = number % micro_batches == 0
            with record_function("at rest" if first else "between"):
                torch.ones(1)  # so that there is something to see
            with record_function("reducing" if last else "other"):
                engine.backward(loss)
            del loss
            with record_function("updating" if last else "other"):
                engine.step(1e-3)
    results: Any = profiled.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events}
    parts = [name for name in ("at rest", "between", "reducing", "updating") if name in spans]
    held, highest = 0, dict.fromkeys(parts, -sys.maxsize)
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            for name in highest:
                if spans[name][0] <= event.start_ns() <= spans[name][1]:
                    highest[name] = max(highest[name], held)
    return {name: most - highest["at rest"] for name, most in highest.items()}


def planned(config: dict[str, Any], rows: tuple[int, ...], micro_batches: int) -> GradientBytes:
    return gradient_bytes(
        config,
        [WIDTH * n for n in rows],
        ranks=1,
        accumulates=micro_batches > 1,
        on_cpu=False,  # what is allocated, whether it is written to or not
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("case", LEAN | OTHERS)
def test_what_an_engine_allocates(
    case: str,
    micro_batches: int,
    make_engine: Callable[..., tuple[TrainingEngine, dict[str, Any]]],
) -> None:
    precision, zero, rows = (LEAN | OTHERS)[case]
    bucket = {"reduce_bucket_size": WIDTH * rows}
    engine, config = make_engine(EQUAL, micro_batches, precision, **bucket, **zero)
    assert is_lean(config) == (case in LEAN)
    compare(measured(engine, micro_batches), planned(config, EQUAL, micro_batches))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("case", LEAN)
def test_what_deepspeeds_own_way_allocates(
    case: str,
    micro_batches: int,
    make_engine: Callable[..., tuple[TrainingEngine, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same configurations, had `engine.lean` not changed the optimizer: a buffer more."""
    monkeypatch.setattr("babyllama_ds.engine.training.make_lean", lambda _: None)
    precision, zero, rows = LEAN[case]
    bucket = {"reduce_bucket_size": WIDTH * rows}
    engine, config = make_engine(EQUAL, micro_batches, precision, **bucket, **zero)
    lean = planned(config, EQUAL, micro_batches)
    monkeypatch.setattr("babyllama_ds.plan.gradients.is_lean", lambda _: False)
    own = planned(config, EQUAL, micro_batches)
    compare(measured(engine, micro_batches), own)
    assert own.buckets > lean.buckets or case == "lean"  # whose buffer is full


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_of_matrices_of_different_sizes_it_is_a_bound(
    micro_batches: int, make_engine: Callable[..., tuple[TrainingEngine, dict[str, Any]]]
) -> None:
    """Which gradient finds the largest bucket full is not known: at most the largest."""
    rows = (*(10,) * 30, 300)
    bucket = {"reduce_bucket_size": WIDTH * 50}
    engine, config = make_engine(rows, micro_batches, "bf16", **bucket)
    found, plan = measured(engine, micro_batches), planned(config, rows, micro_batches)
    most = plan.owned + plan.buckets
    assert most - 2 * 2 * WIDTH * max(rows) < found["reducing"] < most + SCALARS


def compare(found: dict[str, int], plan: GradientBytes) -> None:
    if "between" in found:
        assert found["between"] == pytest.approx(plan.between, abs=SCALARS)
    assert found["reducing"] == pytest.approx(plan.owned + plan.buckets, abs=SCALARS)
    assert found["updating"] == pytest.approx(plan.updating, abs=SCALARS)
