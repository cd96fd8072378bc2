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
from babyllama_ds.training import loop

pytestmark = pytest.mark.usefixtures("process_as_it_was")

TOLD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(TOLD + "\nmore words")


def failed(begin: Callable[..., Path], runs: Path) -> Any:
    with pytest.raises(NoRoomError) as caught:
        begin()
    (state,) = (json.loads(path.read_text()) for path in runs.glob("*/state.json"))
    assert state["status"] == "failed"
    assert state["error"] == str(caught.value)
    (problem,) = caught.value.problems
    assert problem.got == f"no memory left ({TOLD})"
    return problem


def test_a_training_that_runs_out_goes_on_with_fewer_windows(
    begin: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(9))
    with monkeypatch.context() as patch:
        step = loop.train_step
        patch.setattr(
            loop, "train_step", lambda *a, **k: (step if next(steps) < 8 else no_memory)(*a, **k)
        )
        problem = failed(begin, tmp_path / "runs")
    assert problem.where == "student.training.micro_batch"
    assert "docs/low-memory.md" in problem.hint
    run = begin("student.training.micro_batch=2")
    assert json.loads((run / "student" / "training.json").read_text())["steps"] == 6


def test_an_evaluation_that_runs_out_is_another_key(
    begin: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_cross_entropy", no_memory)
        problem = failed(begin, tmp_path / "runs")
    assert problem.where == "evaluation.batch_tokens"
    run = begin("evaluation.batch_tokens=64")
    assert (run / "report" / "report.html").exists()
