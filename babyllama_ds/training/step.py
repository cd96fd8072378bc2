"""One optimizer step, on one screen.

A global batch and frozen teachers enter; updated weights and the batch's sums leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from babyllama_ds import ranks
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.spec.job import derive_seed
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.training.batches import Batch
from babyllama_ds.training.objective import Counts, Objective


@dataclass(frozen=True)
class StepSums:
    """This rank's unweighted sums over the batch, still on the device, and the global divisors."""

    ce_sum: Tensor
    kl_sum: Tensor
    counts: Counts


def train_step(
    engine: TrainingEngine,
    objective: Objective,
    ensemble: Ensemble | None,
    batch: Batch,
    *,
    rate: float,
    seed: int,
    step: int,
) -> StepSums:
    """Forward, backward and update on one global batch, at learning rate `rate`."""
    counts = objective.counts(
        batch, num_ranks=ranks.world_size(), accumulation_steps=engine.accumulation_steps
    )
    ce_sums, kl_sums = [], []
    for number, micro in enumerate(batch.micro_batches):
        # Dropout is a function of (seed, step, rank, micro-batch): resuming needs no RNG state.
        torch.manual_seed(derive_seed(seed, f"dropout/{step}/{ranks.rank()}/{number}"))
        targets = ensemble.targets(micro.input_ids_BS) if ensemble else []
        parts = engine.forward(micro, targets, counts)
        engine.backward(parts.loss)
        engine.step(rate)
        ce_sums.append(parts.ce_sum)
        kl_sums.append(parts.kl_sum)
    return StepSums(torch.stack(ce_sums).sum(), torch.stack(kl_sums).sum(), counts)
