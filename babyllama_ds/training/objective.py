"""What the engine wraps: a model with its loss, so that logits never leave the forward pass.

Shapes: B windows, S positions, N = B * S, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from babyllama_ds.losses.distillation import (
    TeacherStates,
    cross_entropy_loss,
    distillation_loss,
)
from babyllama_ds.losses.weights import loss_counts
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.spec.job import DistillationSpec
from babyllama_ds.training.batches import Batch, MicroBatch


@dataclass(frozen=True)
class Counts:
    """What the sums of a global batch are divided by, and the engine's own division undone."""

    ce: int
    kl: int
    scale: float


class LossParts(NamedTuple):
    """The loss to go backward from, and unweighted sums over this rank's positions."""

    loss: Tensor
    ce_sum: Tensor
    kl_sum: Tensor


class Objective(nn.Module):
    """A causal LM whose forward pass ends in its loss; without `distillation`, in plain CE."""

    def __init__(
        self, model: nn.Module, *, vocab_size: int, distillation: DistillationSpec | None
    ) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.distillation = distillation

    def forward(
        self, micro: MicroBatch, teachers: Sequence[TeacherStates], counts: Counts
    ) -> LossParts:
        """The micro-batch's part of the global batch's loss."""
        backbone, head = split_causal_lm(self.model)
        hidden_ND = backbone(micro.input_ids_BS).flatten(0, 1)
        if self.distillation is None:
            plain = cross_entropy_loss(
                hidden_ND,
                head,
                micro.labels_N,
                ce_count=counts.ce,
                scale=counts.scale,
                vocab_size=self.vocab_size,
            )
            return LossParts(plain.loss, plain.ce_sum, torch.zeros_like(plain.ce_sum))
        distilled = distillation_loss(
            hidden_ND,
            head,
            micro.labels_N,
            micro.valid_N,
            teachers,
            alpha=self.distillation.alpha,
            temperature=self.distillation.temperature,
            mean_of=self.distillation.mean_of,
            ce_count=counts.ce,
            kl_count=counts.kl,
            scale=counts.scale,
            vocab_size=self.vocab_size,
            chunk_tokens=self.distillation.chunk_tokens,
        )
        return LossParts(distilled.loss, distilled.ce_sum, distilled.kl_sum)

    def counts(self, batch: Batch, *, num_ranks: int, accumulation_steps: int) -> Counts:
        """The divisors of a global batch."""
        reduction = self.distillation.soft_reduction if self.distillation else "token"
        ce, kl = loss_counts(batch.num_labelled, batch.num_windows, batch.num_valid, reduction)
        return Counts(ce, kl, engine_scale(num_ranks, accumulation_steps))

    def value(self, ce_sum: float, kl_sum: float, counts: Counts) -> float:
        """L of the global batch, from sums over all ranks: for logs."""
        if self.distillation is None:
            return ce_sum / counts.ce
        alpha, temperature = self.distillation.alpha, self.distillation.temperature
        soft = temperature**2 * kl_sum / counts.kl
        return alpha * ce_sum / counts.ce + (1 - alpha) * soft


def engine_scale(num_ranks: int, accumulation_steps: int) -> float:
    """What undoes the engine's own division.

    Sums are already divided by the global batch's counts, but DeepSpeed divides a loss by the
    accumulation steps and averages gradients over ranks.
    """
    return float(num_ranks * accumulation_steps)
