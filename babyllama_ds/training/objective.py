"""What the engine wraps: a model with its loss, so that logits never leave the forward pass.

    L = α CE + (1 − α) T² D + w_z (log Z)² + w_h matching

with D the divergence of the job (`losses.divergences`), and the last two where it asks for them
(`losses.distillation`, `losses.matching`); each is a mean by the counts of the global batch.

Shapes: B windows, S positions, N = B * S, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from babyllama_ds.losses.agreement import Agreement, measure_agreement
from babyllama_ds.losses.distillation import (
    TeacherStates,
    TopKTargets,
    cross_entropy_loss,
    distillation_loss,
)
from babyllama_ds.losses.divergences import FORWARD_KL, Divergence
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.weights import loss_counts
from babyllama_ds.models.compiled import CompiledLayers
from babyllama_ds.models.documents import Pieces
from babyllama_ds.models.layers import LayerTap
from babyllama_ds.models.parts import Backbone, split_causal_lm
from babyllama_ds.models.recomputing import recompute_layers
from babyllama_ds.spec.distillation import (
    DistillationSpec,
    DivergenceSpec,
    JensenShannon,
    SkewedForwardKL,
    SkewedReverseKL,
    scheduled,
)
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.ensemble import Ensemble, Targets
from babyllama_ds.training.batches import Batch, MicroBatch
from babyllama_ds.training.matching import Matching


@dataclass(frozen=True)
class Balance:
    """α and T at one step: a job may have them change in the course of a training."""

    alpha: float
    temperature: float


@dataclass(frozen=True)
class Counts:
    """What the sums of a global batch are divided by, and the engine's own division undone."""

    ce: int
    kl: int
    scale: float
    valid: int = 1
    """Valid positions, for the matching of hidden states."""
    balance: Balance | None = None
    """That of this step; none: that of the first step."""


class Totals(NamedTuple):
    """Unweighted sums over the global batch; 0 of a term that the loss does not have."""

    ce: float
    kl: float
    z: float = 0.0
    matching: float = 0.0


class LossParts(NamedTuple):
    """The loss to go backward from, and unweighted sums over this rank's positions."""

    loss: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    agreement: Agreement | None = None
    z_sum: Tensor | None = None
    """The sum of (log Z)²; none without a z-loss."""
    matching_sum: Tensor | None = None
    """The sum of distances of hidden states, over pairs of layers; none: they are not matched."""


