"""Computing the records: what is whole stays, the rest is made by all ranks, shard by shard.

Enters: a layout, a directory or memory, and how records are computed. Leaves: every shard. In a
round each rank makes one shard; after each forward pass the ranks agree on stopping and on errors,
over the control group, whose time-out is weeks. A kill or a stop costs the shards of a round.

Teachers that are split over ranks run on several at once: there a rank without work makes the
others' passes beside them.

On several storages a shard is computed once in all and sent to the others: they hold the same
bytes, and what one of them has lost comes from another.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from babyllama_ds.storages import Storages
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
    alive: Callable[[str], None] = lambda _what: None
    """Told what has just been done."""
    in_step: bool = False
    """Whether ranks run their forward passes together, as those of a split teacher must."""
    storages: Storages = field(default_factory=Storages)


Whole = dict[int, FileFacts]
"""The shards that are there and undamaged."""


def examine(work: Work, directory: Path) -> list[Whole]:
    """The whole shards in the directory of each storage; damaged ones are told. A collective.

    Every byte is read once, by all ranks of a storage together.
    """
    storages = work.storages
    mine = storages.share_of(work.layout.num_shards)

    def look() -> dict[int, FileFacts | str | None]:
        return {shard: _examined(work, directory, shard) for shard in mine}

    found = storages.together(look)
    of_each: list[Whole] = [{} for _ in storages.leads]
    for storage, of_rank in ranks.gather_objects((storages.mine, found)):
        for shard, what in of_rank.items():
            if isinstance(what, FileFacts):
                of_each[storage][shard] = what
            elif what is not None and ranks.rank() == 0:
                path = str(shard_path(directory, shard))
                place = f"{storages.name(storage)}: {path}" if storages.several else path
                log.warning("%s: %s is damaged (%s): computed anew", work.name, place, what)
    return of_each


def whole_on_each(of_each: Sequence[Whole]) -> Whole:
    """The shards that are the same on every storage."""
    first, *others = of_each
    return {
        shard: facts
        for shard, facts in first.items()
        if all(other.get(shard) == facts for other in others)
    }


def spread(work: Work, directory: Path, of_each: Sequence[Whole], wanted: list[int]) -> Whole:
    """Send each of the `wanted` shards that some storage has to those that have another or none.

    The shards that stand on every storage now. A collective.

    Raises:
        RunError: a disk refuses.
        Stopped: the run was asked to stop; the next start goes on from what is written.
    """
    sent: Whole = {}
    for shard in wanted:
        holders = [storage for storage, whole in enumerate(of_each) if shard in whole]
        if not holders:
            continue
        if (reason := work.stop.agreed()) is not None:
            raise stopped(reason, at=f"{work.name}, sent to other nodes")
        source = holders[0]
        sent[shard] = facts = of_each[source][shard]
        to = [storage for storage, whole in enumerate(of_each) if whole.get(shard) != facts]

        def hand_over(shard: int = shard, source: int = source, to: Sequence[int] = to) -> None:
            lead = work.storages.leads[source]
            own = partial(_read, work.layout, directory, shard)
            _pass_on(work, directory, shard, own, lead, to, left=wanted)

        work.storages.together(hand_over)
    if sent:
        log.info("%s: %d shards sent to other nodes", work.name, len(sent))
    return sent


def make_files(work: Work, directory: Path, missing: list[int], compute: Compute) -> Whole:
    """Compute shards into files of `directory`. A collective.

    Raises:
        RunError: the disk is full, with the bytes needed and free; what is written stays.
        Stopped: the run was asked to stop; the next start goes on from what is written.
    """
    made: Whole = {}
    for shard in _rounds(work, missing):
        left = [number for number in missing if number not in made]
        mine, records = work.storages.together(
            partial(_make, work, directory, shard, left, compute)
        )
        if work.storages.several:
            _pass_on_round(work, directory, shard, records, left)
        for of_rank in ranks.gather_objects(mine):
            made |= of_rank
    return made


def make_in_memory(work: Work, memory: MemoryRecords, missing: list[int], compute: Compute) -> None:
    """Compute shards and give them to every rank's `memory`; no disk takes part. A collective.

    A rank alone sends them to nobody: what stays on the card does not come to the host.

    Raises:
        Stopped: the run was asked to stop; the next start begins anew.
    """
    place = memory.place if ranks.world_size() == 1 else torch.device("cpu")
    for shard in _rounds(work, missing):
        records = ranks.on_every_rank(partial(compute_shard, work, shard, compute, place=place))
        for source, theirs in enumerate(ranks.gather_objects(shard)):
            if theirs is not None:
                start = theirs * work.layout.shard_windows
                memory.put(start, _sent(work.layout, theirs, records, source))


def load(layout: Layout, directory: Path, shards: Whole, memory: MemoryRecords) -> None:
    """Put shards that stand in files into this rank's `memory`."""
    for shard in sorted(shards):
        memory.put(shard * layout.shard_windows, _read(layout, directory, shard))


