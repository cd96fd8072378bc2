"""Batches one step ahead: steps' numbers enter, batches that are ready leave.

The batch after the one that is asked for is read, and sent to the device, while the step runs. An
engine waits for the device at the end of every step (is any gradient not finite?); read after that,
a batch would leave the device idle for as long as reading takes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from babyllama_ds.training.batches import Batch


class BatchesAhead:
    """Batches in the order of their steps, each read while the one before is worked on."""

    def __init__(
        self, read: Callable[[int], Batch], *, total_steps: int, device: torch.device
    ) -> None:
        self._read = read
        self._total_steps = total_steps
        # A thread begins on card 0, where pinning memory would leave a context of every rank.
        begin = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._reader = ThreadPoolExecutor(1, "batches", *begin)
        self._coming: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """The batch of `step`; an error of reading it is raised here."""
        coming = self._coming.pop(step, None) or self._reader.submit(self._read, step)
        batch = coming.result()
        if step + 1 < self._total_steps:
            self._coming[step + 1] = self._reader.submit(self._read, step + 1)
        return batch

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(cancel_futures=True)
