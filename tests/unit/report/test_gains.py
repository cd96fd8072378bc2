from __future__ import annotations

import json
from pathlib import Path

import pytest

from babyllama_ds.errors import DataError
from babyllama_ds.report.gains import collect_gains, render_gains


def model(ce: float, accuracy: float) -> dict[str, object]:
    return {"dev_ce": ce, "minimal_pairs": {"blimp": accuracy}}


def run(folder: Path, name: str, student: float, control: float) -> Path:
    report = {
        "name": name,
        "models": {"student": model(student, 0.6), "control": model(control, 0.5)},
    }
    path = folder / name / "report" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))
    return folder / name


def test_mean_and_standard_error_by_hand(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a", 2.0, 2.1), run(tmp_path, "b", 2.0, 2.3)]
    reports = [json.loads((path / "report" / "report.json").read_text()) for path in runs]
    cross_entropy, pairs = collect_gains(reports)
    assert cross_entropy.mean == pytest.approx(-0.2)
    # Differences -0.1 and -0.3: standard deviation 0.1414, over the root of 2.
    assert cross_entropy.standard_error == pytest.approx(0.1)
    assert pairs.values == pytest.approx((10.0, 10.0))
    assert pairs.standard_error == pytest.approx(0.0, abs=1e-12)
    table = render_gains(runs)
    assert "| control | dev CE (nats/token) | -0.2000 | 0.1000 | -0.3000 | -0.1000 | 2 |" in table
    assert "| b | control | 2.3000 | 50.00 |" in table


def test_a_single_run_has_no_standard_error(tmp_path: Path) -> None:
    assert "| -0.1000 | – |" in render_gains([run(tmp_path, "a", 2.0, 2.1)])


def test_a_run_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: got no report"):
        render_gains([tmp_path])
