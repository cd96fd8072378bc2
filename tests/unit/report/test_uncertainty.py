"""Standard errors of minimal pairs, against drawing the pairs again and again."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest

from babyllama_ds.report.uncertainty import accuracy_error, difference_error

SIZES = (7, 31, 123)


def benchmark(*outcomes: str) -> dict[str, Any]:
    return {"tasks": {f"task_{i}": {"outcomes": each} for i, each in enumerate(outcomes)}}


def outcomes_of(seed: int, *, like: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Right, wrong and tied pairs; those of a model that is mostly right where another is."""
    rng = np.random.default_rng(seed)
    drawn = ["".join(rng.choice(list("110="), size)) for size in SIZES]
    if like is None:
        return tuple(drawn)
    return tuple(
        "".join(
            own if rng.random() < 0.2 else others for own, others in zip(mine, theirs, strict=True)
        )
        for mine, theirs in zip(drawn, like, strict=True)
    )


def redrawn(tasks: list[np.ndarray], times: int = 20_000) -> float:
    """The spread of the mean over tasks when each task's pairs are drawn with replacement, grown
    from a variance over n pairs to one over n − 1."""
    rng = np.random.default_rng(0)
    means = np.zeros(times)
    for pairs in tasks:
        drawn = pairs[rng.integers(len(pairs), size=(times, len(pairs)))].mean(axis=1)
        shift = np.sqrt(len(pairs) / (len(pairs) - 1))
        means += pairs.mean() + shift * (drawn - pairs.mean())
    return float((means / len(tasks)).std())


def right(outcomes: tuple[str, ...]) -> list[np.ndarray]:
    return [np.array([float(each == "1") for each in task]) for task in outcomes]


def test_the_error_of_an_accuracy_is_what_drawing_again_gives() -> None:
    one = outcomes_of(1)
    assert accuracy_error(benchmark(*one)) == pytest.approx(redrawn(right(one)), rel=0.02)


def test_the_error_of_a_difference_is_that_of_the_same_pairs() -> None:
    one = outcomes_of(2)
    other = outcomes_of(3, like=one)
    differences = [a - b for a, b in zip(right(one), right(other), strict=True)]
    found = difference_error(benchmark(*one), benchmark(*other))
    assert found == pytest.approx(redrawn(differences), rel=0.02)
    apart = [accuracy_error(benchmark(*each)) for each in (one, other)]
    assert found < 0.7 * float(np.hypot(*apart)), "models that agree on most pairs"


def test_one_task_by_hand() -> None:
    # lm-eval's acc_stderr of a task, too: the sample's deviation over the root of its size.
    error = statistics.stdev([1, 0, 0, 1, 1]) / 5**0.5
    assert accuracy_error(benchmark("10=11")) == pytest.approx(error)


def test_equal_models_differ_by_nothing_for_certain() -> None:
    one = benchmark(*outcomes_of(4))
    assert difference_error(one, one) == 0


@pytest.mark.parametrize(
    "other",
    [
        benchmark("101", "1"),  # a task's spread is not known from one pair
        benchmark("1011", "10"),
        benchmark("101"),
        {"tasks": {"task_0": {"outcomes": "101"}, "another": {"outcomes": "10"}}},
        {"tasks": {"task_0": {"accuracy": 0.5}, "task_1": {"accuracy": 0.5}}},
        {"tasks": {}},
    ],
)
def test_what_is_not_known_is_not_told(other: dict[str, Any]) -> None:
    assert difference_error(benchmark("101", "10"), other) is None
    assert difference_error(other, benchmark("101", "10")) is None


def test_without_outcomes_there_is_no_error_of_an_accuracy() -> None:
    assert accuracy_error({"tasks": {"a": {"accuracy": 0.5}}}) is None
    assert accuracy_error({"tasks": {}}) is None
    assert accuracy_error(benchmark("10", "1")) is None
