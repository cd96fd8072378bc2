"""One training as its run asks for it: what is trained, how, and where. Next: `loop`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.training.batches import LabelMask
from babyllama_ds.training.meter import Meter
from babyllama_ds.training.milestones import MilestoneFolder


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained, and how."""

    name: str
    """`student`, `control` or `teachers/NAME`."""
    model: nn.Module
    training: TrainingSpec
    distillation: DistillationSpec | None
    """The loss of a distilled model; none: plain cross-entropy."""
    vocab_size: int
    seed: int
    micro_batch: int
    """Windows in one forward pass of one rank."""
    deepspeed: Mapping[str, Any]
    """DeepSpeed's configuration."""
    compiled: bool = False
    """Whether torch compiles the model in training."""
    has_label: LabelMask | None = None
    """Which positions of a window have a label; none: all but its last."""
    meter: Meter | None = None
    """What a token costs and what the machine can do; none: only tokens per second are told."""

    def metered(self, tokens_per_s: float) -> dict[str, float]:
        """What the meter reads at that speed; nothing without one."""
        return self.meter.read(tokens_per_s) if self.meter else {}


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What the stage needs from its run."""

    run_dir: Path
    device: torch.device
    stop: StopRequest
    checkpoints: CheckpointFolder
    milestones: MilestoneFolder | None = None
    """Models to be kept on the way; none: none."""
