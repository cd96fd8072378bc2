"""A job of the user's, run on this card as `make distill` would: `--job JOB KEY=VALUE …`.

What is measured of its models is in its report; here stands whether it went to its end. Its runs
stay in the folder that RUNS names (default: runs). Before the time is up it is asked to stop, early
enough for a checkpoint of its largest model; started again, it goes on. Its report, metrics and job
as far as they have come lie in the proof's folder, under `experiment/`, after every start.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from babyllama_ds.errors import UserError
from babyllama_ds.export.results import collect_results
from babyllama_ds.models.sizes import model_sizes
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from gpu.measures import Measure, holds, told
from gpu.parts.runs import environment

STEP_S = 15.0
"""For the step, or the batch of an evaluation, that is under way."""
COLLECT_S = 15.0
"""For the report."""
CHECKPOINT_BYTES = 14
"""Of a parameter: its master and moments in fp32, the best weights in bf16."""
BYTES_A_SECOND = 3e8
"""Taken to be written and hashed at least; not measured."""
STOPPED = 128 + signal.SIGTERM
LEAST_S = 60.0
"""A run is not started with less time than this before it would be stopped."""


def measure(device: torch.device, *, small: bool, job: Sequence[str]) -> Iterator[Measure]:
    started = time.monotonic()
    runs = Path(os.environ.get("RUNS", "runs"))
    overrides = [*job[1:], f"deepspeed.device={device.type}"]
    spec = load_job(find_job(job[0]), overrides)
    until_s = float(os.environ.get("GPU_PROOF_UNTIL", "inf"))
    left_s = until_s - time.time() - stopping_s(spec)
    if left_s < (1 if small else LEAST_S):
        _go_on(f"{left_s:.0f} s are too few to start {spec.run_name}")
        return
    words = [sys.executable, "-m", "babyllama_ds.cli", "run", job[0], *overrides]
    process = subprocess.Popen([*words, "--runs", str(runs)], env=environment())
    begun = time.monotonic()
    code = end_within(process, left_s, grace_s=stopping_s(spec) - COLLECT_S)
    asked = time.monotonic() - begun >= left_s
    yield told("seconds of this start", time.monotonic() - started)
    yield told("results", _collect(runs / spec.run_name))
    if is_to_go_on(code, asked=asked):
        _go_on(f"{spec.run_name} {_left(runs / spec.run_name, killed=code != STOPPED)}")
    else:
        yield holds(f"{job[0]} ran to its end", code == 0, f"status {code}")


def stopping_s(job: JobSpec) -> float:
    """Seconds that stopping takes: a step, a checkpoint of the largest model, the report."""
    vocab_size = getattr(job.tokenizer, "vocab_size", 32_000)
    specs = [job.student.model, *(teacher.model for teacher in job.teachers)]
    largest = max(model_sizes(spec, vocab_size, where="model").params for spec in specs)
    return STEP_S + COLLECT_S + largest * CHECKPOINT_BYTES / BYTES_A_SECOND


def end_within(process: subprocess.Popen[bytes], seconds: float, *, grace_s: float) -> int:
    """The process's status; after so long it is asked to stop, and killed if it does not."""
    try:
        return process.wait(None if math.isinf(seconds) else max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()  # it goes on from its last checkpoint
        return process.wait()


def is_to_go_on(code: int, *, asked: bool) -> bool:
    """Whether a run was stopped; one killed before it was asked, for want of memory say, failed."""
    return code == STOPPED or (asked and code == -signal.SIGKILL)


def _collect(run_dir: Path) -> str:
    """The results so far, beside the proof's own files; whatever is wrong with them is told."""
    folder = os.environ.get("GPU_PROOF_OUT")
    if folder is None:
        return "not collected: no folder was named"
    target = Path(folder) / "experiment"
    shutil.rmtree(target, ignore_errors=True)
    try:
        collect_results(run_dir, target)
    except UserError as error:
        return f"not collected: {error}"
    return str(target)


def _left(run_dir: Path, *, killed: bool) -> str:
    """Where the run says that it was stopped: in a training. One killed before could not say it."""
    at = None
    with suppress(OSError, ValueError):
        at = json.loads((run_dir / "state.json").read_text(encoding="utf-8")).get("at")
    if at is None and killed:
        return "was killed, since it did not stop in time: it goes on from its last checkpoint"
    return f"is at {at}" if at else "was stopped between trainings, or in what follows them"


def _go_on(why: str) -> None:
    print(json.dumps({"unfinished": why}), flush=True)
