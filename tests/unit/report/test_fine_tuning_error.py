"""Standard errors of fine-tuning scores, against plain loops and against data made at random."""

from __future__ import annotations

import math
import random
import statistics
from itertools import product
from typing import Any

import numpy as np
import pytest

from babyllama_ds.report.uncertainty import (
    fine_tuning_difference_error,
    fine_tuning_error,
    scores_by_counts,
)

METRICS = ("accuracy", "f1", "mcc")


def plain_score(metric: str, labels: str, said: str) -> float:
    """Example by example, with nothing shared with what is tested."""
    pairs = list(zip(labels, said, strict=True))
    if metric == "accuracy":
        return sum(a == b for a, b in pairs) / len(pairs)
    tp = sum(a == "1" and b == "1" for a, b in pairs)
    fp = sum(a != "1" and b == "1" for a, b in pairs)
    fn = sum(a == "1" and b != "1" for a, b in pairs)
    tn = len(pairs) - tp - fp - fn
    if metric == "f1":
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn) if tp + fn else 0.0
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    # Pearson's correlation of two rows of zeros and ones.
    xs, ys = [float(a == "1") for a, _ in pairs], [float(b == "1") for _, b in pairs]
    if min(xs) == max(xs) or min(ys) == max(ys):
        return 0.0
    assert tn + tp + fp + fn == len(pairs)
    return statistics.correlation(xs, ys)


def task(metric: str, labels: str, *predictions: str) -> dict[str, Any]:
    return {"metric": metric, "labels": labels, "predictions": list(predictions)}


def suite(*tasks: dict[str, Any]) -> dict[str, Any]:
    return {"tasks": {f"task_{place}": one for place, one in enumerate(tasks)}}


def characters(text: str) -> np.ndarray:
    return np.array([ord(each) for each in text], np.uint8)


def drawn(seed: int, size: int, *, right: float = 0.75, ones: float = 0.6) -> tuple[str, str]:
    """Labels and a model's predictions of them."""
    rng = random.Random(seed)
    labels = "".join("01"[rng.random() < ones] for _ in range(size))
    return labels, disturbed(labels, seed + 1, right)


def disturbed(labels: str, seed: int, right: float) -> str:
    rng = random.Random(seed)
    return "".join(x if rng.random() < right else "10"[int(x)] for x in labels)


