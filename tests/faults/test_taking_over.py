"""A run dies in the training of a teacher that another run waits for: that one goes on with it.

One rank. The first run is halted while the second comes to wait for it, then killed. What nothing
happens to is made in this process.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.loading import load_job

pytestmark = pytest.mark.usefixtures("process_as_it_was")

STAGE, STEPS = "teachers/one", 300
TEACHER = (
    "teachers.0.training.epochs=1000",
    f"teachers.0.training.max_steps={STEPS}",
    "teachers.0.training.evaluate_every_steps=100",
    "teachers.0.training.checkpoint_every_steps=40",
    "teachers.0.training.micro_batch=auto",
    "teachers.0.training.log_every_steps=1",
)
OTHER = ("name=other", "student.model.num_layers=2")
TIMES = ("tokens_per_s", "flops_per_s", "mfu")


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines
        if line["stage"] == STAGE
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_run_that_waits_goes_on_where_the_dead_one_was(
    tmp_path: Path,
    smallest_job: Callable[..., Path],
    start: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    torch.set_num_threads(1)  # as in the processes
    job, runs = smallest_job(tmp_path / "job"), tmp_path / "runs"
    one, other, teachers = runs / "tiny-1", runs / "other", runs / "store" / "teachers"
    run = [Path(sys.executable).parent / "babyllama-ds", "run", job, "--runs", runs, *TEACHER]

    def checkpoints() -> list[Path]:
        return sorted(teachers.glob(".building-*/step-*"))

    dying = start([run])
    dying.wait_until(lambda: bool(checkpoints()), "a checkpoint")
    dying.signal_all(signal.SIGSTOP)
    waiting = start([[*run, *OTHER]])
    waiting.wait_until(lambda: "waiting for teachers/" in waiting.said(), "a wait")
    at_death = read(checkpoints()[-1] / "progress.json")
    assert at_death["step"] < STEPS
    dying.kill()  # SIGKILL, to all of its processes
    waited = waiting.end()
    waited.assert_done()

    # It did not begin again, and nobody could tell from the teacher.
    assert f"step-{at_death['step']:08d}" in waited.err.partition("going on from ")[2]
    assert f"{STAGE} was begun by tiny-1: going on with it" in waited.err
    first_told = re.search(rf"{STAGE}  step (\d+)/{STEPS}", waited.err)
    assert first_told is not None
    assert int(first_told[1]) == at_death["step"] + 1
    calm = run_job(load_job(job, list(TEACHER)), runs=tmp_path / "calm")
    weights = [(run_dir / STAGE / "model.safetensors").read_bytes() for run_dir in (other, calm)]
    assert weights[0] == weights[1]
    assert not list(teachers.glob(".building-*"))

    # What it tells is of the whole training.
    assert curve(metrics(other)) == curve(metrics(calm))
    board = EventAccumulator(str(other / "tensorboard" / STAGE), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
    summary = read(other / STAGE / "training.json")
    assert summary["runs"] == ["tiny-1", "other"]
    assert summary["train_tokens"] == read(calm / STAGE / "training.json")["train_tokens"]
    assert summary["seconds"] > at_death["seconds"] > 0
    assert (
        "one was trained in the runs tiny-1 and other, "
        in (other / "report" / "report.md").read_text()
    )

    # Each run found the micro-batch for itself, and here the same.
    for run_dir in (one, other):
        assert read(run_dir / "settled.json")[f"{STAGE} on 1 cpu ranks"]["micro_batch"] == 8

    # The dead one, started again, finds its teacher done, and what it told.
    assert curve(metrics(one))[-1]["step"] < STEPS
    run_job(load_job(job, list(TEACHER)), runs=runs)
    assert read(one / "state.json") == {"status": "done"}
    assert curve(metrics(one)) == curve(metrics(calm))
    assert (one / "student" / "model.safetensors").read_bytes() == (
        calm / "student" / "model.safetensors"
    ).read_bytes()
