"""What the engine wraps: a model with its loss, so that logits never leave the forward pass.

Shapes: B windows, S positions, N = B * S, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from babyllama_ds.engine.compiling import compiled
from babyllama_ds.losses.agreement import Agreement, measure_agreement
from babyllama_ds.losses.distillation import (
    TeacherStates,
    TopKTargets,
    cross_entropy_loss,
    distillation_loss,
)
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.weights import loss_counts
from babyllama_ds.models.parts import Backbone, split_causal_lm
from babyllama_ds.models.recomputing import recompute_layers
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.ensemble import Targets
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
    agreement: Agreement | None = None


class Objective(nn.Module):
    """A causal LM whose forward pass ends in its loss; without `distillation`, in plain CE."""

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int,
        distillation: DistillationSpec | None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if gradient_checkpointing:
            recompute_layers(model)
        self.model = model
        self.vocab_size = vocab_size
        self.distillation = distillation
        self._states = _states

    def compile_backbone(self) -> None:
        """Let torch compile the backbone where it is trained.

        Not the losses, which are fused by hand, and not the whole of `forward`, which would be
        compiled anew for every other count of a batch. The module stays as it is: evaluation, with
        its other shapes, is not compiled, and no parameter changes its name.
        """
        self._states = compiled(_states)

    def forward(
        self,
        micro: MicroBatch,
        teachers: Targets,
        counts: Counts,
        *,
        watch: bool = False,
    ) -> LossParts:
        """The micro-batch's part of the global batch's loss.

        With `watch`, how student and teachers agree is measured beside it.
        """
        backbone, head = split_causal_lm(self.model)
        hidden_ND = self._states(backbone, micro.input_ids_BS).flatten(0, 1)
        if self.distillation is None:
            plain = cross_entropy_loss(
                hidden_ND,
                head,
                micro.labels_N,
                ce_count=counts.ce,
                scale=counts.scale,
                vocab_size=self.vocab_size,
            )
            loss = _felt_by_the_gradient(plain.loss)
            return LossParts(loss, plain.ce_sum, torch.zeros_like(plain.ce_sum))
        agreement = None
        if watch:
            assert not isinstance(teachers, TopKTargets), "no teachers are there to be watched"
            agreement = self._agreement(hidden_ND, head, micro, teachers)
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
        loss = _felt_by_the_gradient(distilled.loss)
        return LossParts(loss, distilled.ce_sum, distilled.kl_sum, agreement)

    def _agreement(
        self, hidden_ND: Tensor, head: Head, micro: MicroBatch, teachers: Sequence[TeacherStates]
    ) -> Agreement:
        assert self.distillation is not None, "without teachers there is nothing to watch"
        return measure_agreement(
            hidden_ND.detach(),
            head,
            micro.labels_N,
            micro.valid_N,
            teachers,
            mean_of=self.distillation.mean_of,
            vocab_size=self.vocab_size,
            chunk_tokens=self.distillation.chunk_tokens,
        )

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


def _states(backbone: Backbone, input_ids_BS: Tensor) -> Tensor:
    return backbone(input_ids_BS)


def _felt_by_the_gradient(loss: Tensor) -> Tensor:
    """The same loss to the bit, with a gradient that is not finite where the loss is not.

    The engine looks at the gradient of every step, but nobody at a loss that is not logged. And
    a teacher's logit of −inf makes the KL NaN and yet leaves a finite gradient.
    """
    return loss * (1 + 0 * loss.detach())


def engine_scale(num_ranks: int, accumulation_steps: int) -> float:
    """What undoes the engine's own division.

    Sums are already divided by the global batch's counts, but DeepSpeed divides a loss by the
    accumulation steps and averages gradients over ranks.
    """
    return float(num_ranks * accumulation_steps)
