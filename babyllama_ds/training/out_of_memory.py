"""Memory that runs out in the middle of the work: torch's error enters, one for users leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from babyllama_ds.errors import NoRoomError, first_line
from babyllama_ds.ranks import RemoteError

_NO_MEMORY = re.compile(
    "CUBLAS_STATUS_ALLOC_FAILED"
    "|CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
    "|DefaultCPUAllocator: can't allocate memory"
    # Torch's allocator keeps what it freed, so that a card is full to whoever does not ask it: the
    # driver that loads a kernel or pins memory, Triton, NCCL.
    r"|CUDA error: out of memory|\[CUDA\]: out of memory|Cuda failure (2 )?'out of memory'"
)
"""How all say it that allocate past torch, and torch on a CPU: in a plain `RuntimeError`."""


def ran_out(error: BaseException) -> bool:
    """Whether this rank had no memory left."""
    if isinstance(error, RemoteError):  # another rank's, which tells of it itself
        return False
    by_name = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return by_name or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


@contextmanager
def memory_needed(where: str, *, hint: str) -> Iterator[None]:
    """Within, running out of memory is an error that names `where`, the key that decides the need.

    Raises:
        NoRoomError: it did, on this rank; others may still be at work.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise NoRoomError.of(
            where, got=f"no memory left ({first_line(error)})", expected="what fits here", hint=hint
        ) from error
