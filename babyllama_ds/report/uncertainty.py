"""Standard errors: what models said of each pair or example enters, the errors of means leave.

**Minimal pairs.** A benchmark's accuracy is the unweighted mean over T tasks, and of each task n_t
pairs were drawn:

    SE = (1 / T) sqrt(Σ_t s_t² / n_t),    s_t²: the sample variance of the task's pairs

as for any stratified sample. For a difference of two models the variance is that of each pair's
difference, in {−1, 0, 1}: models that are wrong on the same pairs differ by less than their
accuracies' own errors say (Miller 2024, arXiv 2411.00640, section 4).

**Fine-tuning.** A suite's score is the unweighted mean over T tasks, a task's the mean over S seeds
of a metric that need not be a mean over examples (F1, Matthews' correlation). So validation
examples are drawn again, with replacement, B times, the same ones for all seeds and for both models
of a difference:

    SE = (1 / T) sqrt(Σ_t e_t + max(0, Σ_t (v_t − w_t) / S))

e_t: the variance of the task's score over the B draws; v_t: the sample variance over seeds of the
scores as measured; w_t: what of it the choice of examples brings, which is in e_t already. Both are
grown by n / (n − 1), as a sample variance is. One seed has no v and w: then it is the examples'
error alone. Each task's fine-tunings are taken as independent of the other tasks'; of MNLI's two
validation files, which are scored with the same fine-tunings, that is not quite true.

Nothing of it tells what another seed of the model's own training would have given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from babyllama_ds.evaluation.minimal_pairs import RIGHT

RESAMPLES = 1_000
"""B: the error has itself one of about 1 / sqrt(2 B), some 2 %."""

Benchmark = Mapping[str, Any]
"""A benchmark's object in `evaluation/<model>.json`."""

Suite = Mapping[str, Any]
"""A fine-tuning suite's object in `evaluation/<model>.json`."""


# -- minimal pairs --------------------------------------------------------------------------------


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


# -- fine-tuning ----------------------------------------------------------------------------------
# Shapes: K kinds of examples (label and all predictions alike), R draws, S columns of predictions.


def fine_tuning_error(suite: Suite) -> float | None:
    """Standard error of a suite's score; none where a task has a single example."""
    return _error_of_scores([[task] for task in suite["tasks"].values()])


def fine_tuning_difference_error(one: Suite, other: Suite) -> float | None:
    """Standard error of the difference of two models' scores.

    None as for `fine_tuning_error`, and where the two were not measured on the same examples with
    as many seeds.
    """
    if one["tasks"].keys() != other["tasks"].keys():
        return None
    pairs = [(task, other["tasks"][name]) for name, task in one["tasks"].items()]
    if not all(_alike(*pair) for pair in pairs):
        return None
    return _error_of_scores(pairs)


def scores_by_counts(
    metric: str,
    label_K: NDArray[np.uint8],
    said_KS: NDArray[np.uint8],
    times_RK: NDArray[np.int64],
) -> NDArray[np.float64]:
    """The metric of each column of predictions, [R, S], of examples that count `times_RK` times.

    Labels are characters; with tp, fp, fn, tn the true and false positives and negatives of "1":

        accuracy = right / all
        f1       = 2 tp / (2 tp + fp + fn)
        mcc      = (tp tn − fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn))

    and 0 where that is 0 / 0.
    """
    times = times_RK.astype(np.float64)  # a product of four counts may be more than int64 holds
    label_K1 = label_K[:, None]
    if metric == "accuracy":
        return _quotient(times @ (label_K1 == said_KS), times.sum(axis=1, keepdims=True))
    true, said = label_K1 == ord("1"), said_KS == ord("1")
    tp, fp, fn, tn = (
        times @ kind for kind in (true & said, ~true & said, true & ~said, ~true & ~said)
    )
    if metric == "f1":
        return _quotient(2 * tp, 2 * tp + fp + fn)
    assert metric == "mcc", metric
    return _quotient(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def _quotient(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    below = np.broadcast_to(below, above.shape)
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (
        one["metric"] == other["metric"]
        and one["labels"] == other["labels"]
        and len(one["predictions"]) == len(other["predictions"])
    )


def _error_of_scores(tasks: Sequence[Sequence[Mapping[str, Any]]]) -> float | None:
    """Of the unweighted mean over tasks; each is one model's, or those of two to be compared."""
    if not tasks or any(len(task["labels"]) < 2 for task, *_ in tasks):
        return None
    rng = np.random.default_rng(0)  # the same report gives the same bytes
    variances = [_variances(task, rng) for task in tasks]
    examples, seeds = (sum(each) for each in zip(*variances, strict=True))
    return math.sqrt(examples + max(0.0, seeds)) / len(tasks)


def _variances(sides: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> tuple[float, float]:
    """A task's e and (v − w) / S: what examples bring, and what seeds bring beside them."""
    label_N = _characters(sides[0]["labels"])
    said_NS = [_characters(said) for side in sides for said in side["predictions"]]
    # Examples of which everything alike is said are interchangeable: how many of each kind are
    # drawn is all that counts, and kinds are few.
    kinds, num_K = np.unique(np.column_stack([label_N, *said_NS]), axis=0, return_counts=True)
    drawn_RK = rng.multinomial(len(label_N), num_K / len(label_N), size=RESAMPLES)
    scores = scores_by_counts(
        sides[0]["metric"], kinds[:, 0], kinds[:, 1:], np.vstack([num_K, drawn_RK])
    )
    num_seeds = len(sides[0]["predictions"])
    # A difference is taken seed by seed.
    by_seed = scores[:, :num_seeds] - (scores[:, num_seeds:] if len(sides) > 1 else 0.0)
    measured_S, resampled_RS = by_seed[0], by_seed[1:]
    growth = len(label_N) / (len(label_N) - 1)
    examples = growth * float(resampled_RS.mean(axis=1).var(ddof=1))
    if num_seeds < 2:
        return examples, 0.0
    shifts_RS = resampled_RS - resampled_RS.mean(axis=0)
    of_examples = growth * float(shifts_RS.var(axis=1, ddof=1).mean())
    return examples, (float(measured_S.var(ddof=1)) - of_examples) / num_seeds


def _characters(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode("ascii"), np.uint8)
