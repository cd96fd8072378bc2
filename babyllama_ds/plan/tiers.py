"""Where a rank's teacher caches are read from, in the room that the plan knows of."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from babyllama_ds.plan.basis import Basis
from babyllama_ds.plan.disk import cache_bytes
from babyllama_ds.teachers.cache.tiers import (
    TRAINED_BYTES_A_PARAMETER,
    Need,
    Room,
    Tier,
    choose_tier,
)

_NOT_KNOWN = sys.maxsize
"""Room that the plan does not know, and takes to be enough."""


def cached_by_tier(basis: Basis, ranks: int) -> Mapping[Tier, int]:
    """Bytes of one rank's teacher caches by tier: `auto` as `choose_tier` has it.

    The caches are opened one after another, each in the room that those before it left.
    """
    held: dict[Tier, int] = {}
    for size_bytes in cache_bytes(
        basis.job, basis.corpus, basis.work, element_bytes=basis.element_bytes
    ):
        tier = _tier(basis, size_bytes, ranks, held)
        held[tier] = held.get(tier, 0) + size_bytes
    return held


def _tier(basis: Basis, size_bytes: int, ranks: int, held: Mapping[Tier, int]) -> Tier:
    """A tier asked for by name is taken as it is: where it does not fit, the plan shows it."""
    asked, on_cpu = basis.job.distillation.cache_tier, basis.machine.device == "cpu"
    if asked != "auto":
        return "host" if asked == "device" and on_cpu else asked
    need = Need(
        name="teacher cache",
        memory_bytes=size_bytes,
        disk_bytes=size_bytes,
        student_bytes=TRAINED_BYTES_A_PARAMETER * basis.student.sizes.params,
    )
    usable = basis.machine.usable_bytes(ranks)
    computes: Tier = "host" if on_cpu else "device"
    free = _NOT_KNOWN if usable is None else usable - held.get(computes, 0)
    room = Room(
        device=None if on_cpu else free,
        device_total=basis.machine.memory_bytes or 0,
        host=free if on_cpu else _NOT_KNOWN,
        disk=_NOT_KNOWN,
    )
    return choose_tier("auto", need, room).tier
