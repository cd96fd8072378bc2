"""Locks outlive nobody, and whoever holds one is named. Other processes are real ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import locks as module
from babyllama_ds.errors import RunError
from babyllama_ds.files import read_json
from babyllama_ds.locks import RunLock

LIMIT_S = 30  # no test waits longer for another process

Start = Callable[..., Any]

HOLD = """
import sys
from pathlib import Path
from babyllama_ds.locks import RunLock

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
    (tmp_path / ".tmp-state.json-1-ab").write_text("half")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=LIMIT_S)
    assert read_json(tmp_path / ".lock.json")["pid"] == holder.pid  # it could not tidy up
    with RunLock(tmp_path):
        assert read_json(tmp_path / ".lock.json")["pid"] == os.getpid()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock.json"]


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
        pytest.raises(RunError, match="choose another --runs directory"),
        RunLock(tmp_path / "file" / "job"),
    ):
        pass

    def refuse(*arguments: object, **settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match="EACCES") as caught, RunLock(tmp_path / "job"):
        pass
    assert caught.value.problems[0].where == str(tmp_path / "job")


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
