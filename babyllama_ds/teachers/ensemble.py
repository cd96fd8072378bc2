"""The ensemble: frozen models in inference engines; windows enter, targets leave.

A target is a teacher's final hidden states and its head: the loss forms logits chunk by chunk,
so no teacher's logits ever exist whole.

Shapes: B windows, S positions, N = B * S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.losses.distillation import TeacherStates


@dataclass(frozen=True)
class Member:
    """A frozen teacher and its share of the ensemble."""

    name: str
    model: FrozenModel
    weight: float


class Ensemble:
    """Several teachers on this rank's device; every rank sees its own windows."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)

    def targets(self, input_ids_BS: Tensor) -> list[TeacherStates]:
        """Each teacher's states of every position, for `distillation_loss`."""
        return [
            TeacherStates(
                hidden_ND=member.model.hidden_states(input_ids_BS).flatten(0, 1),
                head=member.model.head,
                weight=member.weight,
            )
            for member in self.members
        ]

    def destroy(self) -> None:
        """Free every teacher."""
        for member in self.members:
            member.model.destroy()
        self.members = ()
