"""Milestones that were measured: a run's files enter; facts, then curves and words of them, leave.

Cross-entropies are nats per token, accuracies shares in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from babyllama_ds.files import read_json_if_there
from babyllama_ds.report.metrics import Curve
from babyllama_ds.report.scores import scores_of
from babyllama_ds.rundir import MILESTONES_NAME

ON_TEXT = ("dev_ce", "perplexity", "bits_per_byte")

Milestones = Mapping[str, list[dict[str, Any]]]
"""Each model's, in the order of its training."""


def collect_milestones(run_dir: Path, trainings: Mapping[str, Mapping[str, Any]]) -> Milestones:
    """What was measured of models on their way; `trainings` are their summaries by name.

    Raises:
        RunError: a JSON file is garbled.
    """
    found = {}
    for model, training in trainings.items():
        folder = run_dir / "evaluation" / MILESTONES_NAME / model
        measured = [
            {"name": name, **seen, **scores_of(evaluation)}
            for name, seen in training.get("milestones", {}).items()
            if (evaluation := read_json_if_there(folder / f"{name}.json")) is not None
        ]
        if measured:
            found[model] = measured
    return found


def milestones_missing(run_dir: Path, trainings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of each model, how many are there that were not measured, in words."""
    missing = []
    for model, training in trainings.items():
        number = sum(
            (run_dir / MILESTONES_NAME / model / name).is_dir()
            and not (run_dir / "evaluation" / MILESTONES_NAME / model / f"{name}.json").exists()
            for name in training.get("milestones", {})
        )
        if number:
            missing.append(f"the evaluation of {number} of the milestones of the {model}")
    return missing


def benchmarks_of(milestones: Milestones) -> list[str]:
    """What minimal pairs they were measured on."""
    names = (name for one in _all(milestones) for name in one["minimal_pairs"])
    return list(dict.fromkeys(names))


def curves_on_text(milestones: Milestones) -> dict[str, Curve]:
    """Development cross-entropy against words, by model."""
    return _curves(milestones, lambda one: one["dev_ce"])


def curves_on(milestones: Milestones, benchmark: str) -> dict[str, Curve]:
    """Accuracy on a benchmark, in per cent, against words, by model."""
    return _curves(milestones, lambda one: _per_cent(one["minimal_pairs"].get(benchmark)))


def measures(milestone: Mapping[str, Any]) -> dict[str, float]:
    """What one measures at, by names of TensorBoard's kind; accuracies are shares."""
    scores = {key: milestone[key] for key in ON_TEXT}
    scores |= {f"minimal_pairs/{name}": share for name, share in milestone["minimal_pairs"].items()}
    return {key: value for key, value in scores.items() if value is not None}


def how_measured(report: Mapping[str, Any]) -> str:
    """On how much, and how finished models may differ from the last of them, in sentences."""
    asked = report["job"]["evaluation"]["milestones"]
    less = [
        f"the first {asked['max_pairs_per_task']:,} pairs of each task"
        if asked["max_pairs_per_task"]
        else "",
        f"at most {asked['dev_windows']:,} development windows" if asked["dev_windows"] else "",
    ]
    on = " and ".join(filter(None, less)) or "what the finished models are measured on"
    said = [
        f"Each is the model as it was on its way, at the learning rate of then; measured on {on}."
    ]
    best = [name for name in report["milestones"] if report["models"][name]["kept"] == "best"]
    if best:
        said.append(
            f"The finished {' and '.join(best)} {'have' if len(best) > 1 else 'has'} the weights "
            "of the best evaluation, not always those of the last step."
        )
    return " ".join(said)


def _all(milestones: Milestones) -> Iterator[dict[str, Any]]:
    return (one for of_model in milestones.values() for one in of_model)


def _curves(
    milestones: Milestones, measure: Callable[[Mapping[str, Any]], float | None]
) -> dict[str, Curve]:
    curves = {}
    for model, of_model in milestones.items():
        points = [(one["words"], v) for one in of_model if (v := measure(one)) is not None]
        if points:
            words, values = zip(*points, strict=True)
            curves[model] = Curve(seen=words, values=values, per_point=1)
    return curves


def _per_cent(share: float | None) -> float | None:
    return None if share is None else 100 * share
