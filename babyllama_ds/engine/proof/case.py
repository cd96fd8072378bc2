"""What is trained twice: a module, numbers and windows; and what is seen of either training.

Shapes: T steps, B windows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from babyllama_ds.spec.training import TrainingSpec

STEPS = 20
MICRO_WINDOWS = 2
VOCAB = 61
"""An odd size, so that partitions end inside parameters and need padding."""
LENGTH = 12

Trace = dict[str, Tensor]
"""What a training showed: `gradient of NAME` in its first step (of the whole batch, before
clipping), `gradient norm` of that step as training measured it, and `change of NAME`, the master
weight's change over all steps."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training to be done twice.

    `make` gives the module, in fp32 on the CPU, always with the same weights; called with windows
    [B, S] of ids below `VOCAB` it returns the mean loss over them. That of a compiled case has a
    method `compile_layers`, which the sharded training calls.
    """

    name: str
    make: Callable[[], nn.Module]
    precision: Literal["bf16", "fp32"] = "fp32"
    accumulation_steps: int = 1
    clip_norm: float | None = None
    overlap_comm: bool = False
    compiled: bool = False
    steps: int = STEPS

    def training(self, num_ranks: int) -> TrainingSpec:
        """The job's numbers.

        Epsilon is far above AdamW's usual 1e-8. Where a gradient is rounding alone (GPT-2's bias
        of keys has no effect on attention) 1e-8 would turn it into updates of full size and
        random sign, and two right trainings would differ.
        """
        return TrainingSpec(
            batch_windows=num_ranks * self.accumulation_steps * MICRO_WINDOWS,
            micro_batch=MICRO_WINDOWS,
            epochs=1,
            learning_rate=3e-3,
            weight_decay=0.5,
            betas=(0.8, 0.95),
            epsilon=1e-4,
            clip_norm=self.clip_norm,
        )

    def batches(self, num_ranks: int) -> Tensor:
        """Global batches [T, B, S], the same in every process."""
        generator = torch.Generator().manual_seed(1)
        size = (self.steps, self.training(num_ranks).batch_windows, LENGTH)
        return torch.randint(0, VOCAB, size, generator=generator)

    def start(self) -> nn.Module:
        """The module; weights of a bf16 case are rounded, as DeepSpeed rounds its masters too."""
        module = self.make()
        if self.precision == "bf16":
            for parameter in module.parameters():
                parameter.data = parameter.data.bfloat16().float()
        return module
