"""Batches: a step's number enters, this rank's micro-batches and the global counts leave.

Which windows form batch k of epoch e depends on the seed alone, never on ranks, micro-batches
or accumulation. The last batch of an epoch may be short: the windows missing to a full batch are
padding, in which nothing is labelled or valid, so every rank still makes every micro-step.

Shapes: B windows of a micro-batch, S positions, N = B * S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babyllama_ds.errors import JobError
from babyllama_ds.losses.distillation import IGNORED_LABEL
from babyllama_ds.memory import sent
from babyllama_ds.models.documents import Pieces
from babyllama_ds.spec.training import TrainingSpec

LabelMask = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
"""Token ids [n, S] to which positions have a label [n, S]; the last of a window never has."""


def label_mask(unlabelled_ids: Sequence[int]) -> LabelMask | None:
    """The labels of all but these tokens; none where there are none of them: all but the last."""
    if not unlabelled_ids:
        return None

    def has_label(tokens_nS: NDArray[np.int64]) -> NDArray[np.bool_]:
        mask_nS = np.zeros(tokens_nS.shape, dtype=np.bool_)
        mask_nS[:, :-1] = ~np.isin(tokens_nS[:, 1:], unlabelled_ids)
        return mask_nS

    return has_label


class WindowSource(Protocol):
    """What `corpus.windows.TrainWindows` offers."""

    @property
    def num_windows(self) -> int:
        """Windows in an epoch."""

    @property
    def length(self) -> int:
        """Tokens in a window."""

    def batch(self, epoch: int, k: int, batch_windows: int) -> NDArray[np.int64]:
        """Ids of the windows of batch `k`; the last batch of an epoch may be short."""

    def windows(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids [n, length] of these windows."""

    def numbers(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """What these windows are called over all epochs: the same number, the same tokens."""

    def begins(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Where pieces of documents begin in these windows [n, length]; none: windows are whole."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank."""

    input_ids_BS: Tensor
    labels_N: Tensor
    valid_N: Tensor
    windows_B: NDArray[np.int64]
    """The windows' numbers over all epochs (on the CPU), for teachers that remember them."""
    next_windows_B: NDArray[np.int64]
    """Those of this rank's next forward pass, to be read ahead; empty after the last one."""
    pieces: Pieces | None = None
    """The documents in the windows, to be kept apart; none: windows are whole."""


@dataclass(frozen=True)
class Batch:
    """One optimizer step: which windows, of all ranks, and this rank's share of them."""

    epoch: int
    window_ids: NDArray[np.int64]
    length: int
    micro_batches: tuple[MicroBatch, ...]
    labelled: int | None = None
    """Positions of the global batch with a label, where documents are kept apart or some tokens
    are no labels; none: all but each window's last."""

    @property
    def num_windows(self) -> int:
        """Windows of the global batch."""
        return len(self.window_ids)

    @property
    def num_labelled(self) -> int:
        """Positions of the global batch with a label."""
        if self.labelled is not None:
            return self.labelled
        return self.num_windows * (self.length - 1)

    @property
    def num_valid(self) -> int:
        """Positions of the global batch."""
        return self.num_windows * self.length


class BatchPlan:
    """All batches of one training, as one rank sees them."""

    def __init__(
        self,
        windows: WindowSource,
        training: TrainingSpec,
        *,
        rank: int,
        num_ranks: int,
        micro_batch: int,
        device: torch.device,
        has_label: LabelMask | None = None,
    ) -> None:
        self._windows = windows
        self._has_label = has_label
        self._batch_windows = training.batch_windows
        self._share = (rank, num_ranks, micro_batch)
        self._device = device
        self.steps_per_epoch = steps_per_epoch(training, windows.num_windows)
        self.total_steps = total_steps(training, windows.num_windows, windows.length)

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, from 0."""
        epoch, ids = self._ids(step)
        return Batch(
            epoch=epoch,
            window_ids=ids,
            length=self._windows.length,
            micro_batches=tuple(self._micro_batches(step)),
            labelled=self._num_labelled(epoch, ids),
        )

    def _num_labelled(self, epoch: int, ids: NDArray[np.int64]) -> int | None:
        """Counted in all ranks' windows: each rank reads them all, and none waits for another."""
        begins_WS = self._windows.begins(epoch, ids)
        if begins_WS is None and self._has_label is None:
            return None
        labelled_WS = np.ones((len(ids), self._windows.length), dtype=np.bool_)
        labelled_WS[:, -1] = False
        if begins_WS is not None:
            labelled_WS[:, :-1] &= ~begins_WS[:, 1:]
        if self._has_label is not None:
            labelled_WS &= self._has_label(self._windows.windows(epoch, ids))
        return int(labelled_WS.sum())

    def _micro_batches(self, step: int) -> Iterator[MicroBatch]:
        epoch, rows = self._rows(step)
        numbers = [self._numbers(epoch, row) for row in rows]
        numbers.append(self._first_numbers(step + 1))
        for row, windows_B, next_windows_B in zip(rows, numbers, numbers[1:], strict=False):
            tokens_BS = self._windows.windows(epoch, _filled(row))
            begins_BS = self._windows.begins(epoch, _filled(row))
            yield micro_batch(
                self._sent(torch.from_numpy(tokens_BS)),
                self._sent(torch.from_numpy(row >= 0)),
                windows_B,
                next_windows_B,
                None if begins_BS is None else Pieces.of(begins_BS, self._sent),
                None
                if self._has_label is None
                else self._sent(torch.from_numpy(self._has_label(tokens_BS))),
            )

    def _sent(self, tensor: Tensor) -> Tensor:
        return sent(tensor, self._device)

    def _ids(self, step: int) -> tuple[int, NDArray[np.int64]]:
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch, self._windows.batch(epoch, k, self._batch_windows)

    def _rows(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch, and this rank's windows: a row a micro-batch, -1 for padding."""
        rank, num_ranks, size = self._share
        epoch, ids = self._ids(step)
        slots = np.full(self._batch_windows, -1, dtype=np.int64)
        slots[: len(ids)] = ids
        return epoch, slots.reshape(-1, num_ranks, size)[:, rank]

    def _numbers(self, epoch: int, row: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._windows.numbers(epoch, _filled(row))

    def _first_numbers(self, step: int) -> NDArray[np.int64]:
        if step >= self.total_steps:
            return _NO_WINDOWS
        epoch, rows = self._rows(step)
        return self._numbers(epoch, rows[0])


_NO_WINDOWS = np.empty(0, dtype=np.int64)


def _filled(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Window numbers, 0 for padding: what stands in a padding window has no effect."""
    return np.maximum(row, 0)


def micro_batch(
    input_ids_BS: Tensor,
    real_B: Tensor,
    windows_B: NDArray[np.int64] = _NO_WINDOWS,
    next_windows_B: NDArray[np.int64] = _NO_WINDOWS,
    pieces: Pieces | None = None,
    has_label_BS: Tensor | None = None,
) -> MicroBatch:
    """Labels (each position's next token, the last one's none) and validity of real windows.

    The last position of a piece has no label either; it is as valid as the others. `has_label_BS`
    false: no label there, whatever comes next.
    """
    labels_BS = torch.full_like(input_ids_BS, IGNORED_LABEL)
    labels_BS[:, :-1] = input_ids_BS[:, 1:]
    if pieces is not None:
        labels_BS[:, :-1].masked_fill_(pieces.cuts_BT, IGNORED_LABEL)
    labels_BS.masked_fill_(~real_B[:, None], IGNORED_LABEL)
    if has_label_BS is not None:
        labels_BS.masked_fill_(~has_label_BS, IGNORED_LABEL)
    valid_BS = real_B[:, None].expand_as(input_ids_BS)
    return MicroBatch(
        input_ids_BS, labels_BS.flatten(), valid_BS.flatten(), windows_B, next_windows_B, pieces
    )


def steps_per_epoch(training: TrainingSpec, num_windows: int) -> int:
    """Optimizer steps in a pass over the windows, a short last one included."""
    return math.ceil(num_windows / training.batch_windows)


def total_steps(training: TrainingSpec, num_windows: int, length: int) -> int:
    """Optimizer steps until the first of the job's limits; at least one."""
    # Without the product's last bits: 1.1 epochs of 50 steps are 55, and not one more.
    steps = round(training.epochs * steps_per_epoch(training, num_windows), 6)
    limits = [math.ceil(steps)]
    if training.max_steps is not None:
        limits.append(training.max_steps)
    if training.max_tokens is not None:
        limits.append(training.max_tokens // (training.batch_windows * length))
    return max(1, min(limits))


def tokens_after(step: int, training: TrainingSpec, num_windows: int, length: int) -> int:
    """Tokens of the windows of the first `step` batches, over all ranks."""
    epochs, k = divmod(step, steps_per_epoch(training, num_windows))
    return length * (epochs * num_windows + k * training.batch_windows)  # all but the last are full


def check_warmup(training: TrainingSpec, num_windows: int, length: int, *, where: str) -> None:
    """The warm-up ends before the training does.

    Raises:
        JobError: it does not.
    """
    steps = total_steps(training, num_windows, length)
    if training.warmup_steps >= steps:
        raise JobError.of(
            f"{where}.warmup_steps",
            got=training.warmup_steps,
            expected=f"fewer than the training's {steps} optimizer steps",
            hint="shorten the warm-up, lower `batch_windows`, or train for more epochs",
        )