# -- the metrics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        drawn(1, 123),
        drawn(2, 31, right=0.1),
        ("1", "1"),
        ("1", "0"),
        ("0", "0"),  # neither has a 1
        ("0000", "0101"),  # no label is 1
        ("0101", "0000"),  # nothing is said to be 1
        ("1111", "1111"),
        ("1111", "0000"),
        ("0110", "0110"),
        ("0110", "1001"),
    ],
)
def test_scores_are_those_of_plain_loops(metric: str, labels: str, said: str) -> None:
    (score,) = scores_by_counts(
        metric,
        characters(labels),
        characters(said)[:, None],
        np.ones((1, len(labels)), np.int64),
    )
    assert score == pytest.approx([plain_score(metric, labels, said)], abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_an_example_counts_as_often_as_it_was_drawn(metric: str) -> None:
    labels, one = drawn(3, 17)
    other = disturbed(labels, 9, 0.5)
    times = np.random.default_rng(4).integers(0, 4, size=(5, 17))
    times[0] = 0
    times[0, labels.index("0")] = 3  # a draw without a 1
    scores = scores_by_counts(
        metric, characters(labels), np.stack([characters(one), characters(other)], axis=1), times
    )
    for row, found in zip(times, scores, strict=True):
        repeated = [
            "".join(x * n for x, n in zip(text, row, strict=True)) for text in (labels, one, other)
        ]
        expected = [plain_score(metric, repeated[0], said) for said in repeated[1:]]
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_third_label_is_right_or_wrong() -> None:
    (score,) = scores_by_counts(
        "accuracy", characters("0122"), characters("0121")[:, None], np.ones((1, 4), np.int64)
    )
    assert score == pytest.approx([0.75])


def test_counts_beyond_integers() -> None:
    """The four factors below the root of Matthews' correlation, each 2 · 10⁶."""
    times = np.full((1, 4), 1_000_000, np.int64) + np.array([0, 0, 500_000, -500_000])
    (score,) = scores_by_counts("mcc", characters("0101"), characters("0110")[:, None], times)
    tn, tp, fp, fn = (float(each) for each in times[0])
    below = math.sqrt(tp + fp) * math.sqrt(tp + fn) * math.sqrt(tn + fp) * math.sqrt(tn + fn)
    assert score == pytest.approx([(tp * tn - fp * fn) / below])


# -- one seed -------------------------------------------------------------------------------------


def redrawn(tasks: list[tuple[str, ...]], metrics: tuple[str, ...], times: int = 1_500) -> float:
    """The spread of the mean over tasks when examples are drawn again: of the first predictions,
    or of the first minus the second; variances grown from n to n − 1."""
    rng = random.Random(5)
    variance = 0.0
    for metric, (labels, *said) in zip(metrics, tasks, strict=True):
        found = []
        for _ in range(times):
            places = rng.choices(range(len(labels)), k=len(labels))
            true, *chosen = ("".join(text[i] for i in places) for text in (labels, *said))
            scores = [plain_score(metric, true, each) for each in chosen]
            found.append(scores[0] - sum(scores[1:]))
        variance += statistics.pvariance(found) * len(labels) / (len(labels) - 1)
    return math.sqrt(variance) / len(tasks)


def test_the_error_of_a_score_is_what_drawing_again_gives() -> None:
    tasks = [drawn(seed, size) for seed, size in ((1, 31), (5, 77), (9, 123))]
    found = fine_tuning_error(suite(*(task(m, *t) for m, t in zip(METRICS, tasks, strict=True))))
    assert found == pytest.approx(redrawn(tasks, METRICS), rel=0.07)


def test_the_error_of_a_difference_is_that_of_the_same_examples() -> None:
    tasks = []
    for seed, size in ((1, 31), (5, 77), (9, 123)):
        labels, one = drawn(seed, size)
        tasks.append((labels, one, disturbed(one, seed + 2, 0.85)))
    one, other = (
        suite(*(task(m, t[0], t[side]) for m, t in zip(METRICS, tasks, strict=True)))
        for side in (1, 2)
    )
    found = fine_tuning_difference_error(one, other)
    assert found == pytest.approx(redrawn(tasks, METRICS), rel=0.07)
    apart = [fine_tuning_error(each) for each in (one, other)]
    assert found is not None
    assert found < 0.9 * math.hypot(*(each or 0.0 for each in apart))


@pytest.mark.parametrize(("right", "size"), [(40, 50), (4, 6), (2, 3)])
def test_the_error_of_an_accuracy_by_hand(right: int, size: int) -> None:
    """Of 40 in 50: sqrt(0.8 · 0.2 / 49)."""
    said = "1" * right + "0" * (size - right)
    found = fine_tuning_error(suite(task("accuracy", "1" * size, said)))
    share = right / size
    assert found == pytest.approx(math.sqrt(share * (1 - share) / (size - 1)), rel=0.06)


def test_it_is_the_same_every_time() -> None:
    one = suite(task("mcc", *drawn(1, 77)), task("f1", *drawn(2, 31)))
    assert fine_tuning_error(one) == fine_tuning_error(one)


def test_equal_models_differ_by_nothing_for_certain() -> None:
    one = suite(task("f1", *drawn(1, 77)))
    assert fine_tuning_difference_error(one, one) == 0


def test_a_model_that_is_always_right_has_no_error() -> None:
    assert fine_tuning_error(suite(task("accuracy", "0110", "0110"))) == 0


# -- several seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
@pytest.mark.parametrize("by_seed", [0.0, 0.5])
def test_with_several_seeds_it_is_the_spread_over_examples_and_seeds(
    metric: str, by_seed: float
) -> None:
    """Examples that are hard for all, seeds that are bad at all, and chance: the score's true
    variance is that over many such measurements, each with other examples and seeds."""
    rng = np.random.default_rng(6)
    size, seeds = 80, 3
    scores, variances = [], []
    for _ in range(500):
        labels = rng.random(size) < 0.5
        ease = 0.3 * rng.standard_normal(size) + by_seed * rng.standard_normal((seeds, 1))
        right = 0.7 + ease + 1.5 * rng.standard_normal((seeds, size)) > 0
        text = "".join(map(str, labels.astype(int)))
        said = ["".join(map(str, (labels == each).astype(int))) for each in right]
        scores.append(statistics.fmean(plain_score(metric, text, each) for each in said))
        error = fine_tuning_error(suite(task(metric, text, *said)))
        variances.append((error or 0.0) ** 2)
    # The clipping at 0 makes it somewhat too large where seeds bring nothing of their own.
    high = 1.1 if by_seed else 1.5
    assert 0.85 < statistics.fmean(variances) / statistics.variance(scores) < high


def test_of_few_examples_and_seeds_it_is_that_of_all_draws() -> None:
    """Where n / (n − 1), and S − 1 in place of S, weigh most: each of the 5⁵ draws, once."""
    labels, said = "11111", ["10100", "00001", "11011"]
    size, seeds = len(labels), len(said)
    scores = [
        [sum(text[i] == "1" for i in places) / size for text in said]
        for places in product(range(size), repeat=size)
    ]
    means = [statistics.fmean(of_seed) for of_seed in zip(*scores, strict=True)]
    shifts = [[a - b for a, b in zip(draw, means, strict=True)] for draw in scores]
    growth = size / (size - 1)
    by_examples = growth * statistics.pvariance([statistics.fmean(draw) for draw in scores])
    of_the_choice = growth * statistics.fmean(statistics.variance(draw) for draw in shifts)
    measured = statistics.variance(plain_score("accuracy", labels, each) for each in said)
    assert measured > 1.5 * of_the_choice, "else it may be clipped at 0"
    expected = math.sqrt(by_examples + (measured - of_the_choice) / seeds)
    found = fine_tuning_error(suite(task("accuracy", labels, *said)))
    assert found == pytest.approx(expected, rel=0.05)


def test_seeds_that_agree_on_everything_bring_nothing() -> None:
    labels, said = drawn(1, 77)
    one = fine_tuning_error(suite(task("f1", labels, said)))
    assert fine_tuning_error(suite(task("f1", labels, said, said))) == pytest.approx(one)


# -- what is not known ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        suite(task("f1", "1", "1")),  # a task's spread is not known from one example
        suite(task("f1", "0111", "0110")),  # other examples
        suite(task("f1", "01101", "01100")),
        suite(task("mcc", "0110", "0110")),
        suite(task("f1", "0110", "0110", "0110")),  # more seeds
        suite(task("f1", "0110", "0110"), task("f1", "0110", "0110")),
        suite(),
    ],
)
def test_what_is_not_known_is_not_told(other: dict[str, Any]) -> None:
    one = suite(task("f1", "0110", "0100"))
    assert fine_tuning_difference_error(one, other) is None
    assert fine_tuning_difference_error(other, one) is None


def test_without_examples_there_is_no_error_of_a_score() -> None:
    assert fine_tuning_error(suite()) is None
    assert fine_tuning_error(suite(task("f1", "1", "1"), task("f1", "10", "10"))) is None
