"""`check`: the resolved job, printed once, from the launcher and from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.resolved import dump_job

OVERRIDE = "student.training.learning_rate=3e-4"


@pytest.fixture(scope="module")
def job(tiny_job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without its text: a check needs none."""
    folder = tmp_path_factory.mktemp("check")
    path = tiny_job(folder)
    for text in folder.glob("town.*"):
        text.unlink()
    return path


@pytest.mark.launch
def test_launcher_checks_without_running(
    job: Path, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    ended = launch(job, OVERRIDE, "--check", "--runs", tmp_path / "runs")
    ended.assert_done()
    assert ended.out == dump_job(load_job(job, [OVERRIDE]))
    assert ended.err == ""
    assert "learning_rate: 0.0003" in ended.out
    assert not (tmp_path / "runs").exists()


def test_command_checks_without_torch(
    job: Path, tmp_path: Path, run_alone: Callable[..., Any]
) -> None:
    # A torch that cannot be imported stands in for a machine without it.
    (tmp_path / "torch.py").write_text("raise ImportError('check needs no torch')")
    ended = run_alone("check", job, OVERRIDE, env={"PYTHONPATH": str(tmp_path)})
    ended.assert_done()
    assert ended.out == dump_job(load_job(job, [OVERRIDE]))
    assert ended.err == ""


def test_check_refuses_a_wrong_job(job: Path, run_alone: Callable[..., Any]) -> None:
    ended = run_alone("check", job, "student.training.epochs=-1", "windows.lenght=8")
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.count("error:") == 1
    assert "student.training.epochs" in ended.err
    assert "windows.lenght" in ended.err
    assert "Traceback" not in ended.err
