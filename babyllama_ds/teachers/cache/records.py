"""Where records are read from: window numbers enter, their records on the device leave.

Shapes: M windows in all, B windows of a forward pass, R bytes of a record.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babyllama_ds.memory import sent
from babyllama_ds.teachers.cache.layout import Layout, shard_path

Numbers = NDArray[np.int64]


class Records(Protocol):
    """The records of all windows, read by any rank in any order."""

    def read(self, windows_B: Numbers) -> Tensor:
        """Their records [B, R], uint8, on the device; on CUDA the copy may still be under way."""

    def expect(self, windows_B: Numbers) -> None:
        """These will be read next."""

    def close(self) -> None:
        """Free them."""


class MemoryRecords:
    """Records in the memory of the device, or of the host.

    From the host they are gathered into pinned memory. The whole is not pinned: PyTorch would
    round its size up to a power of two.
    """

    def __init__(self, layout: Layout, *, place: torch.device, device: torch.device) -> None:
        """Room for every record at `place`, to be filled with `put` and read to `device`."""
        self.place, self._device = place, device
        self._through_pinned = place.type == "cpu" and device.type == "cuda"
        # In words: a gather of bytes is slow on an accelerator.
        self._words_MW = torch.empty(
            layout.num_windows,
            layout.record_bytes // 8,
            dtype=torch.int64,
            device=place,
        )

    def put(self, start: int, records_NR: Tensor) -> None:
        """Keep the records of the windows from number `start` on."""
        words_NW = records_NR.view(torch.int64)
        self._words_MW[start : start + len(words_NW)].copy_(words_NW)

    def read(self, windows_B: Numbers) -> Tensor:
        """Their records [B, R], gathered; from the host without waiting for the copy."""
        index_B = sent(torch.from_numpy(windows_B), self._words_MW.device)
        # A new buffer each time: PyTorch gives a pinned one out again once its copy has ended.
        found_BW = torch.empty(
            len(index_B),
            self._words_MW.shape[1],
            dtype=torch.int64,
            device=self._words_MW.device,
            pin_memory=self._through_pinned,
        )
        torch.index_select(self._words_MW, 0, index_B, out=found_BW)
        return found_BW.to(self._device, non_blocking=True).view(torch.uint8)

    def expect(self, windows_B: Numbers) -> None:
        """Nothing to do: they are here."""

    def close(self) -> None:
        """Free the memory; of a card for whoever asks what is free there, not for torch alone."""
        self._words_MW = torch.empty(0, 0, dtype=torch.int64)
        if self.place.type == "cuda":
            torch.cuda.empty_cache()


class FileRecords:
    """Records in the shards' files, mapped into memory: the system keeps there what it has room
    for, once for all ranks of a machine."""

    def __init__(self, directory: Path, layout: Layout, *, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._maps = [_map(shard_path(directory, shard)) for shard in range(layout.num_shards)]

    def read(self, windows_B: Numbers) -> Tensor:
        """Their records [B, R]; waits for the disk where they have not been read ahead."""
        pinned = self._device.type == "cuda"
        found_BR = torch.empty(
            len(windows_B), self._layout.record_bytes, dtype=torch.uint8, pin_memory=pinned
        )
        for row, window in zip(found_BR.numpy(), windows_B, strict=True):
            shard, start = self._place(int(window))
            stop = start + self._layout.record_bytes
            row[:] = np.frombuffer(self._maps[shard], np.uint8)[start:stop]
        return found_BR.to(self._device, non_blocking=True)

    def expect(self, windows_B: Numbers) -> None:
        """Have the system read them from the disk in the meantime."""
        for window in windows_B:
            shard, start = self._place(int(window))
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            length = start + self._layout.record_bytes - page
            self._maps[shard].madvise(mmap.MADV_WILLNEED, page, length)

    def close(self) -> None:
        """Unmap the files."""
        self._maps = []

    def _place(self, window: int) -> tuple[int, int]:
        """A window's shard, and the first byte of its record there."""
        shard, row = divmod(window, self._layout.shard_windows)
        return shard, row * self._layout.record_bytes


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
