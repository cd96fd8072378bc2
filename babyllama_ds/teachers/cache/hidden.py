"""A teacher remembered: its final hidden states of every distinct window, computed once.

Enters: a teacher and its windows. Leaves: a member of the ensemble that looks its states up
instead of computing them, and holds no more of the teacher than its head.

Shapes: B windows, S positions, D width, R bytes of a record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from babyllama_ds import ranks
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.voters import TeacherStates
from babyllama_ds.models.parts import HeadKind
from babyllama_ds.teachers.cache.build import Compute
from babyllama_ds.teachers.cache.check import check_head
from babyllama_ds.teachers.cache.heads import load_head
from babyllama_ds.teachers.cache.layout import Layout, padded_bytes
from babyllama_ds.teachers.cache.opening import CacheContext, Wanted, open_cache
from babyllama_ds.teachers.cache.records import Records
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput, lent, states_of
from babyllama_ds.teachers.ensemble import Windows


@dataclass(frozen=True, kw_only=True)
class RememberedMember:
    """A member of the ensemble whose states are read from a cache."""

    name: str
    weight: float
    head: Head
    records: Records

    def states(self, windows: Windows) -> TeacherStates:
        """Its states, as they were computed once."""
        records_BR = self.records.read(windows.windows_B)
        self.records.expect(windows.next_windows_B)
        length, width = windows.input_ids_BS.shape[1], self.head.weight_PD.shape[1]
        states_BX = records_BR.view(self.head.weight_PD.dtype)
        hidden_ND = states_BX[:, : length * width].reshape(-1, width)
        return TeacherStates(hidden_ND=hidden_ND, head=self.head, weight=self.weight)

    def destroy(self) -> None:
        """Free the records."""
        self.records.close()


def remember(teacher: Teacher, seen: TeacherInput, context: CacheContext) -> RememberedMember:
    """The teacher's states, from the store or computed now. A collective.

    Raises:
        ModelError: states that are not finite, with the teacher and the windows; or a teacher
            whose logits are not its head's product with its states.
        MachineError, RunError, Stopped: as `open_cache`.
    """
    head = ranks.on_every_rank(
        lambda: load_head(teacher.model_dir, device=context.device, dtype=seen.dtype)
    )
    width, length = head.weight_PD.shape[1], seen.windows.length
    wanted = Wanted(
        name=f"cache of teachers/{teacher.name}",
        key=ranks.on_rank_zero(lambda: seen.key(teacher)),
        layout=Layout.choose(
            num_windows=seen.num_windows,
            record_bytes=padded_bytes(length * width * seen.dtype.itemsize),
            forward_windows=seen.forward_windows,
        ),
        made_of={"holds": "hidden", "width": width, "length": length, "dtype": str(seen.dtype)},
        in_step=teacher.tensor_parallel > 1,
    )
    with lent([teacher]) as load:

        def make_compute() -> Compute:
            (model,) = load()
            # What stands in the store has a plain head, for nothing else gets there.
            kind: HeadKind = "logits" if model.head.states_are_logits else "plain"
            ranks.on_every_rank(lambda: check_head(kind, teacher=teacher.name))

            def compute(numbers_B: NDArray[np.int64]) -> Tensor:
                states = states_of(teacher, model, seen.windows, numbers_B, context.device)
                return _records(states)

            return compute

        records = open_cache(wanted, context, make_compute)
    return RememberedMember(name=teacher.name, weight=teacher.weight, head=head, records=records)


def _records(states_BSD: Tensor) -> Tensor:
    records_BR = states_BSD.flatten(1).view(torch.uint8)
    size = records_BR.shape[1]
    return functional.pad(records_BR, (0, padded_bytes(size) - size))
