"""How good a classifier's answers are: true and predicted labels enter, a score leaves.

Labels are characters of `labelled_files.LABELS`, one an example. Each task has the metric that
BabyLM's results give for it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

Metric = Literal["accuracy", "f1", "mcc"]

METRICS: dict[str, Metric] = {"cola": "mcc", "mrpc": "f1", "qqp": "f1"}
"""Of all other tasks it is the accuracy."""


def metric_of(task: str) -> Metric:
    """By a task's name."""
    return METRICS.get(task, "accuracy")


def score(metric: Metric, labels: str, predictions: str) -> float:
    """Accuracy or F1 (of label 1) in [0, 1], or Matthews' correlation in [-1, 1]; of both 0 where
    a denominator is.

    F1 = 2 tp / (2 tp + fp + fn); MCC = (tp·tn - fp·fn) / √((tp+fp)(tp+fn)(tn+fp)(tn+fn))
    (Matthews 1975). Both are of two labels.
    """
    count = Counter(zip(labels, predictions, strict=True))
    if metric == "accuracy":
        return sum(n for (label, predicted), n in count.items() if label == predicted) / len(labels)
    tp, fp, fn, tn = (count[pair] for pair in (("1", "1"), ("0", "1"), ("1", "0"), ("0", "0")))
    if metric == "f1":
        return 2 * tp / (2 * tp + fp + fn) if tp else 0.0
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0
