"""Whose logits the losses form: the teachers' final hidden states enter; voters leave, and how the
teachers' mixture p is made of their logits (`mixture.py`).

Each teacher is a voter of its own. But of raw logits of equal votes nothing is ever wanted but the
sum, and one product makes that: all teachers are one voter.

Shapes: N positions (batch and time, flattened), C positions of a chunk, D hidden size (each model
its own), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from babyllama_ds.losses.heads import Head, logits_into
from babyllama_ds.losses.mixture import MeanOf, Mixture


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's final hidden states on the student's positions, and the weight of its vote."""

    hidden_ND: Tensor
    head: Head
    weight: float = 1.0
    layers_ND: Mapping[int, Tensor] = field(default_factory=dict)
    """States of other layers, by number (`models.layers`), for their own term of the loss."""


def mixture_of(
    teachers: Sequence[TeacherStates], *, temperature: float, mean_of: MeanOf
) -> Mixture:
    """The mean that these teachers' weights make."""
    total_weight = sum(teacher.weight for teacher in teachers)
    return Mixture(
        shares=tuple(teacher.weight / total_weight for teacher in teachers),
        temperature=temperature,
        mean_of=mean_of,
    )


def voters_of(
    teachers: Sequence[TeacherStates], mixture: Mixture, vocab_size: int
) -> tuple[list[Voter], Mixture]:
    """Whose logits are formed, and how p is made of them: one for all teachers where that does."""
    weights = [teacher.weight for teacher in teachers]
    if votes_are_summed(mixture.mean_of, weights) and _can_be_summed(teachers):
        summed = replace(mixture, shares=mixture.shares[:1])
        return [Voter.of(teachers, vocab_size)], summed
    return [Voter.of([teacher], vocab_size) for teacher in teachers], mixture


def votes_are_summed(mean_of: str, weights: Sequence[float]) -> bool:
    """Whether teachers of such votes are taken as one `Voter`, if their heads are plain.

    Equal votes only: others would have to be rounded into the states.
    """
    return mean_of == "logits" and len(weights) > 1 and len(set(weights)) == 1


@dataclass(frozen=True)
class Voter:
    """Teachers whose logits are only ever wanted summed, as one: one product makes the sum.

    Their states side by side, times their heads side by side. Of one teacher: the teacher.
    """

    teachers: tuple[TeacherStates, ...]
    head: Head

    @classmethod
    def of(cls, teachers: Sequence[TeacherStates], vocab_size: int) -> Voter:
        """The sum of these teachers; their heads are copied, in the vocabulary's rows."""
        if len(teachers) == 1:
            return cls(tuple(teachers), teachers[0].head)
        rows = [teacher.head.rows(vocab_size) for teacher in teachers]
        biases_V = [bias_V for _, bias_V in rows if bias_V is not None]
        return cls(
            tuple(teachers),
            Head(
                torch.cat([weight_VD for weight_VD, _ in rows], dim=1),
                torch.stack(biases_V).sum(0) if biases_V else None,
            ),
        )

    @property
    def hidden_ND(self) -> Tensor:  # noqa: N802 - named by its shape
        """The first teacher's states: the dtype and the device of all."""
        return self.teachers[0].hidden_ND

    def logits_into(
        self, buffer_CV: Tensor, rows: slice, unused_C1: Tensor | None = None
    ) -> Tensor:
        """Logits of these positions, written into the buffer; unused ones as of states of 0."""
        states_CD = torch.cat([teacher.hidden_ND[rows] for teacher in self.teachers], dim=1)
        if unused_C1 is not None:
            states_CD.masked_fill_(unused_C1, 0)
        return logits_into(buffer_CV, states_CD, self.head)


def _can_be_summed(teachers: Sequence[TeacherStates]) -> bool:
    """Whether one product makes the sum of their logits."""
    return len({teacher.hidden_ND.dtype for teacher in teachers}) == 1 and not any(
        teacher.head.states_are_logits for teacher in teachers
    )
