"""Numbers that are not finite: where they were met enters; the error that names its cause leaves.

The teachers to blame, by their windows, or else the student, and where good weights still are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from babyllama_ds import ranks
from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.errors import Problem, TrainingError
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.teachers.watch import broken_windows
from babyllama_ds.training.batches import Batch


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """Words the errors of one training in which a number is not finite."""

    stage: str
    """Its name."""
    vocab_size: int
    ensemble: Ensemble | None
    checkpoints: CheckpointFolder

    def in_batch(self, what: str, batch: Batch, *, step: int) -> TrainingError:
        """The error of a step, counted from 1 as in the metrics. A collective."""
        where = f"{self.stage}: step {step}"
        broken = self._broken_teachers(batch)
        if broken:
            return TrainingError.all_of(
                [
                    Problem(
                        where=where,
                        got=f"logits of teacher {name} that are not finite, in "
                        f"epoch {batch.epoch}, windows {_listed(windows)}",
                        expected="finite numbers",
                        hint=f"the weights of {name} are damaged, or its training had diverged: "
                        "train it again, or leave it out",
                    )
                    for name, windows in broken.items()
                ]
            )
        return TrainingError.of(
            where,
            got=f"{what} that is not finite, in epoch {batch.epoch}, "
            f"windows {_listed(batch.window_ids)}",
            expected="finite numbers",
            hint=self._hint(),
        )

    def in_evaluation(self, *, step: int) -> TrainingError:
        """The error of an evaluation after this step, whose update overflowed the weights."""
        return TrainingError.of(
            f"{self.stage}: step {step}",
            got="a development cross-entropy that is not finite",
            expected="finite numbers",
            hint=self._hint(),
        )

    def _broken_teachers(self, batch: Batch) -> dict[str, NDArray[np.int64]]:
        """Teachers with logits that are not finite on this batch, and the windows, of all ranks.

        The teachers run once more: nothing of them is kept during a step.
        """
        if self.ensemble is None or not self.ensemble.members:
            return {}
        ensemble = self.ensemble
        own_MKB = ranks.on_every_rank(
            lambda: [
                broken_windows(
                    ensemble.states(micro),
                    micro.valid_N,
                    len(micro.input_ids_BS),
                    vocab_size=self.vocab_size,
                )
                for micro in batch.micro_batches
            ]
        )
        # A batch is dealt out micro-batch by micro-batch, rank by rank, its padding last.
        broken_KMRB = np.stack(ranks.gather_objects(np.stack(own_MKB))).transpose(2, 1, 0, 3)
        return {
            member.name: batch.window_ids[broken_MRB.reshape(-1)[: batch.num_windows]]
            for member, broken_MRB in zip(ensemble.members, broken_KMRB, strict=True)
            if broken_MRB.any()
        }

    def _hint(self) -> str:
        return (
            "lower the learning rate or lengthen the warm-up; last good checkpoint: "
            f"{self.checkpoints.newest_name()}"
        )


def _listed(windows: NDArray[np.int64]) -> str:
    return ", ".join(map(str, windows.tolist()))
