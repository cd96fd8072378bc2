"""Computing the records: what is whole stays, the rest is made by all ranks, shard by shard.

Enters: a layout, a directory or memory, and how records are computed. Leaves: every shard. In a
round each rank makes one shard; between rounds the ranks agree on stopping and on errors, over
the control group, whose time-out is weeks. A kill costs the shards of a round.

Teachers that are split over ranks run on several at once. With one of these all ranks go in step:
as many forward passes in each round, a rank without work beside the others, and agreement after
every pass.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babyllama_ds import ranks
from babyllama_ds.errors import RunError
from babyllama_ds.files import FileFacts
from babyllama_ds.stopping import StopRequest, stopped
from babyllama_ds.teachers.cache.layout import (
    Layout,
    examine_shard,
    shard_path,
    write_shard,
)
from babyllama_ds.teachers.cache.records import MemoryRecords

log = logging.getLogger(__name__)

Compute = Callable[[NDArray[np.int64]], Tensor]
"""Window numbers, `forward_windows` of them, to their records [n, record_bytes] (uint8)."""

LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is being made, for whom, and who may stop it."""

    name: str
    """What people see: `cache of teachers/gpt2`."""
    layout: Layout
    stop: StopRequest
    in_step: bool = False
    """Whether ranks run their forward passes together, as those of a split teacher must."""


Whole = dict[int, FileFacts]
"""The shards that are there and undamaged."""


def examine(work: Work, directory: Path) -> Whole:
    """The whole shards of a directory; damaged ones are told by name. A collective.

    Every byte is read once, by all ranks together.
    """
    mine = range(ranks.rank(), work.layout.num_shards, ranks.world_size())

    def look() -> dict[int, FileFacts | str | None]:
        return {shard: _examined(work, directory, shard) for shard in mine}

    found = {}
    for of_rank in ranks.gather_objects(ranks.on_every_rank(look)):
        found.update(of_rank)
    for shard, what in sorted(found.items()):
        if isinstance(what, str) and ranks.rank() == 0:
            path = shard_path(directory, shard)
            log.warning("%s: %s is damaged (%s): computed anew", work.name, path, what)
    return {shard: what for shard, what in found.items() if isinstance(what, FileFacts)}


def make_files(work: Work, directory: Path, missing: list[int], compute: Compute) -> Whole:
    """Compute shards into files of `directory`. A collective.

    Raises:
        RunError: the disk is full, with the bytes needed and free; what is written stays.
        Stopped: the run was asked to stop; the next start goes on from what is written.
    """
    made: Whole = {}
    for shard in _rounds(work, missing):
        left = [number for number in missing if number not in made]
        mine = ranks.on_every_rank(partial(_write, work, directory, shard, left, compute))
        for of_rank in ranks.gather_objects(mine):
            made.update(of_rank)
    return made


def make_in_memory(work: Work, memory: MemoryRecords, missing: list[int], compute: Compute) -> None:
    """Compute shards and give them to every rank's `memory`; no disk takes part. A collective.

    Raises:
        Stopped: the run was asked to stop; the next start begins anew.
    """
    for shard in _rounds(work, missing):
        records = ranks.on_every_rank(partial(compute_shard, work, shard, compute))
        for source, theirs in enumerate(ranks.gather_objects(shard)):
            if theirs is not None:
                start = theirs * work.layout.shard_windows
                memory.put(start, _sent(work.layout, theirs, records, source))


def load(layout: Layout, directory: Path, shards: Whole, memory: MemoryRecords) -> None:
    """Put shards that stand in files into this rank's `memory`."""
    for shard in sorted(shards):
        content = np.fromfile(
            shard_path(directory, shard), np.uint8, count=layout.shard_bytes(shard)
        )
        records_NR = torch.from_numpy(content).view(-1, layout.record_bytes)
        memory.put(shard * layout.shard_windows, records_NR)


def compute_shard(work: Work, shard: int | None, compute: Compute) -> Tensor:
    """The records [n, record_bytes] of a shard, on the CPU; of none, no records.

    Every forward pass has `forward_windows` windows, the last one filled up with window 0: the
    same shape everywhere, so the same rounding. In step, every rank makes the passes of a whole
    shard.
    """
    layout = work.layout
    windows = np.empty(0, np.int64) if shard is None else layout.windows(shard)
    records = torch.empty(len(windows), layout.record_bytes, dtype=torch.uint8)
    size = layout.forward_windows
    passed = layout.shard_windows if work.in_step else len(windows)
    for start in range(0, passed, size):
        part = windows[start : start + size]
        filled = np.concatenate([part, np.zeros(size - len(part), np.int64)])
        records[start : start + size] = _passed(work, filled, compute)[: len(part)]
    return records


def _passed(work: Work, windows: NDArray[np.int64], compute: Compute) -> Tensor:
    """The records of one forward pass. In step it is a collective: ranks stop and fail together."""
    if not work.in_step:
        work.stop.check()
        return compute(windows)
    if (reason := work.stop.agreed()) is not None:
        raise stopped(reason, at=work.name)
    return ranks.on_every_rank(partial(compute, windows))


def _examined(work: Work, directory: Path, shard: int) -> FileFacts | str | None:
    work.stop.check()
    return examine_shard(directory, work.layout, shard)


def _rounds(work: Work, missing: list[int]) -> Iterator[int | None]:
    """This rank's shard of every round (none: there are fewer than ranks), with progress told."""
    started, line_at = time.monotonic(), time.monotonic()
    for first in range(0, len(missing), ranks.world_size()):
        place = f"{work.name}, {first} of {len(missing)} shards"
        if (reason := work.stop.agreed()) is not None:
            raise stopped(reason, at=place)
        if time.monotonic() - line_at >= LINE_EVERY_S:
            line_at = time.monotonic()
            left_s = (line_at - started) * (len(missing) - first) / first
            log.info("%s, %.0f s left", place, left_s)
        number = first + ranks.rank()
        yield missing[number] if number < len(missing) else None


def _write(
    work: Work,
    directory: Path,
    shard: int | None,
    left: list[int],
    compute: Compute,
) -> Whole:
    records = compute_shard(work, shard, compute)
    if shard is None:
        return {}
    try:
        return {shard: write_shard(directory, shard, records)}
    except RunError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(work, directory, bytes_of(work.layout, left)) from error
        raise


def no_room(work: Work, directory: Path, needed_bytes: int) -> RunError:
    """The error of a disk that the missing shards do not fit."""
    return RunError.of(
        f"{work.name}: {directory}",
        got=f"{shutil.disk_usage(directory).free:,} bytes free on this disk",
        expected=f"{needed_bytes:,} bytes for the shards that are missing",
        hint="free some space and start again (what is written stays and is used), choose another "
        "--runs directory, or set distillation.cache_tier=host, distillation.cache=topk or none",
    )


def bytes_of(layout: Layout, shards: list[int]) -> int:
    """Bytes of these shards' records."""
    return sum(layout.shard_bytes(shard) for shard in shards)


def _sent(layout: Layout, shard: int, own: Tensor, source: int) -> Tensor:
    """The records that rank `source` made of a shard; `own` are this rank's."""
    if source != ranks.rank():
        own = torch.empty(len(layout.windows(shard)), layout.record_bytes, dtype=torch.uint8)
    return ranks.broadcast_tensor(own, source)
