"""One optimizer step, on one screen.

A global batch and frozen teachers enter; updated weights and the batch's sums leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from babyllama_ds import ranks
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.losses.agreement import Agreement
from babyllama_ds.spec.job import derive_seed
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.training.batches import Batch
from babyllama_ds.training.breakdown import UNMEASURED, Parts
from babyllama_ds.training.objective import Counts, Objective


@dataclass(frozen=True)
class StepSums:
    """This rank's unweighted sums over the batch, still on the device, and the global divisors."""

    ce_sum: Tensor
    kl_sum: Tensor
    counts: Counts
    agreement: Agreement | None
    """None unless it was asked for."""


def train_step(
    engine: TrainingEngine,
    objective: Objective,
    ensemble: Ensemble | None,
    batch: Batch,
    *,
    rate: float,
    seed: int,
    step: int,
    watch: bool = False,
    parts: Parts = UNMEASURED,
) -> StepSums:
    """Forward, backward and update on one global batch, at learning rate `rate`.

    With `watch`, how teachers and student agree is measured too (`losses.agreement`), on all of
    the batch: a part of it, such as one micro-batch, would be another part on other ranks. Where
    heads are large beside the models (student 256×6, two teachers 384×8, vocabulary 8192), such a
    step takes 1.3 times as long, which is 3 % at the usual tenth of the steps.

    `parts` is told which part of the step runs (`breakdown`).
    """
    counts = objective.counts(
        batch, num_ranks=ranks.world_size(), accumulation_steps=engine.accumulation_steps
    )
    ce_sums, kl_sums, agreements = [], [], []
    for number, micro in enumerate(batch.micro_batches):
        # Dropout is a function of (seed, step, rank, micro-batch): resuming needs no RNG state.
        torch.manual_seed(derive_seed(seed, f"dropout/{step}/{ranks.rank()}/{number}"))
        with parts.part("teachers"):
            targets = ensemble.targets(micro) if ensemble else []
        with parts.part("loss"):
            result = engine.forward(micro, targets, counts, watch=watch)
        with parts.part("backward"):
            engine.backward(result.loss)
        with parts.part("optimizer"):
            engine.step(rate)
        ce_sums.append(result.ce_sum)
        kl_sums.append(result.kl_sum)
        if result.agreement is not None:
            agreements.append(result.agreement)
    return StepSums(
        torch.stack(ce_sums).sum(),
        torch.stack(kl_sums).sum(),
        counts,
        reduce(Agreement.plus, agreements) if agreements else None,
    )
