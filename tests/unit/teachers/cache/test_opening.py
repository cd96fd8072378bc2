"""What is whole is kept, what is damaged is told and computed anew, what has no room is refused."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from babyllama_ds import files
from babyllama_ds.errors import MachineError, RunError, Stopped
from babyllama_ds.heartbeat import Heartbeat
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache import build, opening, tiers
from babyllama_ds.teachers.cache.layout import Layout
from babyllama_ds.teachers.cache.opening import KIND, CacheContext, Wanted, open_cache
from babyllama_ds.teachers.cache.records import Records
from babyllama_ds.teachers.cache.tiers import Room

LAYOUT = Layout(num_windows=23, record_bytes=16, forward_windows=2, shard_windows=4)
WANTED = Wanted(name="cache of teachers/a", key="abc", layout=LAYOUT, made_of={"holds": "numbers"})


class Numbers:
    """Computes the record of window w: its number, sixteen times. Remembers what it was asked."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[int] = []
        self.fail_at, self.error = fail_at, error
        self.made = 0

    def make(self) -> Callable[[NDArray[np.int64]], torch.Tensor]:
        self.made += 1
        return self.compute

    def compute(self, windows_B: NDArray[np.int64]) -> torch.Tensor:
        assert windows_B.shape == (2,), "another shape of a forward pass"
        if self.fail_at in windows_B:
            assert self.error is not None
            raise self.error
        self.asked += windows_B.tolist()
        return torch.from_numpy(windows_B).to(torch.uint8)[:, None].expand(-1, 16)


def assert_all_there(records: Records) -> None:
    expected = np.arange(23, dtype=np.uint8)[:, None].repeat(16, axis=1)
    assert np.array_equal(records.read(np.arange(23)).numpy(), expected)


@pytest.fixture
def context(tmp_path: Path) -> CacheContext:
    return CacheContext(
        store=Store(tmp_path),
        stop=StopRequest(),
        device=torch.device("cpu"),
        tier="disk",
        student_bytes=0,
    )


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return tmp_path / KIND / "abc"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / KIND / ".building-abc"


def shards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("shard-*"))


# -- made and found again --------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["disk", "host", "auto"])
def test_it_is_made_once(tier: Any, context: CacheContext, entry: Path, place: Path) -> None:
    context = replace(context, tier=tier)
    first, second = Numbers(), Numbers()
    assert_all_there(open_cache(WANTED, context, first.make))
    assert sorted(first.asked) == [0, *range(23)]  # the last pass is filled up with window 0
    assert_all_there(open_cache(WANTED, context, second.make))
    assert second.made == 0
    assert len(shards(entry)) == 6
    assert not place.exists()
    manifest = files.verify_manifest(entry)
    assert manifest.fingerprint == "abc"
    assert manifest.facts == {"stage": "cache of teachers/a", "holds": "numbers"}


def test_another_key_is_another_cache(context: CacheContext) -> None:
    first, second = Numbers(), Numbers()
    open_cache(WANTED, context, first.make)
    open_cache(replace(WANTED, key="abd"), context, second.make)
    assert sorted(second.asked) == sorted(first.asked)


def test_its_lock_is_held_while_it_is_made(context: CacheContext, place: Path) -> None:
    """Two runs with the same teachers make one cache, one after the other."""
    holder = place.parent / ".abc.lock.json"

    class Looking(Numbers):
        def compute(self, windows_B: NDArray[np.int64]) -> torch.Tensor:
            assert holder.exists(), "another run could write here too"
            return super().compute(windows_B)

    open_cache(WANTED, context, Looking().make)
    assert not holder.exists()


