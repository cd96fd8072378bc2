"""The host's memory: how much there is, within the container's limit if there is one, and the way
from it to a card.

One place for all who ask: the loss's chunks, the teacher cache, `micro_batch: auto`, plan, doctor.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits (cgroup version 2)."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""glibc's names of what `mallopt` sets (malloc.h)."""


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, for its next step to take again.

    glibc gives large blocks back to the system at once, and the next step gets them anew, page by
    page and zeroed: 5 to 10 % of a small model's step on a CPU (docs/decisions/no-waste.md). C
    libraries without `mallopt` stay as they are.
    """
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(_MMAP_MAX, 0)  # large blocks from the heap, as small ones
        c_library.mallopt(_TRIM_THRESHOLD, -1)  # a heap that never shrinks by itself,
        c_library.mallopt(_TOP_PAD, 64 * 2**20)  # and grows in large steps


def give_back_freed_memory() -> None:
    """Let the system have what this process keeps and does not use."""
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "malloc_trim"):
        c_library.malloc_trim(0)


def available_host_bytes() -> int:
    """Memory that can be had without swapping; what this process freed is given back before.

    Raises:
        OSError: the system does not tell (it is not a Linux).
    """
    give_back_freed_memory()
    meminfo = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit = _limit_bytes()
    if limit is None:
        return available
    used = int((CGROUP / "memory.current").read_text())
    facts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    # Files that were read count as used, and are given up when memory is wanted.
    return min(available, limit - used + int(facts.get("inactive_file", 0)))


def total_host_bytes() -> int:
    """Memory that there is.

    Raises:
        OSError, ValueError: the system does not tell.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _limit_bytes()
    return physical if limit is None else min(physical, limit)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device, without waiting for it: from pinned memory a copy only queues."""
    if torch.device(device).type == "cuda":  # a column of a matrix would go by way of another copy
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _limit_bytes() -> int | None:
    """The container's limit; none: it has none, or this is no container."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else int(limit)
