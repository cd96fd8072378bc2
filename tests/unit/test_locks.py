"""Locks outlive nobody, and whoever holds one is named. Other processes are real ones."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from babyllama_ds import locks as module
from babyllama_ds.errors import RunError
from babyllama_ds.files import read_json
from babyllama_ds.locks import RunLock, scratch_folder
from babyllama_ds.store import Store

LIMIT_S = 30  # no test waits longer for another process

Start = Callable[..., Any]

HOLD = """
import sys
from pathlib import Path
from babyllama_ds.locks import RunLock, scratch_folder

launcher_pid = int(sys.argv[2]) if sys.argv[2:] else None
with RunLock(Path(sys.argv[1]), launcher_pid=launcher_pid):
    print("held", flush=True)
    sys.stdin.readline()
print("free", flush=True)
"""


def test_run_lock_names_itself_while_held(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "job"
    with RunLock(run_dir):
        holder = json.loads((run_dir / ".lock.json").read_text())
        assert holder["host"] == socket.gethostname()
        assert (holder["pid"], holder["launcher_pid"]) == (os.getpid(), os.getppid())
        assert holder["started"].endswith("+00:00")
    assert not (run_dir / ".lock.json").exists()
    with RunLock(run_dir):  # free again
        pass


def test_run_lock_is_freed_by_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with RunLock(tmp_path):
        pass


def test_run_lock_held_here_is_refused(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(RunError, match=f"in use by pid {os.getpid()} "),
        RunLock(tmp_path),
    ):
        pass


def test_live_holder_is_named_and_unharmed(tmp_path: Path, start_python: Start) -> None:
    holder = start_python(HOLD, tmp_path)
    assert holder.line() == "held"
    with pytest.raises(RunError) as caught, RunLock(tmp_path):
        pass
    (problem,) = caught.value.problems
    started = read_json(tmp_path / ".lock.json")["started"]
    assert problem.where == str(tmp_path)
    assert problem.got == f"in use by pid {holder.pid} on host {socket.gethostname()} since " + (
        started
    )
    assert problem.expected == "a free run directory"
    holder.say("leave")
    assert holder.line() == "free"
    with RunLock(tmp_path):
        pass


def test_killed_holder_is_taken_over_and_cleaned_up_after(
    tmp_path: Path, start_python: Start
) -> None:
    holder = start_python(HOLD, tmp_path)
    assert holder.line() == "held"
    (tmp_path / "evaluation").mkdir()
    for place in (tmp_path, tmp_path / "evaluation"):
        (place / ".tmp-state.json-1-ab").write_text("half")
    for kind in ("checkpoints", "milestones"):
        (tmp_path / kind / "student" / ".tmp-of-a-models-size").mkdir(parents=True)
    others = tmp_path.parent / "entry"
    others.mkdir()
    (others / ".tmp-of-another-process").touch()
    (tmp_path / "tokens").symlink_to(others)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=LIMIT_S)
    assert read_json(tmp_path / ".lock.json")["pid"] == holder.pid  # it could not tidy up
    with RunLock(tmp_path):
        assert read_json(tmp_path / ".lock.json")["pid"] == os.getpid()
        left = sorted(path.name for path in tmp_path.rglob("*"))
        folders = ["checkpoints", "evaluation", "milestones", "student", "student", "tokens"]
        assert left == [".lock", ".lock.json", *folders]
    assert (others / ".tmp-of-another-process").exists()


def test_orphaned_holder_is_waited_for(
    tmp_path: Path,
    start_python: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launcher = start_python(
        ""
    )  # gone, but not collected by its parent until `wait`: a zombie counts
    holder = start_python(HOLD, tmp_path, launcher.pid)
    assert holder.line() == "held"
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
    polls: list[float] = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            holder.say("leave")
            assert holder.line() == "free"

    monkeypatch.setattr(module.time, "sleep", sleep)
    with RunLock(tmp_path, orphan_wait_s=LIMIT_S):
        assert read_json(tmp_path / ".lock.json")["pid"] == os.getpid()
    assert len(polls) == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"pid {holder.pid}" in message
    assert "launcher is gone" in message


def test_orphaned_holder_that_never_stops_is_named(tmp_path: Path, start_python: Start) -> None:
    launcher = start_python("")
    launcher.wait(timeout=LIMIT_S)
    holder = start_python(HOLD, tmp_path, launcher.pid)
    assert holder.line() == "held"
    with (
        pytest.raises(RunError, match=f"end it with `kill {holder.pid}`"),
        RunLock(tmp_path, orphan_wait_s=0.3),
    ):
        pass


def test_orphan_on_another_host_is_not_waited_for(
    tmp_path: Path, start_python: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = start_python("")
    launcher.wait(timeout=LIMIT_S)
    holder = start_python(HOLD, tmp_path, launcher.pid)
    assert holder.line() == "held"
    monkeypatch.setattr(module.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(RunError, match=f"in use by pid {holder.pid}"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", [None, "{", "[]", '{"pid": "x"}'])
def test_holder_that_did_not_name_itself(
    tmp_path: Path, start_python: Start, content: str | None
) -> None:
    holder = start_python(HOLD, tmp_path)
    assert holder.line() == "held"
    (tmp_path / ".lock.json").unlink()
    if content is not None:
        (tmp_path / ".lock.json").write_text(content)
    with pytest.raises(RunError, match="in use by another process"), RunLock(tmp_path):
        pass


def test_unwritable_run_directory_is_a_run_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"choose another directory \(for runs: --runs\)"),
        RunLock(tmp_path / "file" / "job"),
    ):
        pass

    def refuse(*arguments: object, **settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match="EACCES") as caught, RunLock(tmp_path / "job"):
        pass
    assert caught.value.problems[0].where == str(tmp_path / "job")


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.parametrize("before", [True, False])
def test_a_file_system_without_locks_is_refused(
    reason: int, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file would be the lock by being there: a killed holder's, for ever."""
    if before:
        (tmp_path / ".lock").touch()

    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for entered in (RunLock(tmp_path), Store(tmp_path).lock("tokens", "abc")):
        with pytest.raises(RunError, match="mount it with flock"), entered:
            pytest.fail("it was locked")


