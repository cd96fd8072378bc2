"""Entries are made once and whole; locks outlive nobody. Other processes are real ones."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from babyllama_ds import store as store_module
from babyllama_ds.errors import DataError, RunError, Stopped
from babyllama_ds.files import read_json, read_manifest, verify_manifest
from babyllama_ds.store import RunLock, Store, link_entry

LIMIT_S = 30  # no test waits longer for another process

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python process on `code` with string arguments; all are killed in the end."""
    processes: list[subprocess.Popen[str]] = []

    def start_process(code: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_process
    for process in processes:
        process.kill()
        process.communicate(timeout=LIMIT_S)


def line(process: subprocess.Popen[str]) -> str:
    """The next line it prints; "" at its end."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def write_words(directory: Path) -> None:
    (directory / "words.txt").write_text("milk\nshoe\n")


def everything_below(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


# -- entries ------------------------------------------------------------------------------------


def test_build_makes_an_entry_once_with_its_manifest(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []

    def make(directory: Path) -> None:
        calls.append(directory)
        assert store.find("tokens", "abc") is None  # unseen until it is whole
        write_words(directory)

    assert store.find("tokens", "abc") is None
    entry = store.build("tokens", "abc", make, {"words": 2})
    assert entry == tmp_path / "tokens" / "abc"
    assert store.build("tokens", "abc", make) == entry == store.find("tokens", "abc")
    assert len(calls) == 1
    manifest = verify_manifest(entry)
    assert (manifest.fingerprint, manifest.facts) == ("abc", {"words": 2})
    assert everything_below(tmp_path / "tokens") == [
        ".abc.lock",
        "abc/manifest.json",
        "abc/words.txt",
    ]


def test_failed_make_leaves_nothing_and_its_error_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    error = DataError.of("corpus", got="nothing", expected="text")

    def fail(directory: Path) -> None:
        write_words(directory)
        raise error

    with pytest.raises(DataError) as caught:
        store.build("tokens", "abc", fail)
    assert caught.value is error
    assert everything_below(tmp_path) == ["tokens/.abc.lock"]
    store.build("tokens", "abc", write_words)  # and the lock is free


def test_full_disk_in_make_is_a_run_error(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unreadable(directory: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "corpus.txt")

    with pytest.raises(RunError, match="free some space"):
        Store(tmp_path).build("tokens", "abc", fill)
    with pytest.raises(PermissionError):  # not a write of ours: for `make` to explain
        Store(tmp_path).build("tokens", "abc", unreadable)


@pytest.mark.parametrize("junk", ["no manifest", "another fingerprint"])
def test_incomplete_entry_is_not_found_and_is_replaced(tmp_path: Path, junk: str) -> None:
    store = Store(tmp_path)
    entry = tmp_path / "tokens" / "abc"
    entry.mkdir(parents=True)
    (entry / "stale").write_text("stale")
    if junk == "another fingerprint":
        (entry / "manifest.json").write_text('{"fingerprint": "abd", "files": {}}')
    assert store.find("tokens", "abc") is None
    store.build("tokens", "abc", write_words)
    assert sorted(path.name for path in entry.iterdir()) == ["manifest.json", "words.txt"]
    assert sorted(path.name for path in entry.parent.iterdir()) == [".abc.lock", "abc"]


def test_garbled_manifest_is_told_not_rebuilt(tmp_path: Path) -> None:
    entry = Store(tmp_path).build("tokens", "abc", write_words)
    (entry / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json: got text that is not JSON"):
        Store(tmp_path).find("tokens", "abc")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a@b"])
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="not a plain name"):
        Store(tmp_path).find("tokens", name)
    with pytest.raises(AssertionError, match="not a plain name"):
        Store(tmp_path).find(name, "abc")


def test_unwritable_root_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another --runs directory"):
        Store(tmp_path / "file" / "store").build("tokens", "abc", write_words)


def test_work_of_many_hands_is_published_under_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock("teachers", "abc"):
        holder = read_json(tmp_path / "teachers" / ".abc.lock.json")
        assert holder["pid"] == os.getpid()
        directory = store.new_directory("teachers", "abc")
        write_words(directory)
        entry = store.publish("teachers", "abc", directory, {"steps": 7})
    manifest = read_manifest(entry)
    assert manifest is not None
    assert manifest.facts == {"steps": 7}
    assert everything_below(tmp_path / "teachers") == [
        ".abc.lock",
        "abc/manifest.json",
        "abc/words.txt",
    ]


def test_lock_cleans_its_own_entrys_leftovers_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("abc", "abc-2"):
        write_words(store.new_directory("tokens", key))
    with store.lock("tokens", "abc"):
        left = sorted(path.name for path in (tmp_path / "tokens").glob(".tmp-*"))
        assert left == [f".tmp-abc-2@{os.getpid()}"]


# -- entries and other processes ----------------------------------------------------------------

BUILD = """
import sys
from pathlib import Path
from babyllama_ds.store import Store

def make(directory):
    (directory / "half").write_text("half")
    print("making", flush=True)
    assert sys.stdin.readline() == "go\\n"
    (directory / "maker").write_text(sys.argv[2])

print("starting", flush=True)
entry = Store(Path(sys.argv[1])).build("tokens", "abc", make)
print((entry / "maker").read_text(), flush=True)
"""


def test_of_two_builders_one_makes_and_the_other_waits(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(BUILD, tmp_path, "first")
    assert [line(first), line(first)] == ["starting", "making"]
    second = start(BUILD, tmp_path, "second")
    assert line(second) == "starting"

    waits: list[int] = []
    done = threading.Event()

    def while_waiting() -> None:
        waits.append(1)
        if len(waits) == 3:
            say(first, "go")
            done.set()

    caplog.set_level(logging.INFO)
    entry = Store(tmp_path, while_waiting=while_waiting).build("tokens", "abc", pytest.fail)
    assert done.is_set()
    assert (entry / "maker").read_text() == "first"
    assert [line(first), line(second)] == ["first", "first"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1, "the holder is named once"
    assert f"pid {first.pid} on host {socket.gethostname()} since 20" in messages[0]


def test_waiting_ends_when_asked_to_stop(tmp_path: Path, start: Start) -> None:
    first = start(BUILD, tmp_path, "first")
    assert [line(first), line(first)] == ["starting", "making"]

    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        Store(tmp_path, while_waiting=stop).build("tokens", "abc", write_words)


def test_killed_builder_leaves_no_entry_and_is_succeeded(tmp_path: Path, start: Start) -> None:
    first = start(BUILD, tmp_path, "first")
    assert [line(first), line(first)] == ["starting", "making"]
    first.kill()
    first.wait(timeout=LIMIT_S)
    assert list((tmp_path / "tokens").glob(".tmp-abc@*/half"))
    store = Store(tmp_path)
    assert store.find("tokens", "abc") is None
    store.build("tokens", "abc", write_words)
    assert everything_below(tmp_path / "tokens") == [
        ".abc.lock",
        "abc/manifest.json",
        "abc/words.txt",
    ]


# -- work of many parts ---------------------------------------------------------------------------


def test_a_building_place_survives_its_holder_and_is_published_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock("caches", "abc"):
        place = store.building_place("caches", "abc")
        (place / "part-1").write_text("one")
        (place / ".tmp-part-2").write_text("ha")  # what a kill leaves
    assert store.find("caches", "abc") is None
    with store.lock("caches", "abc"):
        again = store.building_place("caches", "abc")
        assert again == place
        assert [path.name for path in again.iterdir()] == ["part-1"]
        (again / "part-2").write_text("two")
        entry = store.publish("caches", "abc", again, {"parts": 2})
    assert store.find("caches", "abc") == entry
    assert not place.exists()
    assert verify_manifest(entry).facts == {"parts": 2}


def test_a_resumable_build_finds_what_it_left(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(directory: Path) -> None:
        (directory / "part-1").write_text("one")
        raise InterruptedError("stop")

    def go_on(directory: Path) -> None:
        assert [path.name for path in directory.iterdir()] == ["part-1"]
        (directory / "part-2").write_text("two")

    for _ in range(2):
        with pytest.raises(InterruptedError):
            store.build("tokens", "abc", fail, resumable=True)
    entry = store.build("tokens", "abc", go_on, resumable=True)
    assert store.find("tokens", "abc") == entry
    assert set(verify_manifest(entry).files) == {"part-1", "part-2"}


def test_a_place_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("a file")
    with pytest.raises(RunError, match="expected a place that can be written"):
        Store(tmp_path).building_place("caches", "abc")


# -- links --------------------------------------------------------------------------------------


def test_link_is_relative_and_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs" / "store")
    one = store.build("tokens", "one", write_words)
    two = store.build("tokens", "two", write_words)
    link = tmp_path / "runs" / "job" / "tokens"
    link_entry(one, link)
    assert link.readlink() == Path("../store/tokens/one")
    link_entry(two, link)
    assert link.resolve() == two
    assert [path.name for path in link.parent.iterdir()] == ["tokens"]
    (tmp_path / "runs").rename(tmp_path / "moved")  # relative: it still leads there
    assert (tmp_path / "moved" / "job" / "tokens" / "words.txt").is_file()


def test_link_through_a_linked_folder_leads_to_the_entry(tmp_path: Path) -> None:
    entry = Store(tmp_path / "store").build("tokens", "one", write_words)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "short").symlink_to(tmp_path / "deep" / "er")
    link_entry(entry, tmp_path / "short" / "tokens")
    assert (tmp_path / "short" / "tokens").resolve() == entry


def test_dangling_link_is_replaced_but_a_real_folder_is_not(tmp_path: Path) -> None:
    entry = Store(tmp_path / "store").build("tokens", "one", write_words)
    (tmp_path / "link").symlink_to("nowhere")
    link_entry(entry, tmp_path / "link")
    assert (tmp_path / "link").resolve() == entry
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="got a file or folder of its own"):
        link_entry(entry, tmp_path / "folder")
    with pytest.raises(RunError, match="choose another --runs directory"):
        link_entry(entry, entry / "words.txt" / "link")


# -- the run's lock -----------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from babyllama_ds.store import RunLock

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


def test_live_holder_is_named_and_unharmed(tmp_path: Path, start: Start) -> None:
    holder = start(HOLD, tmp_path)
    assert line(holder) == "held"
    with pytest.raises(RunError) as caught, RunLock(tmp_path):
        pass
    (problem,) = caught.value.problems
    started = read_json(tmp_path / ".lock.json")["started"]
    assert problem.where == str(tmp_path)
    assert problem.got == f"in use by pid {holder.pid} on host {socket.gethostname()} since " + (
        started
    )
    assert problem.expected == "a free run directory"
    say(holder, "leave")
    assert line(holder) == "free"
    with RunLock(tmp_path):
        pass


def test_killed_holder_is_taken_over_and_cleaned_up_after(tmp_path: Path, start: Start) -> None:
    holder = start(HOLD, tmp_path)
    assert line(holder) == "held"
    (tmp_path / ".tmp-state.json-1-ab").write_text("half")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=LIMIT_S)
    assert read_json(tmp_path / ".lock.json")["pid"] == holder.pid  # it could not tidy up
    with RunLock(tmp_path):
        assert read_json(tmp_path / ".lock.json")["pid"] == os.getpid()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock.json"]


def test_orphaned_holder_is_waited_for(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = start("")  # gone, but not collected by its parent until `wait`: a zombie counts
    holder = start(HOLD, tmp_path, launcher.pid)
    assert line(holder) == "held"
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
    polls: list[float] = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            say(holder, "leave")
            assert line(holder) == "free"

    monkeypatch.setattr(store_module.time, "sleep", sleep)
    with RunLock(tmp_path, orphan_wait_s=LIMIT_S):
        assert read_json(tmp_path / ".lock.json")["pid"] == os.getpid()
    assert len(polls) == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"pid {holder.pid}" in message
    assert "launcher is gone" in message


def test_orphaned_holder_that_never_stops_is_named(tmp_path: Path, start: Start) -> None:
    launcher = start("")
    launcher.wait(timeout=LIMIT_S)
    holder = start(HOLD, tmp_path, launcher.pid)
    assert line(holder) == "held"
    with (
        pytest.raises(RunError, match=f"end it with `kill {holder.pid}`"),
        RunLock(tmp_path, orphan_wait_s=0.3),
    ):
        pass


def test_orphan_on_another_host_is_not_waited_for(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = start("")
    launcher.wait(timeout=LIMIT_S)
    holder = start(HOLD, tmp_path, launcher.pid)
    assert line(holder) == "held"
    monkeypatch.setattr(store_module.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(store_module.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(RunError, match=f"in use by pid {holder.pid}"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", [None, "{", "[]", '{"pid": "x"}'])
def test_holder_that_did_not_name_itself(tmp_path: Path, start: Start, content: str | None) -> None:
    holder = start(HOLD, tmp_path)
    assert line(holder) == "held"
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
