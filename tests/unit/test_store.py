"""Entries are made once and whole. Other processes are real ones."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.errors import DataError, RunError, Stopped
from babyllama_ds.files import read_json, read_manifest, verify_manifest
from babyllama_ds.store import Store, link_entry

LIMIT_S = 30  # no test waits longer for another process

Start = Callable[..., Any]


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
    entry = store.build("tokens", "abc", make)
    assert entry == tmp_path / "tokens" / "abc"
    assert store.build("tokens", "abc", make) == entry == store.find("tokens", "abc")
    assert len(calls) == 1
    manifest = verify_manifest(entry)
    assert (manifest.fingerprint, manifest.facts) == ("abc", {})
    assert everything_below(tmp_path / "tokens") == [
        ".abc.lock",
        "abc/manifest.json",
        "abc/words.txt",
    ]


def test_an_entry_that_was_damaged_since_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find_whole("tokens", "abc") is None
    entry = store.build("tokens", "abc", write_words)
    assert store.find_whole("tokens", "abc") == entry
    (entry / "words.txt").write_text("milk\nshoo\n")
    for ask in (store.find_whole, lambda *words: store.build(*words, write_words)):
        with pytest.raises(RunError, match="made anew") as caught:
            ask("tokens", "abc")
        assert caught.value.problems[0].where == str(entry / "words.txt")


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
    with pytest.raises(RunError, match=r"choose another directory \(for runs: --runs\)"):
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
    tmp_path: Path, start_python: Start, caplog: pytest.LogCaptureFixture
) -> None:
    first = start_python(BUILD, tmp_path, "first")
    assert [first.line(), first.line()] == ["starting", "making"]
    second = start_python(BUILD, tmp_path, "second")
    assert second.line() == "starting"

    waits: list[int] = []
    done = threading.Event()

    def while_waiting() -> None:
        waits.append(1)
        if len(waits) == 3:
            first.say("go")
            done.set()

    caplog.set_level(logging.INFO)
    entry = Store(tmp_path, while_waiting=while_waiting).build("tokens", "abc", pytest.fail)
    assert done.is_set()
    assert (entry / "maker").read_text() == "first"
    assert [first.line(), second.line()] == ["first", "first"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1, "the holder is named once"
    assert f"pid {first.pid} on host {socket.gethostname()} since 20" in messages[0]


def test_waiting_ends_when_asked_to_stop(tmp_path: Path, start_python: Start) -> None:
    first = start_python(BUILD, tmp_path, "first")
    assert [first.line(), first.line()] == ["starting", "making"]

    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        Store(tmp_path, while_waiting=stop).build("tokens", "abc", write_words)


def test_killed_builder_leaves_no_entry_and_is_succeeded(
    tmp_path: Path, start_python: Start
) -> None:
    first = start_python(BUILD, tmp_path, "first")
    assert [first.line(), first.line()] == ["starting", "making"]
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
    with pytest.raises(RunError, match=r"choose another directory \(for runs: --runs\)"):
        link_entry(entry, entry / "words.txt" / "link")