def test_signs_of_life_are_given_while_it_is_read_and_made(
    context: CacheContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them a warning says that a rank hangs."""
    told: list[str] = []
    monkeypatch.setattr(Heartbeat, "beat", lambda _, what: told.append(what))
    read = [f"reading shard {shard}" for shard in range(6)]
    open_cache(WANTED, context, Numbers().make)
    assert told == [*read, *["a forward pass"] * 12]
    told.clear()
    open_cache(WANTED, context, Numbers().make)
    assert told == read


def test_how_long_it_will_take_is_told(
    context: CacheContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Numbers):
        """Six seconds a pass, of which a shard has two."""

        now_s = 100.0

        def compute(self, windows_B: NDArray[np.int64]) -> torch.Tensor:
            self.now_s += 6
            return super().compute(windows_B)

    slow = Slow()
    monkeypatch.setattr(build, "time", SimpleNamespace(monotonic=lambda: slow.now_s))
    with caplog.at_level(logging.INFO, build.__name__):
        open_cache(WANTED, context, slow.make)
    assert [message for message in caplog.messages if "left" in message] == [
        f"cache of teachers/a, {made} of 6 shards, {12 * (6 - made)} s left" for made in range(1, 6)
    ]


# -- killed and stopped ----------------------------------------------------------------------------


def test_after_a_kill_only_the_missing_shards_are_computed(
    context: CacheContext, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError):  # stands for whatever ends the process
        open_cache(WANTED, context, Numbers(fail_at=13, error=ZeroDivisionError()).make)
    assert shards(place) == ["shard-00000.bin", "shard-00001.bin", "shard-00002.bin"]
    (place / ".tmp-shard-00003.bin-1-abc").write_bytes(b"half")  # of a writer that was killed
    again = Numbers()
    with caplog.at_level(logging.INFO, "babyllama_ds"):
        assert_all_there(open_cache(WANTED, context, again.make))
    assert min(set(again.asked) - {0}) == 12
    assert "computing 3 of 6 shards" in caplog.text
    assert "damaged" not in caplog.text
    assert not place.exists()


def test_it_goes_on_in_the_shape_in_which_it_was_begun(context: CacheContext) -> None:
    with pytest.raises(ZeroDivisionError):
        open_cache(WANTED, context, Numbers(fail_at=13, error=ZeroDivisionError()).make)
    other = replace(LAYOUT, forward_windows=4, shard_windows=8)
    assert_all_there(open_cache(replace(WANTED, layout=other), context, Numbers().make))


class StopsLater(StopRequest):
    """Asked to stop at the `after`th question of a kind."""

    def __init__(self, question: str, after: int) -> None:
        super().__init__()
        self._question, self._left = question, after

    def _asked(self, question: str) -> str | None:
        self._left -= question == self._question
        return "SIGTERM" if self._left < 0 else None

    def requested(self) -> str | None:
        return self._asked("check")

    def agreed(self) -> str | None:
        return self._asked("agreed")


@pytest.mark.parametrize(("question", "after", "kept"), [("agreed", 2, 2), ("check", 11, 2)])
def test_a_stop_request_is_obeyed_and_costs_a_shard_at_most(
    question: str, after: int, kept: int, context: CacheContext, place: Path
) -> None:
    """Between shards all ranks agree; within one a rank asks at each pass (and, before, at each
    of the six shards it examines)."""
    with pytest.raises(Stopped) as caught:
        open_cache(WANTED, replace(context, stop=StopsLater(question, after)), Numbers().make)
    assert (caught.value.reason, caught.value.exit_code) == ("SIGTERM", 143)
    if question == "agreed":
        assert caught.value.at == "cache of teachers/a, 2 of 6 shards"
    assert len(shards(place)) == kept
    again = Numbers()
    assert_all_there(open_cache(WANTED, context, again.make))
    assert len(again.asked) == 23 + 1 - kept * 4


# -- damage ----------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[21] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("damage", "what"),
    [(flip, "its checksum does not hold"), (cut, "50 bytes instead of 96")],
)
@pytest.mark.parametrize("whole", [True, False], ids=["finished", "half-built"])
@pytest.mark.parametrize("tier", ["disk", "host"])
def test_a_damaged_shard_is_told_by_name_and_computed_anew(
    damage: Callable[[Path], None],
    what: str,
    whole: bool,
    tier: Any,
    context: CacheContext,
    entry: Path,
    place: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if whole:
        open_cache(WANTED, context, Numbers().make)
    else:
        with pytest.raises(ZeroDivisionError):
            open_cache(WANTED, context, Numbers(fail_at=13, error=ZeroDivisionError()).make)
    path = (entry if whole else place) / "shard-00001.bin"
    damage(path)
    again = Numbers()
    with caplog.at_level(logging.INFO, "babyllama_ds"):
        assert_all_there(open_cache(WANTED, replace(context, tier=tier), again.make))
    assert f"{path} is damaged ({what}): computed anew" in caplog.text
    rest = [] if whole else [0, *range(12, 23)]
    assert sorted(again.asked) == sorted([4, 5, 6, 7, *rest])
    files.verify_manifest(entry)


def test_a_shard_that_was_taken_away_is_computed_anew(context: CacheContext, entry: Path) -> None:
    open_cache(WANTED, context, Numbers().make)
    (entry / "shard-00005.bin").unlink()
    again = Numbers()
    assert_all_there(open_cache(WANTED, context, again.make))
    assert again.asked == [20, 21, 22, 0]
    files.verify_manifest(entry)


def test_another_rounding_of_a_mended_shard_is_in_the_manifest(
    context: CacheContext, entry: Path
) -> None:
    """Computed anew on another device, a shard may differ in its last bits."""
    open_cache(WANTED, context, Numbers().make)
    flip(entry / "shard-00001.bin")

    class Rounded(Numbers):
        def compute(self, windows_B: NDArray[np.int64]) -> torch.Tensor:
            return super().compute(windows_B) + 1

    open_cache(WANTED, context, Rounded().make)
    assert files.verify_manifest(entry).facts == {"stage": WANTED.name, **WANTED.made_of}
    third = Numbers()
    open_cache(WANTED, context, third.make)
    assert third.made == 0


@pytest.mark.parametrize(
    "layout", [replace(LAYOUT, record_bytes=8), replace(LAYOUT, num_windows=9)]
)
def test_shards_of_another_layout_are_not_used(
    layout: Layout, context: CacheContext, entry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_cache(WANTED, context, Numbers().make)
    layout.write(entry)
    again = Numbers()
    assert_all_there(open_cache(WANTED, context, again.make))
    files.verify_manifest(entry)


# -- room ------------------------------------------------------------------------------------------


def rooms(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    roomy = Room(device=None, device_total=0, host=10**9, disk=10**10)
    monkeypatch.setattr(opening, "measure_room", lambda *_: replace(roomy, **changes))


@pytest.mark.parametrize("tier", ["auto", "host"])
def test_where_the_disk_has_no_room_it_is_kept_in_memory(
    tier: Any,
    context: CacheContext,
    entry: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rooms(monkeypatch, disk=1000)
    context = replace(context, tier=tier)
    with caplog.at_level(logging.INFO, "babyllama_ds"):
        assert_all_there(open_cache(WANTED, context, Numbers().make))
    assert "the disk has no room for it: it is kept in memory only" in caplog.text
    assert not entry.exists()
    assert shards(place) == []
    again = Numbers()
    assert_all_there(open_cache(WANTED, context, again.make))
    assert len(again.asked) == 24


def test_what_is_not_to_be_kept_is_not_written_and_yet_read_where_it_stands(
    context: CacheContext, entry: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleeting = replace(context, tier="auto", kept=False)
    with caplog.at_level(logging.INFO, "babyllama_ds"):
        assert_all_there(open_cache(WANTED, fleeting, Numbers().make))
    assert "it is kept in memory only, for this start" in caplog.text
    assert "no room" not in caplog.text
    assert not entry.exists()
    assert shards(place) == []
    open_cache(WANTED, context, Numbers().make)
    again = Numbers()
    assert_all_there(open_cache(WANTED, fleeting, again.make))
    assert again.asked == []


def test_what_the_disk_does_hold_is_used_in_memory_too(
    context: CacheContext, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies: of the first three shards the one in the middle was taken away."""
    with pytest.raises(ZeroDivisionError):
        open_cache(WANTED, context, Numbers(fail_at=13, error=ZeroDivisionError()).make)
    (place / "shard-00001.bin").unlink()
    rooms(monkeypatch, disk=1000)
    again = Numbers()
    assert_all_there(open_cache(WANTED, replace(context, tier="auto"), again.make))
    assert sorted(again.asked) == [0, *range(4, 8), *range(12, 23)]


@pytest.mark.parametrize("tier", ["disk", "host", "auto"])
def test_what_fits_nowhere_is_refused_before_a_teacher_is_loaded(
    tier: Any, context: CacheContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms(monkeypatch, disk=1000, host=300)
    numbers = Numbers()
    with pytest.raises(MachineError, match=r"expected 368 bytes "):
        open_cache(WANTED, replace(context, tier=tier), numbers.make)
    assert numbers.made == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_says_how_much_is_needed_and_keeps_what_is_written(
    number: int, context: CacheContext, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write_atomic

    def full(path: Path, data: bytes | str) -> None:
        if path.name == "shard-00003.bin":
            error = OSError(number, os.strerror(number))
            raise files.cannot_write(path, error) from error
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        with pytest.raises(RunError) as caught:
            open_cache(WANTED, context, Numbers().make)
    (problem,) = caught.value.problems
    assert problem.where == f"cache of teachers/a: {place}"
    assert problem.got.endswith(" bytes free on this disk")
    # Shards 3, 4 and 5: eleven records of sixteen bytes.
    assert problem.expected == "176 bytes for the shards that are missing"
    assert "what is written stays and is used" in (problem.hint or "")
    assert len(shards(place)) == 3
    again = Numbers()
    assert_all_there(open_cache(WANTED, context, again.make))
    assert min(set(again.asked) - {0}) == 12


def test_another_trouble_of_the_disk_is_told_as_it_is(
    context: CacheContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, data: bytes | str) -> None:
        error = OSError(errno.EIO, "Input/output error")
        raise files.cannot_write(path, error) from error

    Layout.write(LAYOUT, Store(context.store.root).building_place(KIND, "abc"))
    monkeypatch.setattr(files, "write_atomic", broken)
    with pytest.raises(RunError, match="EIO"):
        open_cache(WANTED, context, Numbers().make)


def test_a_memory_must_hold_all_and_the_disk_what_it_lacks(
    context: CacheContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shards of six stand, with 192 of 368 bytes."""
    with pytest.raises(ZeroDivisionError):
        open_cache(WANTED, context, Numbers(fail_at=13, error=ZeroDivisionError()).make)
    rooms(monkeypatch, disk=tiers.DISK_SPARED_BYTES + 175)
    with pytest.raises(MachineError, match="expected 176 bytes on the disk"):
        open_cache(WANTED, context, Numbers().make)
    rooms(monkeypatch, disk=tiers.DISK_SPARED_BYTES + 176, host=367)
    with pytest.raises(MachineError, match="expected 368 bytes "):
        open_cache(WANTED, replace(context, tier="host"), Numbers().make)
    assert_all_there(open_cache(WANTED, context, Numbers().make))
    with pytest.raises(MachineError, match="expected 368 bytes "):
        open_cache(WANTED, replace(context, tier="host"), Numbers().make)


@pytest.mark.parametrize(("student_bytes", "where"), [(10**8, "device"), (10**9, "host")])
def test_a_device_that_the_student_will_fill_holds_none(
    student_bytes: int,
    where: str,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rooms(monkeypatch, device=10**9, device_total=10**9)
    context = replace(context, tier="auto", student_bytes=student_bytes)
    with caplog.at_level(logging.INFO, opening.__name__):
        assert_all_there(open_cache(WANTED, context, Numbers().make))
    assert f"read in the {where}'s memory" in caplog.text


def test_the_spared_disk_is_left(context: CacheContext, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms(monkeypatch, disk=tiers.DISK_SPARED_BYTES + 368, host=0)
    open_cache(WANTED, context, Numbers().make)
    rooms(monkeypatch, disk=tiers.DISK_SPARED_BYTES + 367, host=0)
    with pytest.raises(MachineError):
        open_cache(replace(WANTED, key="abd"), context, Numbers().make)
