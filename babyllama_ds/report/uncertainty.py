"""Standard errors of minimal pairs: the outcomes of models enter, the errors of their means leave.

A benchmark's accuracy is the unweighted mean over T tasks, and of each task n_t pairs were drawn:

    SE = (1 / T) sqrt(Σ_t s_t² / n_t),    s_t²: the sample variance of the task's pairs

as for any stratified sample. For a difference of two models the variance is that of each pair's
difference, in {−1, 0, 1}: models that are wrong on the same pairs differ by less than their
accuracies' own errors say (Miller 2024, arXiv 2411.00640, section 4). Nothing of it tells what
another seed of the training would have given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babyllama_ds.evaluation.minimal_pairs import RIGHT

Benchmark = Mapping[str, Any]
"""A benchmark's object in `evaluation/<model>.json`."""


def accuracy_error(benchmark: Benchmark) -> float | None:
    """Standard error of the mean accuracy over tasks, in [0, 1].

    None where a task has a single pair, and of an evaluation that kept no outcomes.
    """
    tasks = [_right(task) for task in benchmark["tasks"].values()]
    return _error_of_mean(tasks)


def difference_error(one: Benchmark, other: Benchmark) -> float | None:
    """Standard error of the difference of two accuracies on the same pairs, as a share.

    None as for `accuracy_error`, and where the two were not measured on the same pairs.
    """
    if one["tasks"].keys() != other["tasks"].keys():
        return None
    differences = []
    for name, task in one["tasks"].items():
        right, others = _right(task), _right(other["tasks"][name])
        if right is None or others is None or len(right) != len(others):
            return None
        differences.append(right - others)
    return _error_of_mean(differences)


def _right(task: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """1 for each pair on which the model is right, 0 for the others."""
    outcomes = task.get("outcomes")
    if outcomes is None:
        return None
    right: NDArray[np.bool_] = np.frombuffer(outcomes.encode(), np.uint8) == ord(RIGHT)
    return right.astype(np.float64)


def _error_of_mean(tasks: Sequence[NDArray[np.float64] | None]) -> float | None:
    """Of the unweighted mean over tasks of each task's mean."""
    given = [pairs for pairs in tasks if pairs is not None and len(pairs) > 1]
    if not tasks or len(given) < len(tasks):
        return None
    return math.sqrt(sum(float(pairs.var(ddof=1)) / len(pairs) for pairs in given)) / len(given)
