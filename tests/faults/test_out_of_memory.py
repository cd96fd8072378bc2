"""Memory that runs out in the middle of a run: told by the job's key, and the run goes on.

One rank, in this process, through the real pipeline; torch's own error, raised by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama_ds.errors import NoRoomError
from babyllama_ds.evaluation import evaluate
from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.loading import load_job
from babyllama_ds.training import loop

pytestmark = pytest.mark.usefixtures("process_as_it_was")

TOLD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."
MODEL = {
    "kind": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 24,
}
TRAINING = {
    "batch_windows": 8,
    "epochs": 1.0,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "evaluate_windows": 8,
    "checkpoint_every_steps": 2,
}


@pytest.fixture
def start(tmp_path: Path, tiny_job: Callable[..., Path]) -> Callable[..., Path]:
    """Starts the run, or goes on with it."""
    job = tiny_job(
        tmp_path / "job",
        teachers=[{"name": "one", "model": MODEL, "training": TRAINING}],
        student={"model": MODEL, "training": TRAINING},
        control=None,
        evaluation={"dev_windows": 8},
    )
    return lambda *overrides: run_job(load_job(job, list(overrides)), runs=tmp_path / "runs")


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(TOLD + "\nmore words")


def failed(start: Callable[..., Path], runs: Path) -> Any:
    with pytest.raises(NoRoomError) as caught:
        start()
    (state,) = (json.loads(path.read_text()) for path in runs.glob("*/state.json"))
    assert state["status"] == "failed"
    assert state["error"] == str(caught.value)
    (problem,) = caught.value.problems
    assert problem.got == f"no memory left ({TOLD})"
    return problem


def test_a_training_that_runs_out_goes_on_with_fewer_windows(
    start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(9))
    with monkeypatch.context() as patch:
        step = loop.train_step
        patch.setattr(
            loop, "train_step", lambda *a, **k: (step if next(steps) < 8 else no_memory)(*a, **k)
        )
        problem = failed(start, tmp_path / "runs")
    assert problem.where == "student.training.micro_batch"
    assert "docs/low-memory.md" in problem.hint
    run = start("student.training.micro_batch=2")
    assert json.loads((run / "student" / "training.json").read_text())["steps"] == 6


def test_an_evaluation_that_runs_out_is_another_key(
    start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_cross_entropy", no_memory)
        problem = failed(start, tmp_path / "runs")
    assert problem.where == "evaluation.batch_tokens"
    run = start("evaluation.batch_tokens=64")
    assert (run / "report" / "report.html").exists()
