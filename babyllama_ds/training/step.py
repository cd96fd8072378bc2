"""One optimizer step, on one screen.

A global batch and frozen teachers enter; updated weights and the batch's sums leave.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from babyllama_ds.training.breakdown import PartTimer, untimed
from babyllama_ds.training.objective import Counts, Objective, Totals


@dataclass(frozen=True)
class StepSums:
    """This rank's unweighted sums over the batch, still on the device, and the global divisors."""

    ce_sum: Tensor
    kl_sum: Tensor
    counts: Counts
    agreement: Agreement | None
    """None unless it was asked for."""
    z_sum: Tensor | None = None
    matching_sum: Tensor | None = None
    """As those of `LossParts`."""

    def over_all_ranks(self) -> Totals:
        """Their sums over ranks. A collective, which waits for the device."""
        terms = (self.ce_sum, self.kl_sum, self.z_sum, self.matching_sum)
        return Totals(*ranks.sum_floats(*(0.0 if t is None else t.item() for t in terms)))


def train_step(
    engine: TrainingEngine,
    objective: Objective,
    ensemble: Ensemble | None,
    batch: Batch,
    *,
    rate: float,
    seed: int,
    step: int,
    done: float = 0.0,
    watch: bool = False,
    timed: PartTimer = untimed,
) -> StepSums:
    """Forward, backward and update on one global batch, at learning rate `rate`.

    With `watch`, how teachers and student agree is measured too (`losses.agreement`), on all of
    the batch: a part of it, such as one micro-batch, would be another part on other ranks. Where
    heads are large beside the models (student 256×6, two teachers 384×8, vocabulary 8192), such a
    step takes 1.3 times as long, which is 3 % at the usual tenth of the steps.

    `done` is the share of the training's steps before this one, for what changes in their course.
    Each part of the step runs inside `timed` of its name (`breakdown`).
    """
    counts = objective.counts(
        batch,
        num_ranks=ranks.world_size(),
        accumulation_steps=engine.accumulation_steps,
        done=done,
    )
    results = []
    for number, micro in enumerate(batch.micro_batches):
        # Dropout is a function of (seed, step, rank, micro-batch): resuming needs no RNG state.
        seed_device(
            derive_seed(seed, f"dropout/{step}/{ranks.rank()}/{number}"), micro.input_ids_BS.device
        )
        with timed("teachers"):
            targets = ensemble.targets(micro) if ensemble else []
        with timed("loss"):
            result = engine.forward(micro, targets, counts, watch=watch)
        with timed("backward"):
            engine.backward(result.loss)
        with timed("optimizer"):
            engine.step(rate)
        # Without the graph, which backward has freed the most of.
        results.append(result._replace(loss=result.loss.detach()))
    agreements = [each.agreement for each in results if each.agreement is not None]
    return StepSums(
        torch.stack([each.ce_sum for each in results]).sum(),
        torch.stack([each.kl_sum for each in results]).sum(),
        counts,
        reduce(Agreement.plus, agreements) if agreements else None,
        _sum_of([each.z_sum for each in results]),
        _sum_of([each.matching_sum for each in results]),
    )


def seed_device(seed: int, device: torch.device) -> None:
    """`torch.manual_seed`, for the CPU's and this device's generator alone.

    It would seed all that torch knows of, and keep a printed stack for each kind of device that is
    not in use: 90 µs of this.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def _sum_of(sums: Sequence[Tensor | None]) -> Tensor | None:
    """The sum over micro-batches; none where there is no such term."""
    given = [each for each in sums if each is not None]
    return torch.stack(given).sum() if given else None
