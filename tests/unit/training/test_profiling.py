"""The parts of a step, timed on request."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from babyllama_ds.training.breakdown import PARTS
from trainings import Run, assert_equal_weights


@pytest.mark.parametrize(("asked", "last"), [(3, 4), (100, 8)])  # not the first step
def test_the_parts_of_a_step(
    new_run: Callable[..., Run],
    asked: int,
    last: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = new_run(distilled=True, profile_steps=asked)
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    with caplog.at_level(logging.INFO):
        summary = run.train()
    (line,) = [line for line in run.metrics() if "step_s/loss" in line]
    told = {key.removeprefix("step_s/"): s for key, s in line.items() if "step_s/" in key}
    assert line["step"] == last
    assert told == summary["step_s"]
    assert list(told) == list(PARTS)
    assert told.pop("communication") == 0, "a rank alone has nobody to communicate with"
    assert min(told.values()) > 0
    assert sum(told.values()) <= summary["seconds"]
    assert "student  a step of" in caplog.text


def test_timing_the_parts_changes_nothing(new_run: Callable[..., Run]) -> None:
    plain, timed = (
        new_run("plain", distilled=True),
        new_run("timed", distilled=True, profile_steps=3),
    )
    assert plain.train()["step_s"] is None
    timed.train()
    assert_equal_weights(plain.weights(), timed.weights())


def test_no_parts_where_no_step_is_left_to_time(new_run: Callable[..., Run]) -> None:
    assert new_run(profile_steps=2, max_steps=1).train()["step_s"] is None