class Objective(nn.Module):
    """A causal LM whose forward pass ends in its loss; without `distillation`, in plain CE."""

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int,
        distillation: DistillationSpec | None,
        z_loss: float | None = None,
        matching: Matching | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if gradient_checkpointing:
            recompute_layers(model)
        self.model = model
        self.vocab_size = vocab_size
        self.distillation = distillation
        self.z_loss = z_loss or 0.0
        self.matching = matching
        self._compiled: CompiledLayers | None = None

    def release(self) -> None:
        """Leave the model as it was: without hooks, not compiled."""
        if self.matching is not None:
            self.matching.tap.remove()
        if self._compiled is not None:
            self._compiled.remove()

    def compile_layers(self) -> None:
        """Let torch compile the model's layers where they are trained.

        Not the losses, which are fused by hand, and not the whole of `forward`, which would be
        compiled anew for every other count of a batch.
        """
        self._compiled = CompiledLayers(self.model, training=True)

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
        tap = None if self.matching is None else self.matching.tap
        hidden_BSD, layers = _states(backbone, micro.input_ids_BS, micro.pieces, tap)
        hidden_ND = hidden_BSD.flatten(0, 1)
        if self.distillation is None:
            return self._plain(hidden_ND, head, micro, counts)
        agreement = None
        if watch:
            assert not isinstance(teachers, TopKTargets), "no teachers are there to be watched"
            agreement = self._agreement(hidden_ND, head, micro, teachers)
        balance = counts.balance or self.balance(0.0)
        assert balance is not None, "a distilled objective has one"
        distilled = distillation_loss(
            hidden_ND,
            head,
            micro.labels_N,
            micro.valid_N,
            teachers,
            alpha=balance.alpha,
            temperature=balance.temperature,
            mean_of=self.distillation.mean_of,
            ce_count=counts.ce,
            kl_count=counts.kl,
            scale=counts.scale,
            vocab_size=self.vocab_size,
            chunk_tokens=self.distillation.chunk_tokens,
            divergence=divergence_of(self.distillation.divergence),
            z_loss=self.z_loss,
        )
        loss, matched = distilled.loss, self._matched(layers, teachers, micro)
        if matched is not None and self.matching is not None:
            loss = loss + matched * (self.matching.weight * counts.scale / counts.valid)
        return LossParts(
            _felt_by_the_gradient(loss),
            distilled.ce_sum,
            distilled.kl_sum,
            agreement,
            distilled.z_sum,
            None if matched is None else matched.detach(),
        )

    def _plain(self, hidden_ND: Tensor, head: Head, micro: MicroBatch, counts: Counts) -> LossParts:
        plain = cross_entropy_loss(
            hidden_ND,
            head,
            micro.labels_N,
            ce_count=counts.ce,
            scale=counts.scale,
            vocab_size=self.vocab_size,
            z_loss=self.z_loss,
        )
        loss = _felt_by_the_gradient(plain.loss)
        return LossParts(loss, plain.ce_sum, torch.zeros_like(plain.ce_sum), z_sum=plain.z_sum)

    def _matched(
        self, layers: Mapping[int, Tensor], teachers: Targets, micro: MicroBatch
    ) -> Tensor | None:
        if self.matching is None:
            return None
        assert not isinstance(teachers, TopKTargets), "no teachers are there to be matched"
        distances: Tensor = self.matching(layers, teachers, micro.valid_N)
        return distances

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

    # -- numbers of a step ------------------------------------------------------------------------

    def balance(self, done: float) -> Balance | None:
        """α and T when this share of the training's steps is done; none without teachers."""
        if self.distillation is None:
            return None
        return Balance(
            alpha=scheduled(self.distillation.alpha, done),
            temperature=scheduled(self.distillation.temperature, done),
        )

    def counts(
        self, batch: Batch, *, num_ranks: int, accumulation_steps: int, done: float = 0.0
    ) -> Counts:
        """The divisors of a global batch; `done`: share of the training's steps before it."""
        reduction = self.distillation.soft_reduction if self.distillation else "token"
        ce, kl = loss_counts(batch.num_labelled, batch.num_windows, batch.num_valid, reduction)
        return Counts(
            ce,
            kl,
            engine_scale(num_ranks, accumulation_steps),
            valid=max(1, batch.num_valid),
            balance=self.balance(done),
        )

    def measures(self, totals: Totals, counts: Counts) -> dict[str, float]:
        """The terms of the loss, each a mean, unweighted: for logs."""
        found = {"ce": totals.ce / counts.ce}
        if self.distillation is not None:
            name = self.distillation.divergence.kind
            found["kl" if name == "forward_kl" else name] = totals.kl / counts.valid
        if self.z_loss:
            found["log_z_squared"] = totals.z / counts.ce
        if self.matching is not None:
            found["hidden_distance"] = totals.matching / counts.valid
        if self.distillation is not None and self.distillation.is_scheduled:
            assert counts.balance is not None, "not the counts of a step"
            found |= asdict(counts.balance)
        return found

    def value(self, totals: Totals, counts: Counts) -> float:
        """L of the global batch: for logs."""
        of_z = self.z_loss * totals.z / counts.ce
        balance = counts.balance or self.balance(0.0)
        if balance is None:
            return totals.ce / counts.ce + of_z
        alpha, temperature = balance.alpha, balance.temperature
        soft = temperature**2 * totals.kl / counts.kl
        weight = 0.0 if self.matching is None else self.matching.weight
        of_layers = weight * totals.matching / counts.valid
        return alpha * totals.ce / counts.ce + (1 - alpha) * soft + of_z + of_layers


def objective_of(
    model: nn.Module,
    ensemble: Ensemble | None,
    *,
    vocab_size: int,
    training: TrainingSpec,
    distillation: DistillationSpec | None,
    seed: int,
) -> Objective:
    """The objective that a job describes; `seed` is the stage's.

    Raises:
        ModelError: hidden states are to be matched, and the student's layers are not found.
    """
    asked = None if distillation is None else distillation.hidden_matching
    matching = None
    if asked is not None and ensemble is not None:
        matching = Matching(asked, model, ensemble.widths(), seed=seed)
    return Objective(
        model,
        vocab_size=vocab_size,
        distillation=distillation,
        z_loss=training.z_loss,
        matching=matching,
        gradient_checkpointing=training.gradient_checkpointing,
    )


def divergence_of(spec: DivergenceSpec) -> Divergence:
    """The job's divergence, as the losses know it."""
    match spec:
        case JensenShannon():
            return Divergence(spec.kind, teachers_share=spec.beta)
        case SkewedForwardKL():
            return Divergence(spec.kind, teachers_share=spec.skew)
        case SkewedReverseKL():
            return Divergence(spec.kind, teachers_share=1 - spec.skew)
        case _:
            return FORWARD_KL if spec.kind == "forward_kl" else Divergence(spec.kind)


def _states(
    backbone: Backbone, input_ids_BS: Tensor, pieces: Pieces | None, tap: LayerTap | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Final hidden states, and those of the layers that are tapped."""
    if tap is None:
        return backbone(input_ids_BS, pieces), {}
    return tap.collect(lambda: backbone(input_ids_BS, pieces))


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
