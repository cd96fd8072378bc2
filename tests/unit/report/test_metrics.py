"""Curves of `metrics.jsonl`: every logged value, or the means of equal stretches of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from babyllama_ds.report.metrics import Curve, collect_curves, read_metrics


def write_lines(path: Path, lines: list[dict[str, object] | str]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_lines_and_what_is_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m", [{"step": 1}, "[1]", '{"step": 2'])
    assert list(read_metrics(path)) == [(1, {"step": 1}), (2, None), (3, None)]
    assert list(read_metrics(tmp_path / "none")) == []


def test_each_measure_by_model_in_the_models_order(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m",
        [
            {"stage": "student", "tokens": 20, "ce": 3.0, "kl": 0.5},
            {"stage": "student", "tokens": 10, "ce": 4.0, "kl": None},
            {"stage": "teachers/a", "tokens": 10, "ce": 5.0},
            {"stage": "teachers/a", "tokens": 10, "dev_ce": 5.5},
            {"stage": "teachers/a", "tokens": 20, "ce": math.nan},
            {"stage": "other", "tokens": 10, "ce": 1.0},
            {"stage": "student", "step": 3, "ce": 1.0},
        ],
    )
    curves = collect_curves(path, ["a", "student"])
    assert {measure: of for measure, of in curves.items() if of} == {
        "ce": {
            "a": Curve(seen=(10,), values=(5.0,), per_point=1),
            "student": Curve(seen=(10, 20), values=(4.0, 3.0), per_point=1),
        },
        "kl": {"student": Curve(seen=(20,), values=(0.5,), per_point=1)},
        "dev_ce": {"a": Curve(seen=(10,), values=(5.5,), per_point=1)},
    }
    assert list(curves["ce"]) == ["a", "student"]


@pytest.mark.parametrize("num_lines", [8, 9, 50, 1001])
def test_a_long_curve_is_the_means_of_equal_stretches(tmp_path: Path, num_lines: int) -> None:
    values = [(n * 7919) % 101 / 10 for n in range(num_lines)]
    tokens = [100 * (n + 1) for n in range(num_lines)]
    path = write_lines(
        tmp_path / "m",
        [{"stage": "student", "tokens": t, "ce": v} for t, v in zip(tokens, values, strict=True)],
    )
    curve = collect_curves(path, ["student"], most_points=8)["ce"]["student"]
    if num_lines <= 8:
        assert (list(curve.seen), list(curve.values)) == (tokens, values)
        return
    # Plainly: which of eight equal stretches a value lies in, the upper end belonging to it.
    first, width = tokens[0], (tokens[-1] - tokens[0]) / 8
    places = [max(0, math.ceil((t - first) / width) - 1) for t in tokens]
    for place, (x, y) in enumerate(zip(curve.seen, curve.values, strict=True)):
        inside = [n for n in range(num_lines) if places[n] == place]
        assert x == pytest.approx(sum(tokens[n] for n in inside) / len(inside))
        assert y == pytest.approx(sum(values[n] for n in inside) / len(inside))
    assert curve.per_point == max(places.count(place) for place in range(8))