def test_lock_is_freed_when_the_holder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(RunError, match="free some space") as caught, RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass
    assert caught.tb is not None  # it keeps the failed lock alive: nothing but us released it


SCRATCH = """
import sys
from pathlib import Path
from babyllama_ds.locks import scratch_folder

with scratch_folder(Path(sys.argv[1]), ".trial-") as folder:
    (folder / "weights").write_text("many")
    print(folder, flush=True)
    sys.stdin.readline()
"""


def test_a_killed_process_leaves_its_folder_to_the_next(
    tmp_path: Path, start_python: Start
) -> None:
    runs = tmp_path / "runs"
    living, killed = (start_python(SCRATCH, runs) for _ in range(2))
    theirs, abandoned = Path(living.line()), Path(killed.line())
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(timeout=LIMIT_S)
    (runs / ".trial-just-made").mkdir()
    assert (abandoned / "weights").exists()
    with scratch_folder(runs, ".trial-") as folder:
        assert folder.is_dir()
        there = {path.name for path in runs.iterdir()}
        assert there == {theirs.name, folder.name, ".trial-just-made"}
        assert (theirs / "weights").exists()
    assert not folder.exists()


def test_a_folder_that_is_taken_for_abandoned_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process tidies up between the moments in which a lock is made and taken."""
    real, tidied = module.try_lock, []

    def while_another_tidies_up(lock: Any) -> bool:
        if tidied:
            return real(lock)
        tidied.append(Path(lock.lock_file).parent)
        with FileLock(lock.lock_file):
            taken = real(lock)
            shutil.rmtree(tidied[0])
        return taken

    monkeypatch.setattr(module, "try_lock", while_another_tidies_up)
    with scratch_folder(tmp_path, ".trial-") as folder:
        assert folder.is_dir()
        assert list(tmp_path.iterdir()) == [folder]


def test_a_place_for_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"choose another directory \(for runs: --runs\)"),
        scratch_folder(tmp_path / "file" / "runs", ".trial-"),
    ):
        pytest.fail("it was made")
