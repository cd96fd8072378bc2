"""Which memory holds a cache: what it needs and what is free enter, a tier leaves.

    device   the accelerator's memory, a copy a rank: a gather on the device
    host     the host's memory, a copy a rank: a gather into pinned memory, a copy to the device
    disk     the shards' files, mapped: what the system has no room for is read again

On a CPU `device` and `host` are the same memory. `auto` takes the first that fits with room to
spare; a tier asked for by name is refused when it does not fit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from babyllama_ds import ranks
from babyllama_ds.errors import MachineError
from babyllama_ds.memory import available_host_bytes
from babyllama_ds.storages import Storages

Tier = Literal["device", "host", "disk"]

TRAINED_BYTES_A_PARAMETER = 2 + 4 + 3 * 4
"""bf16 weights, fp32 gradients, fp32 master weights and two moments, on a single rank."""
DEVICE_SPARED = 0.2
"""Part of the accelerator that `auto` leaves to the student, beside its weights and moments."""
HOST_SPARED = 0.2
"""Part of the host's available memory that `auto` leaves alone."""
DISK_SPARED_BYTES = 2**30
"""What a cache leaves free on the disk, for checkpoints and models."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Free bytes; of memory, what one rank may count on."""

    device: int | None
    """On the accelerator, the least of all ranks; none: the ranks compute on the CPU."""
    device_total: int
    host: int
    disk: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a cache asks for."""

    name: str
    """What people see: `cache of teachers/gpt2`."""
    memory_bytes: int
    """All its records."""
    disk_bytes: int
    """The shards that are not written yet."""
    student_bytes: int
    """Weights, gradients and moments still to come to the accelerator."""


@dataclass(frozen=True)
class Choice:
    """Where a cache is read from, and whether it is written to disk before."""

    tier: Tier
    kept: bool
    """False: there is room in memory only, so the next start computes it again."""


def choose_tier(asked: Literal["auto", "device", "host", "disk"], need: Need, room: Room) -> Choice:
    """The tier that was asked for, or the first that fits.

    Raises:
        MachineError: it does not fit, or nothing does; with the bytes needed and free.
    """
    free = _free(room)
    kept = need.disk_bytes == 0 or need.disk_bytes + DISK_SPARED_BYTES <= room.disk
    if asked == "auto":
        spared = _spared(need, room)
        fitting: list[Tier] = [
            tier for tier in free if need.memory_bytes + spared[tier] <= free[tier]
        ]
        if kept:
            fitting.append("disk")
        if not fitting:
            raise _too_large(need, room, free, on_disk=True)
        return Choice(fitting[0], kept)
    tier: Tier = "host" if asked == "device" and room.device is None else asked
    if tier == "disk":
        if not kept:
            raise _too_large(need, room, {}, on_disk=True)
    elif need.memory_bytes > free[tier]:
        raise _too_large(need, room, {tier: free[tier]}, on_disk=False)
    return Choice(tier, kept)


def held_where_computed(
    asked: Literal["auto", "device", "host", "disk"],
    sizes_bytes: Sequence[int],
    room: Room,
    *,
    student_bytes: int,
) -> int:
    """Bytes of caches of these sizes that will lie in the memory that a training itself takes.

    They are opened one after another, each in the room that those before it left.

    Raises:
        MachineError: a tier that was asked for by name does not fit.
    """
    computes: Tier = "host" if room.device is None else "device"
    held: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}
    for size_bytes in sizes_bytes:
        left = replace(
            room,
            device=None if room.device is None else room.device - held["device"],
            host=room.host - held["host"],
        )
        # Room on the disk decides only where no memory has any.
        need = Need(
            name="teacher cache",
            memory_bytes=size_bytes,
            disk_bytes=0,
            student_bytes=student_bytes,
        )
        held[choose_tier(asked, need, left).tier] += size_bytes
    return held[computes]


def measure_room(directory: Path, device: torch.device, storages: Storages) -> Room:
    """What is free, the same on every rank; of several disks on the fullest. A collective."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()  # what earlier stages freed is torch's, and not free to the card
    free, total = torch.cuda.mem_get_info(device) if on_cuda else (0, 0)
    of_ranks = ranks.gather_objects((free, available_host_bytes() // ranks.local_world_size()))
    of_disks = storages.on_each(lambda: shutil.disk_usage(directory).free)
    return ranks.broadcast_object(
        Room(
            device=min(one[0] for one in of_ranks) if on_cuda else None,
            device_total=total,
            host=min(one[1] for one in of_ranks),
            disk=min(of_disks),
        )
    )


def _free(room: Room) -> dict[Tier, int]:
    """The memories there are, the fastest first."""
    if room.device is None:
        return {"host": room.host}
    return {"device": room.device, "host": room.host}


def _spared(need: Need, room: Room) -> dict[Tier, int]:
    return {
        "device": need.student_bytes + int(DEVICE_SPARED * room.device_total),
        "host": int(HOST_SPARED * room.host),
    }


def _too_large(need: Need, room: Room, free: Mapping[Tier, int], *, on_disk: bool) -> MachineError:
    """It fits in none of the memories whose free bytes are given, nor, `on_disk`, there."""
    found = [f"{free_bytes:,} free in the {tier}'s memory" for tier, free_bytes in free.items()]
    places = [f"in the {tier}'s memory" for tier in free]
    if on_disk:
        found.append(f"{room.disk:,} on the disk, of which {DISK_SPARED_BYTES:,} are spared")
        places.append("on the disk")
    needed = need.memory_bytes if free else need.disk_bytes
    return MachineError.of(
        "distillation.cache_tier",
        got=f"{', '.join(found)} (bytes, for each rank)",
        expected=f"{needed:,} bytes {' or '.join(places)}, for the {need.name}",
        hint="free some memory or disk space, lower windows.offsets.phases, "
        "or set distillation.cache=topk or none",
    )
