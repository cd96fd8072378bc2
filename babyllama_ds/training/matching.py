"""The matching of hidden states, as a part of what is trained: projections, and the student's tap.

A job's pairs of layers, the student and the widths of its teachers enter; a module leaves whose
matrices are trained, saved and resumed with the student's own, and not exported with it.

Shapes: B windows, S positions, N = B * S, D width of the student, E of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from babyllama_ds.errors import JobError, Problem
from babyllama_ds.losses.matching import hidden_distance_sum
from babyllama_ds.losses.voters import TeacherStates
from babyllama_ds.models.layers import LayerTap, hidden_width
from babyllama_ds.spec.distillation import HiddenMatching, unknown_layers
from babyllama_ds.spec.job import derive_seed

WHERE = "distillation.hidden_matching"


class Matching(nn.Module):
    """A matrix W [E, D] for each pair of layers, drawn from the seed alone."""

    def __init__(
        self,
        spec: HiddenMatching,
        student: nn.Module,
        teacher_widths: Mapping[str, int],
        *,
        seed: int,
    ) -> None:
        """`teacher_widths`: of all teachers, in the order of the ensemble.

        Raises:
            ModelError: a student whose layers are not found.
        """
        super().__init__()
        names = list(teacher_widths)
        self.weight = spec.weight
        self.pairs = [
            (names.index(pair.teacher), pair.teacher_layer, pair.student_layer)
            for pair in spec.layers
        ]
        self._loss = spec.loss
        self.tap = LayerTap(student, [layer for *_, layer in self.pairs], where=WHERE)
        width = hidden_width(student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "hidden_matching"))
            self.projections = nn.ParameterList(
                nn.Parameter(torch.randn(teacher_widths[pair.teacher], width) / width**0.5)
                for pair in spec.layers
            )

    def forward(
        self,
        student: Mapping[int, Tensor],
        teachers: Sequence[TeacherStates],
        valid_N: Tensor,
    ) -> Tensor:
        """The distances, summed over pairs and valid positions; unweighted.

        `student` has [B, S, D] of each layer that is named.
        """
        distances = [
            hidden_distance_sum(
                student[student_layer].flatten(0, 1),
                weight_ED,
                teachers[k].layers_ND[teacher_layer],
                valid_N,
                self._loss,
            )
            for (k, teacher_layer, student_layer), weight_ED in zip(
                self.pairs, self.projections, strict=True
            )
        ]
        return torch.stack(distances).sum()


def check_layers(spec: HiddenMatching, depths: Mapping[str, int], student: int) -> None:
    """Check that the layers exist in models of these depths.

    Raises:
        JobError: those that do not.
    """
    problems = [
        Problem(
            where=f"{WHERE}.{_path(one.key)}",
            got=str(one.got),
            expected=one.expected,
            hint=one.hint,
        )
        for one in unknown_layers(spec, depths, student)
    ]
    if problems:
        raise JobError.all_of(problems)


def _path(key: tuple[str | int, ...]) -> str:
    layers, number, last = key
    return f"{layers}[{number}].{last}"
