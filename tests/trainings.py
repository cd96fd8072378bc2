"""A small training, started as often as a test wants, and what is seen of it."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from babyllama_ds.engine.checkpoint import BestWeights, CheckpointFolder, Progress
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import LabelMask
from babyllama_ds.training.loop import train
from babyllama_ds.training.meter import Meter
from babyllama_ds.training.milestones import MilestoneFolder
from babyllama_ds.training.stage import RunContext, Stage

VOCAB, LENGTH, WINDOWS = 61, 10, 14  # 14 windows in batches of 4: the last of an epoch has two


class RandomWindows:
    """Training windows of random tokens."""

    def __init__(self) -> None:
        self.num_windows, self.length = WINDOWS, LENGTH
        self.tokens = np.random.default_rng(1).integers(0, VOCAB, (WINDOWS, LENGTH))

    def batch(self, epoch: int, k: int, batch_windows: int) -> NDArray[np.int64]:
        order = np.random.default_rng(epoch).permutation(WINDOWS)
        return order[k * batch_windows : (k + 1) * batch_windows]

    def numbers(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices

    def begins(self, epoch: int, indices: NDArray[np.int64]) -> None:
        """Windows are whole."""

    def windows(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.tokens[indices]


def dev_windows(tokens: NDArray[np.int64] | None = None) -> DevWindows:
    if tokens is None:
        tokens = np.random.default_rng(2).integers(0, VOCAB, (5, LENGTH))
    return DevWindows(windows_of=lambda ids: tokens[list(ids)], num_windows=5, batch_windows=2)


class StopAfter(StopRequest):
    """Asked to stop when so many steps are done in this process.

    `before` is called before each of its steps, with the epoch and the batch: those of a process
    that began at the first step.
    """

    def __init__(self, steps: int | None, before: Callable[[int, int], None] | None = None) -> None:
        super().__init__()
        self.left = steps
        self.before = before
        self.done = 0

    def agreed(self) -> str | None:
        if self.before is not None:
            self.before(*divmod(self.done, math.ceil(WINDOWS / 4)))
        self.done += 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        if self.left is not None:
            self.left -= 1
        return super().agreed()


class WatchedFolder(CheckpointFolder):
    """Remembers at which steps checkpoints were written."""

    def __init__(self, directory: Path, *, fingerprint: str) -> None:
        super().__init__(directory, fingerprint=fingerprint)
        self.saved: list[int] = []

    def save(
        self,
        engine: TrainingEngine,
        progress: Progress,
        best: BestWeights,
        logged: Callable[[], str] = lambda: "",
    ) -> None:
        self.saved.append(progress.step)
        super().save(engine, progress, best, logged)


@dataclass
class Run:
    """One training's place and parts; `train` may be called again, as a new process would."""

    directory: Path
    model: Callable[[], nn.Module]
    training: TrainingSpec
    config: dict[str, Any]
    device: torch.device
    distillation: DistillationSpec | None = None
    ensemble: Ensemble | None = None
    seed: int = 3
    meter: Meter | None = None
    has_label: LabelMask | None = None
    milestones: MilestoneFolder | None = None
    checkpoints: Path | None = None
    """Where others keep theirs too; none: a place of its own."""
    last_model: nn.Module = field(default_factory=nn.Module)
    folder: WatchedFolder = field(init=False)

    def train(
        self,
        *,
        stop_after: int | None = None,
        before: Callable[[int, int], None] | None = None,
        dev: DevWindows | None = None,
    ) -> dict[str, Any]:
        self.directory.mkdir(exist_ok=True, parents=True)
        self.last_model = self.model()
        place = self.checkpoints or self.directory / "checkpoints" / "student"
        self.folder = WatchedFolder(place, fingerprint="f" * 64)
        stage = Stage(
            name="student",
            model=self.last_model,
            training=self.training,
            distillation=self.distillation,
            vocab_size=VOCAB,
            seed=self.seed,
            micro_batch=self.config["train_micro_batch_size_per_gpu"],
            deepspeed=self.config,
            has_label=self.has_label,
            meter=self.meter,
        )
        stop = StopAfter(stop_after, before)
        context = RunContext(
            run_dir=self.directory,
            device=self.device,
            stop=stop,
            checkpoints=self.folder,
            milestones=self.milestones,
        )
        parts = {"windows": RandomWindows(), "dev": dev or dev_windows()}
        stop.install()
        try:
            return train(stage, context, **parts, ensemble=self.ensemble)
        finally:
            stop.uninstall()

    def weights(self) -> dict[str, torch.Tensor]:
        return {key: p.detach().clone() for key, p in self.last_model.named_parameters()}

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def dev_ce(self) -> dict[int, float]:
        return {line["step"]: line["dev_ce"] for line in self.metrics() if "dev_ce" in line}

    def logged(self) -> dict[int, dict[str, Any]]:
        return {line["step"]: line for line in self.metrics() if "loss" in line}


def assert_equal_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def windows_of_step(step: int) -> NDArray[np.int64]:
    """The windows of a step, from 0, by their numbers in its epoch."""
    epoch, k = divmod(step, 4)
    return RandomWindows().batch(epoch, k, 4)


def ensemble_of(device: torch.device, *teachers: nn.Module, dtype: torch.dtype) -> Ensemble:
    return Ensemble(
        [
            Member(str(k), FrozenModel(teacher, device=device, dtype=dtype), 1.0 + k)
            for k, teacher in enumerate(teachers)
        ]
    )
