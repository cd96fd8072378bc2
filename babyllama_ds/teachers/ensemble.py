"""The ensemble: frozen teachers and windows enter, targets leave.

A target is a teacher's final hidden states and its head: the loss forms logits chunk by chunk,
so no teacher's logits ever exist whole. A teacher computes its states (`Member`), or remembers
them (`cache.hidden.RememberedMember`).

Shapes: B windows, S positions, N = B * S, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.losses.distillation import TeacherStates, TopKTargets
from babyllama_ds.losses.heads import Head
from babyllama_ds.models.documents import Pieces

Targets = Sequence[TeacherStates] | TopKTargets
"""What a student learns from, for `distillation_loss`."""


class Windows(Protocol):
    """What `training.batches.MicroBatch` offers: one forward pass's windows."""

    @property
    def input_ids_BS(self) -> Tensor:  # noqa: N802 - named by its shape
        """The token ids, on the device."""

    @property
    def windows_B(self) -> NDArray[np.int64]:  # noqa: N802
        """The windows' numbers among all that differ."""

    @property
    def pieces(self) -> Pieces | None:
        """The documents in them, kept apart; none: windows are whole."""

    @property
    def next_windows_B(self) -> NDArray[np.int64]:  # noqa: N802
        """Those of the next forward pass; may be empty."""


class AnyMember(Protocol):
    """A teacher of the ensemble, however it comes by its states."""

    @property
    def name(self) -> str:
        """The teacher's name in the job."""

    @property
    def weight(self) -> float:
        """Its vote, relative to the other teachers' weights."""

    @property
    def head(self) -> Head:
        """Its output head, on the device."""

    def states(self, windows: Windows) -> TeacherStates:
        """Its states at every position, on the device, outside autograd."""

    def destroy(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Member:
    """A live teacher: its model runs on every window that comes."""

    name: str
    model: FrozenModel
    weight: float

    @property
    def head(self) -> Head:
        """Its output head."""
        return self.model.head

    def states(self, windows: Windows) -> TeacherStates:
        """Its states, those of the layers that its model was asked to keep included."""
        states_BSD, layers = self.model.hidden_states_and_layers(
            windows.input_ids_BS, windows.pieces
        )
        return TeacherStates(
            hidden_ND=states_BSD.flatten(0, 1),
            head=self.head,
            weight=self.weight,
            layers_ND={layer: each_BSD.flatten(0, 1) for layer, each_BSD in layers.items()},
        )

    def destroy(self) -> None:
        """Free the model."""
        self.model.destroy()


class Ensemble:
    """Several teachers on this rank's device; every rank sees its own windows."""

    def __init__(self, members: Sequence[AnyMember]) -> None:
        self.members = tuple(members)

    def targets(self, windows: Windows) -> Targets:
        """What the student learns from at every position: the members' states."""
        return self.states(windows)

    def states(self, windows: Windows) -> list[TeacherStates]:
        """Each member's states of every position."""
        return [member.states(windows) for member in self.members]

    def widths(self) -> dict[str, int]:
        """The width of each teacher's layers, of live teachers, in their order."""
        live = [member for member in self.members if isinstance(member, Member)]
        assert len(live) == len(self.members), "remembered teachers have no layers"
        return {member.name: member.model.width for member in live}

    def weight_bytes(self) -> int:
        """Bytes of live teachers' parameters, as this rank holds them."""
        live = [member for member in self.members if isinstance(member, Member)]
        return sum(weight.nbytes for member in live for weight in member.model.module.parameters())

    def closing_facts(self, student: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        """What the student's summary should say of its targets: nothing, for they are exact."""
        return {}

    def destroy(self) -> None:
        """Free every teacher."""
        for member in self.members:
            member.destroy()
        self.members = ()
