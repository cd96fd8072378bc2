"""`micro_batch: auto`: a model, its teachers and free memory enter, the windows of a pass leave.

Sizes are tried from the smallest up, among the divisors of a rank's share of the batch, with the
engine's own memory in place: weights, master weights, moments, and the fp32 gradients that ZeRO
holds from one micro-batch to the next. A trial is a forward pass of teachers and student and the
gradients, without the collectives of a step, so that a rank without memory leaves nobody waiting.

    CUDA   a size fits if its trial ends with `SPARED` of the card free
    CPU    a process that takes too much is killed: a size is tried only if the trials of the
           smaller ones say that it fits, and fits by its own measured peak

All ranks try the same sizes, and take what fits on each of them. Weights do not change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from babyllama_ds import ranks
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.errors import MachineError
from babyllama_ds.memory import available_host_bytes
from babyllama_ds.models.documents import Pieces
from babyllama_ds.spec.base import divisors
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.training.batches import micro_batch
from babyllama_ds.training.objective import Counts, Objective
from babyllama_ds.training.out_of_memory import ran_out

SPARED = 0.1
"""Part of the memory that stays free: for the update, for evaluation, for fragments."""

Trial = Callable[[int], None]
"""Runs the passes of so many windows."""


def find_micro_batch(
    objective: Objective,
    ensemble: Ensemble | None,
    *,
    training: TrainingSpec,
    deepspeed: Mapping[str, Any],
    share: int,
    length: int,
    device: torch.device,
    where: str,
    within_documents: bool = False,
    cache_bytes: int = 0,
) -> int:
    """The most windows of `length` tokens, a divisor of `share`, that fit on every rank.

    A collective. `deepspeed` is the configuration of the stage with one accumulation step;
    `within_documents`: attention stays in documents, which may cost a mask; `cache_bytes`: what a
    teacher cache will take of the same memory, which is not there yet.

    Raises:
        MachineError: not even one window fits.
    """
    engine = TrainingEngine(objective, training=training, config=deepspeed, device=device)
    try:
        weights = [weight for weight in objective.parameters() if weight.requires_grad]
        # What ZeRO keeps of the micro-batches before, beside this one's passes.
        held = sum(weight.numel() for weight in weights) // ranks.world_size()
        gradients = torch.zeros(held, dtype=torch.float32, device=device)
        trial = _trial(
            objective,
            ensemble,
            weights,
            length=length,
            device=device,
            within_documents=within_documents,
        )
        # What is free is read when every rank of the machine has taken what it holds.
        ranks.barrier()
        on_card = device.type == "cuda"
        room = CardRoom(device, cache_bytes) if on_card else HostRoom(cache_bytes)
        found = largest_fitting(share, lambda windows: room.fits(windows, trial))
        del gradients
    finally:
        engine.destroy()
    if found is None:
        beside = f", beside {cache_bytes:,} bytes of the teacher cache" if cache_bytes else ""
        elsewhere = "set distillation.cache_tier=disk, " if cache_bytes else ""
        raise MachineError.of(
            f"{where}.micro_batch",
            got=f"no room for a forward and backward pass of one window of {length} tokens",
            expected=f"memory for it, with {SPARED:.0%} of all to spare{beside}",
            hint=f"{elsewhere}take a larger machine or card, shorten windows.length, or set "
            "distillation.chunk_tokens; `babyllama-ds plan` says what takes the memory",
        )
    return found


def largest_fitting(share: int, fits: Callable[[int], bool]) -> int | None:
    """The largest divisor of `share` up to which every one fits on all ranks. A collective."""
    best = None
    for windows in divisors(share):
        if ranks.max_int(0 if fits(windows) else 1):
            break
        best = windows
    return best


class CardRoom:
    """The memory of a CUDA device, found by trying; `taken_bytes` of it are still to be taken."""

    def __init__(self, device: torch.device, taken_bytes: int = 0) -> None:
        self._device, self._taken_bytes = device, taken_bytes

    def fits(self, windows: int, trial: Trial) -> bool:
        """Whether the trial ends, and enough is free beside what it took."""
        torch.cuda.empty_cache()
        try:
            trial(windows)
            # What the trial took is still reserved: free is what nobody needed.
            free, total = torch.cuda.mem_get_info(self._device)
            return free - self._taken_bytes >= SPARED * total
        except RuntimeError as error:
            if ran_out(error):
                return False
            raise
        finally:
            torch.cuda.empty_cache()


class HostRoom:
    """A rank's part of the host's free memory, by the peaks of the trials so far.

    It is asked for ascending sizes; `taken_bytes` of it are still to be taken.
    """

    def __init__(self, taken_bytes: int = 0) -> None:
        free_bytes = (1 - SPARED) * available_host_bytes() / ranks.local_world_size()
        self._free_bytes = free_bytes - taken_bytes
        self._peaks: list[tuple[int, int]] = []

    def fits(self, windows: int, trial: Trial) -> bool:
        """Whether there is room by the smaller trials, and by this one's own peak."""
        if self._expected_bytes(windows) > self._free_bytes:
            return False
        peak_bytes = peak_host_bytes(lambda: trial(windows))
        self._peaks.append((windows, peak_bytes))
        return peak_bytes <= self._free_bytes

    def _expected_bytes(self, windows: int) -> float:
        """At most this: memory grows with the windows, or (chunks of the loss) stops growing."""
        if not self._peaks:
            return 0.0
        last, last_bytes = self._peaks[-1]
        before, before_bytes = self._peaks[-2] if len(self._peaks) > 1 else (0, 0)
        return last_bytes + (windows - last) * (last_bytes - before_bytes) / (last - before)


def peak_host_bytes(run: Callable[[], None]) -> int:
    """The most that `run` had allocated on the CPU at one time, beyond what there was."""
    # Else the profiler says in the log that it starts and stops; read once, at its first start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = now = 0
    for _, num_bytes in changes:
        now += num_bytes
        peak = max(peak, now)
    return peak


def _trial(
    objective: Objective,
    ensemble: Ensemble | None,
    weights: list[torch.nn.Parameter],
    *,
    length: int,
    device: torch.device,
    within_documents: bool,
) -> Trial:
    watch = ensemble is not None and bool(ensemble.members)

    def run(windows: int) -> None:
        micro = micro_batch(
            torch.zeros(windows, length, dtype=torch.int64, device=device),
            torch.ones(windows, dtype=torch.bool, device=device),
            pieces=_two_a_window(windows, length, device) if within_documents else None,
        )
        targets = ensemble.targets(micro) if ensemble else []
        parts = objective(micro, targets, Counts(ce=1, kl=1, scale=1.0), watch=watch)
        # Not `backward()`: the engine's hooks would reduce over ranks.
        torch.autograd.grad(parts.loss, weights, allow_unused=True)

    return run


def _two_a_window(windows: int, length: int, device: torch.device) -> Pieces:
    """Two documents in every window, so that a mask is made where one is ever needed."""
    begins_S = np.isin(np.arange(length), (0, length // 2))
    begins_BS = np.tile(begins_S, (windows, 1))
    return Pieces.of(begins_BS, lambda tensor: tensor.to(device))
