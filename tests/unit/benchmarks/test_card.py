"""What operators read and write, by hand; and what an update does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from babyllama_ds.engine.compiling import what_compiling_lacks
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.spec.training import TrainingSpec

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import card

NUMBERS = torch.ones(10)


@pytest.mark.parametrize(
    ("run", "floats"),
    [
        (lambda: NUMBERS + NUMBERS[:1], 10 + 1 + 10),
        (lambda: NUMBERS.view(2, 5).T, 0),
        (lambda: torch.empty(10), 0),
        (lambda: torch.zeros(10), 10),
        (lambda: NUMBERS.mul_(1.0), 10 + 10),
        (lambda: torch.empty(10).copy_(NUMBERS), 10 + 10),
        (lambda: torch.empty(10).copy_(NUMBERS.bfloat16()), (10 + 5) + (5 + 10)),
        (lambda: torch._foreach_add_([NUMBERS[:3], NUMBERS[4:]], [NUMBERS[:3], NUMBERS[4:]]), 27),
        (lambda: torch.add(NUMBERS, 1.0, out=torch.empty(10)), 10 + 10),
        (lambda: NUMBERS.view(2, 5) @ NUMBERS.view(5, 2), 0),
    ],
)
def test_what_an_operator_passes(run: Callable[[], Any], floats: int) -> None:
    with card.Recorded() as recorded:
        run()
    assert recorded.passed == card.Passed(others=4 * floats)


def test_attention_is_told_apart() -> None:
    states = torch.randn(2, 3, 5, 8)
    with card.Recorded() as recorded:
        nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    sums = 4 * 2 * 3 * 5  # logarithms of a row's sums, which its backward pass reads
    assert recorded.passed == card.Passed(attention=4 * states.nbytes + sums)


class Squares(nn.Module):
    """Two large matrices that are squared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.linspace(-1e-3, 1e-3, 60_000).view(200, 300))
        self.second = nn.Parameter(torch.linspace(-1e-3, 1e-3, 70_000))

    def forward(self) -> torch.Tensor:
        return self.first.float().square().sum() + self.second.float().square().sum()


@pytest.mark.parametrize(("clip_norm", "more"), [(1.0, 0), (1e-9, 8)])
def test_bytes_of_an_update(
    clip_norm: float,
    more: int,
    alone: torch.device,
    engine_config: Callable[..., dict[str, Any]],
) -> None:
    """A parameter's, as the table has them; a gradient that is clipped is passed once more."""
    training = TrainingSpec(batch_windows=1, epochs=1.0, learning_rate=1e-4, clip_norm=clip_norm)
    config = engine_config(training, precision="bf16")
    engine = TrainingEngine(Squares(), training=training, config=config, device=alone)
    reduce = engine._engine.optimizer.reduce_ipg_grads
    for _ in range(2):  # the first makes what the others find
        engine._engine.optimizer.reduce_ipg_grads = lambda: None
        engine.backward(engine.forward())
        with card.Recorded() as recorded:
            reduce()
            engine.step(1e-4)
    engine.destroy()
    counted = recorded.passed.others / 130_000
    assert counted == pytest.approx(card.UPDATE_BYTES + more, rel=1e-3)


@pytest.mark.skipif(what_compiling_lacks("cpu") is not None, reason="needs a C++ compiler")
def test_compiled_layers_pass_less() -> None:
    """Of LLaMA's, by far; and both ways at least what a layer cannot do without."""
    work = card.workload("babyllama97/student")
    plainly, compiled = (card.passed(work, compiled=each) for each in (False, True))
    least = 2 * 512 * (4 * 2 + 3 * 2 * 2)  # residuals and gated units, forward alone
    assert least < compiled.others < 0.6 * plainly.others
    parts = card.step_seconds(work, compiled=True, rate=1e12, bandwidth=1e9)
    assert parts["others"] == pytest.approx(compiled.others * 16 * 128 * 128 / 1e9, rel=1e-6)
    assert parts["update"] == pytest.approx(48 * 58_343_936 / 1e9)
