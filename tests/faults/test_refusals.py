"""What two ranks do with a job that cannot go on: one clear error, exit status 2, nothing left.

The first through the real launcher, whose exit status is a rank's; most of the others on ranks
started without it, which takes half the time.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch


def assert_refused(ended: Any, runs: Path, *words: str) -> None:
    """Told once, by one rank, with everything a person needs; nothing half-written."""
    assert ended.code == 2, ended.err
    assert ended.out.replace("[ERROR]", "").count("error") == 0, ended.out
    assert ended.err.count("error: ") == 1, ended.err
    for word in ("got ", "expected ", "hint: ", *words):
        assert ended.err.count(word) == 1, f"{word!r} in\n{ended.err}"
    assert "Traceback" not in ended.err
    assert [path for path in runs.rglob("*") if ".tmp" in path.name] == []
    assert list(runs.rglob("*.lock.json")) == []


def test_run_directory_of_another_job(
    tmp_path: Path, finished: Any, launch: Callable[..., Any]
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished.runs, runs, symlinks=True)
    before = sorted(path.relative_to(runs) for path in runs.rglob("*"))
    job_before = (runs / "tiny-1" / "job.yaml").read_bytes()
    ended = launch(finished.job, "--runs", runs, "student.training.learning_rate=1e-3")
    assert_refused(ended, runs, "student.training.learning_rate", "0.015", "0.001")
    assert (runs / "tiny-1" / "job.yaml").read_bytes() == job_before
    assert sorted(path.relative_to(runs) for path in runs.rglob("*")) == before
    # The finished run is still finished.
    assert json.loads((runs / "tiny-1" / "state.json").read_text()) == {"status": "done"}


def test_batch_that_the_ranks_do_not_divide(
    tmp_path: Path, tiny_job: Callable[..., Path], run_ranks: Callable[..., Any]
) -> None:
    ended = run_ranks(
        tiny_job(tmp_path), "--runs", tmp_path / "runs", "student.training.batch_windows=9"
    )
    assert_refused(ended, tmp_path / "runs", "student.training.batch_windows: got 9", "2 ranks")
    assert not list(tmp_path.rglob("*.safetensors")), "refused before any training"


def test_bytes_that_are_not_utf8(
    tmp_path: Path, tiny_job: Callable[..., Path], run_ranks: Callable[..., Any]
) -> None:
    job = tiny_job(tmp_path)
    lines = (tmp_path / "town.train").read_bytes().splitlines(keepends=True)
    lines[40:40] = [b"a caf\xe9 in town\n"]
    (tmp_path / "town.train").write_bytes(b"".join(lines))
    offset = len(b"".join(lines[:40])) + len(b"a caf")
    ended = run_ranks(job, "--runs", tmp_path / "runs")
    assert_refused(
        ended, tmp_path / "runs", f"{tmp_path}/town.train", f"byte 0xE9 at offset {offset}"
    )
    state = json.loads((tmp_path / "runs" / "tiny-1" / "state.json").read_text())
    assert state["status"] == "failed"
    assert f"offset {offset}" in state["error"]
    assert not list((tmp_path / "runs").rglob("manifest.json"))


def test_attention_that_the_machine_lacks(
    tmp_path: Path, tiny_job: Callable[..., Path], run_ranks: Callable[..., Any]
) -> None:
    override = "student.model.attention=flash_attention_2"
    ended = run_ranks(tiny_job(tmp_path), "--runs", tmp_path / "runs", override)
    assert_refused(
        ended, tmp_path / "runs", "student.model.attention", "flash_attention_2", "device is cpu"
    )
    assert not list(tmp_path.rglob("*.safetensors")), "refused before any training"


def test_run_directory_in_use(
    tmp_path: Path,
    tiny_job: Callable[..., Path],
    start_launcher: Callable[..., Any],
    run_ranks: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """And the holder, ended by a Ctrl-C at its terminal, leaves in order."""
    run = tmp_path / "runs" / "tiny-1"
    first = "teachers.0.training"
    words = (
        tiny_job(tmp_path),
        "--runs",
        tmp_path / "runs",
        *(f"{first}.epochs=100000", f"{first}.max_steps=1000000"),
        *(f"{first}.evaluate_every_steps=1000", f"{first}.checkpoint_every_steps=null"),
        "deepspeed.compile=none",  # so long a training would be compiled first
    )
    holder = start_launcher(*words)
    holder.wait_until(lambda: bool(metrics(run)), "a step")
    pid = holder.pid_of("--local_rank=0")

    refused = run_ranks(*words)
    assert refused.code == 2, refused.err
    assert refused.err.count("error: ") == 1
    assert f"in use by pid {pid} on host" in refused.err
    assert "Traceback" not in refused.err
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["pid"]) == ("running", pid)

    seen = metrics(run)[-1]["step"]
    holder.signal_all(signal.SIGINT)
    ended = holder.end()
    checkpoints = (tmp_path / "runs" / "store" / "teachers").glob(".building-*/step-*")
    newest = max(int(folder.name.removeprefix("step-")) for folder in checkpoints)
    assert newest >= seen
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["at"]) == ("stopped", f"teachers/gpt2, step {newest}")
    assert state["reason"] in ("SIGINT", "SIGTERM")  # the launcher, interrupted, terminates ranks
    assert ended.err.count(f"stopped ({state['reason']}, at {state['at']})") == 1
    assert "launcher/run.py" not in ended.err  # no trace of ours beside the launcher's own
    assert list((tmp_path / "runs").rglob("*.lock.json")) == []
