"""Scores of classifiers, against other formulas for the same."""

from __future__ import annotations

import numpy as np
import pytest

from babyllama_ds.evaluation.classification import metric_of, score


@pytest.mark.parametrize("seed", range(20))
def test_against_other_formulas(seed: int) -> None:
    """Matthews' correlation is Pearson's of the two columns; F1 the harmonic mean of precision and
    recall."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, size=37)
    predicted = np.where(draw.random(37) < 0.6, labels, draw.integers(0, 2, size=37))
    texts = ["".join(map(str, column)) for column in (labels, predicted)]
    precision = (labels[predicted == 1] == 1).mean()
    recall = (predicted[labels == 1] == 1).mean()
    assert score("accuracy", *texts) == pytest.approx((labels == predicted).mean())
    assert score("f1", *texts) == pytest.approx(2 / (1 / precision + 1 / recall))
    assert score("mcc", *texts) == pytest.approx(np.corrcoef(labels, predicted)[0, 1])


@pytest.mark.parametrize(
    ("metric", "labels", "predictions", "expected"),
    [
        ("accuracy", "0122", "0121", 0.75),
        ("f1", "0011", "0000", 0.0),  # nothing found
        ("f1", "0000", "0000", 0.0),  # nothing to find
        ("mcc", "0101", "1111", 0.0),  # one answer always
        ("mcc", "1111", "1111", 0.0),
        ("mcc", "0101", "1010", -1.0),
        ("f1", "1111", "1111", 1.0),
    ],
)
def test_ends_of_the_scale(metric, labels: str, predictions: str, expected: float) -> None:
    assert score(metric, labels, predictions) == expected


def test_metrics_are_those_of_the_challenge() -> None:
    tasks = ("cola", "mrpc", "qqp", "mnli", "mnli-mm", "rte", "sst2", "wsc", "boolq", "multirc")
    found = {task: metric_of(task) for task in tasks}
    assert {task for task in tasks if found[task] == "accuracy"} == set(tasks[3:])
    assert (found["cola"], found["mrpc"], found["qqp"]) == ("mcc", "f1", "f1")
