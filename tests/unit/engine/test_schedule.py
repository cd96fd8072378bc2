"""Learning rates are transformers', at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from babyllama_ds.engine.schedule import learning_rate

THEIRS = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize(
    ("warmup_steps", "total_steps"),
    [(0, 1), (0, 40), (1, 2), (7, 40), (39, 40), (40, 40), (60, 40)],
)
def test_equals_transformers_at_every_step(
    schedule: str, warmup_steps: int, total_steps: int, training_spec: Callable[..., Any]
) -> None:
    training = training_spec(schedule=schedule, warmup_steps=warmup_steps, learning_rate=7e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=7e-4)
    theirs = THEIRS[schedule](optimizer, warmup_steps, total_steps)
    for step in range(total_steps):
        (expected,) = theirs.get_last_lr()
        assert learning_rate(training, step, total_steps) == pytest.approx(expected, rel=1e-12), (
            step
        )
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", THEIRS)
def test_rises_from_zero_to_the_peak_and_falls_to_zero(
    schedule: str, training_spec: Callable[..., Any]
) -> None:
    training = training_spec(schedule=schedule, warmup_steps=4, learning_rate=8e-3)
    rates = [learning_rate(training, step, 24) for step in range(27)]
    assert rates[:5] == pytest.approx([0, 2e-3, 4e-3, 6e-3, 8e-3])
    assert rates[14] == pytest.approx(4e-3)  # half way down, for either shape
    assert rates[24:] == pytest.approx([0, 0, 0], abs=1e-18)
    assert sorted(rates[4:], reverse=True) == rates[4:]
