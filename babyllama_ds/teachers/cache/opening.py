"""A cache, found or made: what it holds and where to keep it enter, records to read leave.

    the entry in the store, or its building place → examine → choose a tier → compute what is
    missing → records

The whole of it is a collective: every rank calls it, in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from babyllama_ds import files, ranks
from babyllama_ds.heartbeat import Heartbeat
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache import build
from babyllama_ds.teachers.cache.build import Compute, Whole, Work
from babyllama_ds.teachers.cache.layout import Layout, shard_path
from babyllama_ds.teachers.cache.records import FileRecords, MemoryRecords, Records
from babyllama_ds.teachers.cache.tiers import Choice, Need, choose_tier, measure_room

log = logging.getLogger(__name__)

KIND = "teacher_cache"


@dataclass(frozen=True, kw_only=True)
class CacheContext:
    """What a cache needs from its run."""

    store: Store
    """On each of the storages."""
    stop: StopRequest
    device: torch.device
    tier: Literal["auto", "device", "host", "disk"]
    student_bytes: int
    """What the student will take of the accelerator, without its activations."""
    kept: bool = True
    """Whether it is to be written to the store where there is room."""
    storages: Storages = field(default_factory=Storages)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be remembered."""

    name: str
    """What people see: `cache of teachers/gpt2`."""
    key: str
    layout: Layout
    """How it is laid out where nothing was begun yet."""
    made_of: dict[str, object]
    """Facts for the entry's manifest, for people."""
    in_step: bool = False
    """Whether ranks run their forward passes together, as those of a split teacher must."""


def open_cache(
    wanted: Wanted, context: CacheContext, make_compute: Callable[[], Compute]
) -> Records:
    """The records of all windows, verified; computed where they are missing.

    `make_compute` brings the teachers, and is called only if there is something to compute.

    Raises:
        MachineError: no room in the tier that was asked for, or in any.
        RunError: the disk is full, or does not let itself be written.
        Stopped: the run was asked to stop; the next start goes on.
    """
    lock = context.store.lock(KIND, wanted.key)
    with context.storages.held(lock), Heartbeat(wanted.name) as heartbeat:
        return _Opening(wanted, context, heartbeat).records(make_compute)


class _Opening:
    """One cache on its way, under its lock."""

    def __init__(self, wanted: Wanted, context: CacheContext, heartbeat: Heartbeat) -> None:
        self.wanted, self.context = wanted, context
        self.entry, self.place, layout = self._places()
        self.work = Work(
            name=wanted.name,
            layout=layout,
            stop=context.stop,
            storages=context.storages,
            alive=heartbeat.beat,
            in_step=wanted.in_step,
        )

    def records(self, make_compute: Callable[[], Compute]) -> Records:
        layout, device = self.work.layout, self.context.device
        of_each = build.examine(self.work, self.place)
        whole = build.whole_on_each(of_each)
        choice = self._choose(_lacking(layout, whole))
        if choice.kept:
            whole |= build.spread(self.work, self.place, of_each, _lacking(layout, whole))
        missing = _lacking(layout, whole)
        self._say(missing, choice)
        compute = make_compute() if missing else _nothing_to_compute
        if choice.kept and missing:
            whole |= build.make_files(self.work, self.place, missing, compute)
            missing = []
        if choice.kept:
            self._publish(whole)
        if choice.tier == "disk":
            return ranks.on_every_rank(lambda: FileRecords(self.place, layout, device=device))
        place = device if choice.tier == "device" else torch.device("cpu")
        memory = ranks.on_every_rank(lambda: MemoryRecords(layout, place=place, device=device))
        ranks.on_every_rank(lambda: build.load(layout, self.place, whole, memory))
        build.make_in_memory(self.work, memory, missing, compute)
        return memory

    def _places(self) -> tuple[Path | None, Path, Layout]:
        """The entry on this rank's storage, if there is one; where shards lie there, and how.

        They lie alike on every storage: as on the first where some were begun.
        """
        store, storages = self.context.store, self.context.storages

        def look() -> tuple[Path | None, Path, Layout | None]:
            entry = store.find(KIND, self.wanted.key)
            place = entry or store.building_place(KIND, self.wanted.key)
            layout = Layout.read(place)
            return entry, place, layout if layout and self._fits(layout) else None

        of_each = storages.on_each(look)
        begun = [layout for _, _, layout in of_each if layout is not None]
        layout = begun[0] if begun else self.wanted.layout
        entry, place, here = of_each[storages.mine]

        def lay_out() -> None:
            if here == layout:
                return
            if here is not None:  # its shards may be as long as these, and are of other windows
                for shard in range(here.num_shards):
                    shard_path(place, shard).unlink(missing_ok=True)
            layout.write(place)

        storages.on_each(lay_out)
        return entry, place, layout

    def _fits(self, layout: Layout) -> bool:
        """Whether a layout found is of the same records: a damaged one is not."""
        return (layout.num_windows, layout.record_bytes) == (
            self.wanted.layout.num_windows,
            self.wanted.layout.record_bytes,
        )

    def _choose(self, missing: list[int]) -> Choice:
        layout = self.work.layout
        need = Need(
            name=self.wanted.name,
            memory_bytes=layout.total_bytes,
            disk_bytes=build.bytes_of(layout, missing),
            student_bytes=self.context.student_bytes,
        )
        room = measure_room(self.place, self.context.device, self.context.storages)
        if not self.context.kept:
            room = replace(room, disk=0)  # what stands there whole is read all the same
        return ranks.on_rank_zero(lambda: choose_tier(self.context.tier, need, room))

    def _say(self, missing: list[int], choice: Choice) -> None:
        layout = self.work.layout
        where = {
            "device": "in the device's memory",
            "host": "in the host's memory",
            "disk": "in files, mapped into memory",
        }[choice.tier]
        log.info("%s: %.3f GB, read %s", self.wanted.name, layout.total_bytes / 1e9, where)
        if missing:
            shards = f"{len(missing)} of {layout.num_shards} shards"
            log.info("%s: computing %s", self.wanted.name, shards)
        if not choice.kept and ranks.rank() == 0:
            note = "it is kept in memory only, for this start"
            if self.context.kept:
                log.warning("%s: the disk has no room for it: %s", self.wanted.name, note)
            else:
                log.info("%s: %s", self.wanted.name, note)

    def _publish(self, whole: Whole) -> None:
        """Make the place an entry; of an entry that was mended, make its manifest true."""
        known = {shard_path(self.place, shard).name: facts for shard, facts in whole.items()}
        facts = {"stage": self.wanted.name, **self.wanted.made_of}

        def publish() -> Path:
            if self.entry is None:
                store = self.context.store
                return store.publish(KIND, self.wanted.key, self.place, facts, known)
            manifest = files.read_manifest(self.place)
            if manifest is None or any(
                manifest.files.get(name) != fact for name, fact in known.items()
            ):
                files.write_manifest(self.place, fingerprint=self.wanted.key, known=known, **facts)
            return self.place

        storages = self.context.storages
        self.place = storages.on_each(publish)[storages.mine]


def _lacking(layout: Layout, whole: Whole) -> list[int]:
    return sorted(set(range(layout.num_shards)) - whole.keys())


def _nothing_to_compute(_windows: object) -> torch.Tensor:
    raise AssertionError("every shard is there")
