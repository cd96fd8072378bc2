"""Asked to stop in the middle of an evaluation, a run does not finish it first.

DeepSpeed's launcher tells its ranks one after another, and kills one that is still there 30 s after
it was told; the next is told then. So what one rank knows must stop all of them within a batch.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

TIMES = ("seconds", "tokens_per_s", "flops_per_s", "mfu")
MODEL = {
    "kind": "llama",
    "hidden_size": 16,
    "num_layers": 16,  # so that a forward pass of one window takes milliseconds
    "num_heads": 2,
    "intermediate_size": 24,
}
TRAINING = {
    "batch_windows": 8,
    "epochs": 100,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "evaluate_every_steps": 4,
    "evaluate_windows": 8,
    "checkpoint_every_steps": 3,
    "log_every_steps": 1,
}
LONG_WINDOWS = 400  # seconds, in training
SHORT = "evaluation.dev_windows=8"
WHOLE = "evaluation.dev_windows=null"  # a minute and more, after training


@pytest.fixture(scope="module")
def write_job(tiny_job: Callable[..., Path]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        job = tiny_job(
            folder,
            teachers=[{"name": "one", "model": MODEL, "training": TRAINING}],
            student={
                "model": MODEL,
                "training": {
                    **TRAINING,
                    "evaluate_windows": LONG_WINDOWS,
                    "ema": {"decay": 0.9},
                    "early_stopping": {"patience": 3},
                },
            },
            control=None,
            evaluation={"batch_tokens": 32},  # a window
        )
        dev = folder / "town.dev"
        dev.write_text(dev.read_text(encoding="utf-8") * 1500, encoding="utf-8")
        return job

    return write


@pytest.fixture(scope="module")
def peaceful(once: Any, write_job: Callable[[Path], Path], run_ranks: Callable[..., Any]) -> Any:
    """The run that nothing happens to."""
    scene = once(
        "peaceful_evaluations",
        lambda scene: [run_ranks(write_job(scene.folder), SHORT, "--runs", scene.runs)],
    )
    scene.ended[0].assert_done()
    return scene


@pytest.fixture(scope="module")
def struck(
    once: Any,
    write_job: Callable[[Path], Path],
    start_launcher: Callable[..., Any],
    start_ranks: Callable[..., Any],
    run_ranks: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> Any:
    """Stopped in both evaluations of the student's training and in the teacher's at the end."""

    def last_step(scene: Any) -> int:
        lines = (line for line in metrics(scene.run_dir) if line["stage"] == "student")
        return max((line["step"] for line in lines), default=0)

    def terminate_the_launcher(running: Any) -> None:
        os.kill(running.pid_of("deepspeed.launcher.launch"), signal.SIGTERM)

    def terminate_all(running: Any) -> None:
        running.signal_all(signal.SIGTERM)

    def make(scene: Any) -> list[Any]:
        words = (write_job(scene.folder), "--runs", scene.runs)
        ended, found = [], []

        def strike(running: Any, stroke: Callable[[Any], None]) -> None:
            stroke(running)
            ended.append(running.end())
            checkpoints = (scene.run_dir / "checkpoints" / "student").glob("step-*")
            found.append(
                {
                    "state": json.loads((scene.run_dir / "state.json").read_text()),
                    "checkpoints": sorted(path.name for path in checkpoints),
                    "dev": [
                        line["step"]
                        for line in metrics(scene.run_dir)
                        if line["stage"] == "student" and "dev_ce" in line
                    ],
                }
            )

        for step, begin, stroke in (
            (4, start_launcher, terminate_the_launcher),
            (8, start_ranks, terminate_all),
        ):
            running = begin(*words, SHORT)
            running.wait_until(lambda at=step: last_step(scene) >= at, f"step {step}")
            strike(running, stroke)
        running = start_launcher(*words, WHOLE)
        locks = scene.runs / "store" / "evaluations"
        running.wait_until(lambda: list(locks.glob(".*.lock.json")), "an evaluation")
        strike(running, terminate_the_launcher)
        (scene.folder / "found.json").write_text(json.dumps(found))
        return [*ended, run_ranks(*words, SHORT)]

    return once("struck_evaluations", make)


@pytest.fixture(scope="module")
def found(struck: Any) -> list[dict[str, Any]]:
    """After each stroke: `state.json`, the student's checkpoints, the steps of its evaluations."""
    return list(json.loads((struck.folder / "found.json").read_text()))


@pytest.mark.parametrize(("stroke", "step"), [(0, 4), (1, 8)])
def test_in_training_no_step_is_lost(
    struck: Any, found: list[dict[str, Any]], stroke: int, step: int
) -> None:
    where = f"student, the evaluation at step {step}"
    assert found[stroke]["state"] == {"status": "stopped", "reason": "SIGTERM", "at": where}
    assert found[stroke]["checkpoints"][-1] == f"step-{step:08d}"
    assert step not in found[stroke]["dev"]
    assert f"step-{step:08d}" in struck.ended[stroke + 1].err  # where the next start goes on


def test_after_training_all_ranks_stop_before_any_is_killed(found: list[dict[str, Any]]) -> None:
    assert found[2]["state"] == {"status": "stopped", "reason": "SIGTERM", "at": None}


def test_it_ends_as_if_nothing_had_happened(
    struck: Any, peaceful: Any, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    struck.ended[-1].assert_done()
    mine, theirs = (scene.run_dir / "student" for scene in (struck, peaceful))
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()

    def curve(scene: Any) -> list[dict[str, Any]]:
        lines = [line for line in metrics(scene.run_dir) if line["stage"] == "student"]
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]

    def measured(scene: Any) -> dict[str, Any]:
        report = json.loads((scene.run_dir / "report" / "report.json").read_text())
        student = report["models"]["student"]
        return {key: value for key, value in student.items() if key not in TIMES}

    assert [line["step"] for line in curve(peaceful) if "dev_ce" in line] == [4, 8]
    assert curve(struck) == curve(peaceful)
    assert measured(struck) == measured(peaceful)
