"""When a training ends early: against transformers' callback, and a rule written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl

from babyllama_ds.engine.checkpoint import Progress
from babyllama_ds.spec.training import EarlyStopping, TrainingSpec
from babyllama_ds.training import limits as module
from babyllama_ds.training.limits import Limits

TOTAL = 100


def limits_of(**changes: Any) -> Limits:
    return Limits(
        TrainingSpec(batch_windows=4, epochs=1.0, learning_rate=1e-2, **changes), total_steps=TOTAL
    )


def evaluations_until_the_end(
    cross_entropies: Sequence[float], *, patience: int, min_delta: float
) -> int | None:
    """How many evaluations there are when it ends; none: it does not."""
    limits = limits_of(early_stopping=EarlyStopping(patience=patience, min_delta=min_delta))
    progress = Progress(step=1)
    for number, dev_ce in enumerate(cross_entropies, start=1):
        progress = limits.after_evaluation(progress, dev_ce)
        if limits.ended_by(progress) is not None:
            assert limits.ended_by(progress) == "early_stopping"
            return number
    return None


# Coarse, so that equal ones are common.
CURVES = st.lists(st.integers(0, 12).map(lambda tenths: 3 + tenths / 10), max_size=25)


@given(curve=CURVES, patience=st.integers(1, 5))
def test_without_a_least_difference_it_is_transformers_rule(
    curve: list[float], patience: int
) -> None:
    callback, control = EarlyStoppingCallback(early_stopping_patience=patience), TrainerControl()
    arguments = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    state: Any = SimpleNamespace(best_metric=None)
    expected = None
    for number, dev_ce in enumerate(curve, start=1):
        callback.on_evaluate(arguments, state, control, {"eval_loss": dev_ce})  # type: ignore[arg-type]
        state.best_metric = min(dev_ce, state.best_metric or dev_ce)  # as its trainer does
        if control.should_training_stop:
            expected = number
            break
    assert evaluations_until_the_end(curve, patience=patience, min_delta=0.0) == expected


@given(curve=CURVES, patience=st.integers(1, 5), tenths=st.integers(0, 4))
def test_with_one_it_is_the_lowest_that_counted(
    curve: list[float], patience: int, tenths: int
) -> None:
    min_delta = tenths / 10
    counted: list[int] = []
    expected = None
    for at, dev_ce in enumerate(curve):
        if all(dev_ce < curve[earlier] - min_delta for earlier in counted):
            counted.append(at)
        if at - counted[-1] == patience:
            expected = at + 1
            break
    assert evaluations_until_the_end(curve, patience=patience, min_delta=min_delta) == expected


def test_many_small_gains_count_together() -> None:
    """Of transformers' callback each would be compared with the one before, and not count."""
    falling = [4.0, 3.95, 3.9, 3.85, 3.8]
    assert evaluations_until_the_end(falling, patience=3, min_delta=0.12) is None
    assert evaluations_until_the_end([4.0] * 5, patience=3, min_delta=0.12) == 4


def test_what_it_goes_by_is_in_the_progress() -> None:
    """A training that is resumed asks another object of the same progress."""
    curve = [3.0, 3.2, 2.9, 2.95, 2.9]
    progress = Progress(step=1)
    for dev_ce in curve:
        fresh = limits_of(early_stopping=EarlyStopping(patience=2))
        assert fresh.ended_by(progress) is None
        progress = fresh.after_evaluation(progress, dev_ce)
    assert limits_of(early_stopping=EarlyStopping(patience=2)).ended_by(progress)


def test_without_limits_only_the_steps_end_it() -> None:
    limits = limits_of()
    progress = Progress(step=99, seconds=1e9)
    assert limits.after_evaluation(progress, 9.0) == progress
    assert limits.ended_by(progress) is None
    assert limits.ended_by(replace(progress, step=TOTAL)) == "steps"


def test_the_minutes() -> None:
    limits = limits_of(max_minutes=0.5)
    assert limits.ended_by(Progress(step=3, seconds=29.9)) is None
    late = Progress(step=3, seconds=30.0)
    assert limits.time_is_up(late)
    assert limits.ended_by(late) == "max_minutes"
    assert limits.ended_by(replace(late, step=TOTAL)) == "steps"
    assert limits.told(late) == "ends after step 3 of 100: 0.5 minutes of steps, max_minutes"


def test_early_stopping_is_told() -> None:
    limits = limits_of(early_stopping=EarlyStopping(patience=2, min_delta=0.01))
    progress = Progress(step=40, lowest_counted_ce=3.25, evaluations_waited=2)
    assert limits.told(progress) == (
        "ends after step 40 of 100: early stopping, 2 evaluations without a dev cross-entropy "
        "more than 0.01 below 3.2500"
    )


def test_ranks_go_by_the_clock_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank(rank: int, own_s: float, **changes: Any) -> float:
        monkeypatch.setattr(module.ranks, "rank", lambda: rank)
        monkeypatch.setattr(module.ranks, "sum_floats", summed)
        return limits_of(**changes).seconds(own_s)

    given_in: list[float] = []
    summed: Callable[[float], list[float]] = lambda value: [given_in.append(value) or 12.5]  # type: ignore[func-returns-value] # noqa: E731
    assert of_rank(0, 12.5, max_minutes=1.0) == 12.5
    assert of_rank(1, 99.0, max_minutes=1.0) == 12.5
    assert given_in == [12.5, 0.0]
    assert of_rank(1, 99.0) == 99.0  # without a limit nobody asks
    assert len(given_in) == 2
