"""The first memory that fits, or the one that was asked for; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from babyllama_ds import ranks
from babyllama_ds.errors import MachineError
from babyllama_ds.memory import available_host_bytes
from babyllama_ds.storages import Storages
from babyllama_ds.teachers.cache.tiers import (
    Choice,
    Need,
    Room,
    choose_tier,
    held_where_computed,
    measure_room,
)

GB = 10**9
NEED = Need(
    name="cache of teachers/a",
    memory_bytes=86 * GB,
    disk_bytes=86 * GB,
    student_bytes=GB,
)
# A card of 141 GB with the teacher gone, a small host, a full disk.
CARD = Room(device=139 * GB, device_total=141 * GB, host=60 * GB, disk=20 * GB)


def room(**changes: int | None) -> Room:
    return replace(CARD, **changes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (CARD, Choice("device", kept=False)),
        (room(disk=88 * GB), Choice("device", kept=True)),
        # 86 + 1 + a fifth of 141 is 115.2: more than is free.
        (room(device=115 * GB, host=110 * GB), Choice("host", kept=False)),
        (room(device=116 * GB, host=110 * GB), Choice("device", kept=False)),
        (room(device=80 * GB, disk=88 * GB), Choice("disk", kept=True)),
        (room(device=None, host=110 * GB), Choice("host", kept=False)),
        (room(device=None, host=100 * GB, disk=88 * GB), Choice("disk", kept=True)),
    ],
)
def test_auto_takes_the_first_that_fits(given: Room, expected: Choice) -> None:
    assert choose_tier("auto", NEED, given) == expected


@pytest.mark.parametrize(
    ("asked", "given", "sizes", "expected"),
    [
        ("auto", CARD, [50, 40], 90),
        ("auto", CARD, [80, 40], 80),  # the second finds 59 free, and a fifth of 141 and 1 spared
        ("auto", CARD, [40, 80], 40),
        ("auto", room(host=10 * GB), [120], 0),
        ("host", CARD, [20], 0),
        ("disk", CARD, [20], 0),
        ("device", CARD, [138], 138),
        ("device", room(device=None), [30], 30),
        ("auto", room(device=None), [30, 25], 30),
        ("auto", CARD, [], 0),
    ],
)
def test_what_caches_will_take_where_a_student_is_trained(
    asked: Literal["auto", "device", "host", "disk"],
    given: Room,
    sizes: list[int],
    expected: int,
) -> None:
    held = held_where_computed(asked, [size * GB for size in sizes], given, student_bytes=GB)
    assert held == expected * GB


def test_what_is_written_already_asks_for_no_disk() -> None:
    written = replace(NEED, disk_bytes=0)
    assert choose_tier("auto", written, room(disk=0)) == Choice("device", kept=True)
    assert choose_tier("disk", written, room(disk=0)) == Choice("disk", kept=True)


@pytest.mark.parametrize(
    ("asked", "given", "expected"),
    [
        # By name it may take all there is.
        ("device", room(device=86 * GB), Choice("device", kept=False)),
        ("host", room(host=86 * GB, disk=88 * GB), Choice("host", kept=True)),
        ("disk", room(disk=88 * GB), Choice("disk", kept=True)),
        # On a CPU device and host are the same memory.
        ("device", room(device=None, host=90 * GB), Choice("host", kept=False)),
    ],
)
def test_a_named_tier_is_taken(
    asked: Literal["device", "host", "disk"], given: Room, expected: Choice
) -> None:
    assert choose_tier(asked, NEED, given) == expected


@pytest.mark.parametrize(
    ("asked", "given", "got", "expected"),
    [
        (
            "device",
            room(device=85 * GB),
            "85,000,000,000 free in the device's memory",
            "86,000,000,000 bytes in the device's memory, for the cache of teachers/a",
        ),
        (
            "device",
            room(device=None),
            "60,000,000,000 free in the host's memory",
            "86,000,000,000 bytes in the host's memory",
        ),
        (
            "disk",
            CARD,
            "20,000,000,000 on the disk, of which 1,073,741,824 are spared",
            "86,000,000,000 bytes on the disk",
        ),
        (
            "auto",
            room(device=50 * GB),
            "50,000,000,000 free in the device's memory, 60,000,000,000 free in the host's "
            "memory, 20,000,000,000 on the disk",
            "86,000,000,000 bytes in the device's memory or in the host's memory or on the disk",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_bytes_needed_and_free(
    asked: Any, given: Room, got: str, expected: str
) -> None:
    with pytest.raises(MachineError) as caught:
        choose_tier(asked, NEED, given)
    (problem,) = caught.value.problems
    assert problem.where == "distillation.cache_tier"
    assert got in problem.got
    assert problem.expected.startswith(expected)
    assert "distillation.cache=topk" in (problem.hint or "")


def test_only_the_missing_shards_need_disk() -> None:
    partly = replace(NEED, disk_bytes=10 * GB)
    assert choose_tier("disk", partly, CARD) == Choice("disk", kept=True)
    with pytest.raises(MachineError, match=r"expected 30,000,000,000 bytes on the disk"):
        choose_tier("disk", replace(NEED, disk_bytes=30 * GB), CARD)


def test_room_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    found = measure_room(tmp_path, torch.device("cpu"), Storages())
    assert found.device is None
    assert found.disk > 0
    # Four ranks share the machine; other processes come and go in the meantime.
    assert found.host == pytest.approx(available_host_bytes() / 4, rel=0.2)


def test_what_torch_keeps_of_earlier_stages_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher was trained on the card before, whose memory torch has not given back."""
    kept = [60 * GB]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * GB - sum(kept), 80 * GB))
    found = measure_room(tmp_path, torch.device("cuda", 0), Storages())
    assert (found.device, found.device_total) == (70 * GB, 80 * GB)


def test_the_rank_and_the_disk_with_the_least_room_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank holds a copy, every storage a file: what fits one of them may not fit another."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * GB, 80 * GB))
    of_others = [(60 * GB, 3), (75 * GB, 2), (90 * GB, 4)]
    monkeypatch.setattr(ranks, "gather_objects", lambda own: [own, *of_others])
    disks: Any = SimpleNamespace(on_each=lambda free: [free(), 7, 8])
    found = measure_room(tmp_path, torch.device("cuda", 0), disks)
    assert found == Room(device=60 * GB, device_total=80 * GB, host=2, disk=7)