def compute_shard(
    work: Work, shard: int | None, compute: Compute, *, place: torch.device | None = None
) -> Tensor:
    """The records [n, record_bytes] of a shard, at `place` (none: on the CPU); of none, no records.

    Every forward pass has `forward_windows` windows, the last one filled up with window 0: the
    same shape everywhere, so the same rounding. A collective: all ranks meet after each pass of a
    whole shard, for one that was asked to stop alone must not wait for the others' shards.
    """
    layout = work.layout
    windows = np.empty(0, np.int64) if shard is None else layout.windows(shard)
    records = torch.empty(len(windows), layout.record_bytes, dtype=torch.uint8, device=place)
    size = layout.forward_windows

    def make_pass(start: int) -> None:
        part = windows[start : start + size]
        if len(part) or work.in_step:
            filled = np.concatenate([part, np.zeros(size - len(part), np.int64)])
            records[start : start + size] = compute(filled)[: len(part)]
        # Not before the pass, in which ranks of a split teacher would wait for this one.
        if (reason := work.stop.requested()) is not None:
            raise stopped(reason, at=work.name)

    for start in range(0, layout.shard_windows, size):
        ranks.on_every_rank(partial(make_pass, start))
        work.alive("a forward pass")
    return records


def _examined(work: Work, directory: Path, shard: int) -> FileFacts | str | None:
    work.stop.check()
    facts = examine_shard(directory, work.layout, shard)
    work.alive(f"reading shard {shard}")
    return facts


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


def _make(
    work: Work, directory: Path, shard: int | None, left: list[int], compute: Compute
) -> tuple[Whole, Tensor]:
    """This rank's shard of a round, computed and written at once; its records."""
    records = compute_shard(work, shard, compute)
    if shard is None:
        return {}, records
    return {shard: _write(work, directory, shard, records, left)}, records


def _pass_on_round(
    work: Work, directory: Path, shard: int | None, records: Tensor, left: list[int]
) -> None:
    """The shards of a round, from the ranks that made them to the storages of others."""
    storages = work.storages
    for source, (theirs, at) in enumerate(ranks.gather_objects((shard, storages.mine))):
        if theirs is not None:
            own = partial(torch.Tensor.cpu, records)
            to = [storage for storage in range(len(storages.leads)) if storage != at]
            storages.together(
                partial(_pass_on, work, directory, theirs, own, source, to, left=left)
            )


def _pass_on(
    work: Work,
    directory: Path,
    shard: int,
    own: Callable[[], Tensor],
    source: int,
    to: Sequence[int],
    *,
    left: list[int],
) -> None:
    """This rank's part in bringing a shard from rank `source`, where it is `own()`, to others."""
    targets = [work.storages.leads[storage] for storage in to]
    if ranks.rank() == source:
        ranks.send_made(lambda: own().numpy().tobytes(), targets)
    elif ranks.rank() in targets and (content := ranks.receive_bytes(source)) is not None:
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        _write(work, directory, shard, records.view(-1, work.layout.record_bytes), left)


def _read(layout: Layout, directory: Path, shard: int) -> Tensor:
    """The records [n, record_bytes] of a shard that stands in a file."""
    path, size = shard_path(directory, shard), layout.shard_bytes(shard)
    return torch.from_numpy(np.fromfile(path, np.uint8, count=size)).view(-1, layout.record_bytes)


def _write(work: Work, directory: Path, shard: int, records: Tensor, left: list[int]) -> FileFacts:
    try:
        return write_shard(directory, shard, records)
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
