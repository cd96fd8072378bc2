"""`metrics.jsonl`: the file enters, its lines as objects leave, or as curves that can be drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DRAWN = (
    "ce",
    "dev_ce",
    "kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "student_agreement",
)
"""Measures that become curves."""

MOST_POINTS = 200
"""Of one curve: more than a figure of a page's width can show."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One measure of one model against what it had seen."""

    seen: tuple[float, ...]
    """Tokens or, of milestones, words."""
    values: tuple[float, ...]
    per_point: int
    """Logged values, at most, whose means one point is; 1: every value as it was logged."""


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Line numbers (from 1) and objects; none for a line that is not one, cut short by a kill."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield number, record if isinstance(record, dict) else None


def model_of(stage: str) -> str:
    """The name of the model that a stage makes."""
    return stage.removeprefix("teachers/")


def collect_curves(
    path: Path, models: Collection[str], *, most_points: int = MOST_POINTS
) -> dict[str, dict[str, Curve]]:
    """By measure, the curve of each of `models` (in their order) that has logged it.

    A long curve is cut into equal stretches of tokens and drawn through their means.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _, line in read_metrics(path):
        if line is None or not isinstance(line.get("tokens"), int):
            continue
        for measure in DRAWN:
            if _is_finite(line.get(measure)):
                key = (measure, model_of(str(line.get("stage"))))
                found.setdefault(key, []).append((line["tokens"], line[measure]))
    return {
        measure: {
            model: _thinned(found[measure, model], most_points)
            for model in models
            if (measure, model) in found
        }
        for measure in DRAWN
    }


def last_values(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Where each curve ends."""
    return {model: curve.values[-1] for model, curve in curves.items()}


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _thinned(points: Iterable[tuple[float, float]], most_points: int) -> Curve:
    tokens_N, values_N = np.array(sorted(points), dtype=np.float64).T
    if len(tokens_N) <= most_points:
        return Curve(seen=tuple(tokens_N), values=tuple(values_N), per_point=1)
    edges = np.linspace(tokens_N[0], tokens_N[-1], most_points + 1)[1:-1]
    bin_N = np.searchsorted(edges, tokens_N, side="left")
    counts = np.bincount(bin_N, minlength=most_points)
    full = counts > 0  # a resumed or oddly logged training may leave stretches empty
    means = [
        np.bincount(bin_N, weights=of_N, minlength=most_points)[full] / counts[full]
        for of_N in (tokens_N, values_N)
    ]
    return Curve(seen=tuple(means[0]), values=tuple(means[1]), per_point=int(counts.max()))
