"""The ensemble that the student learns from, remembered: the job's choice enters, targets leave."""

from __future__ import annotations

from collections.abc import Sequence

from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.cache.hidden import remember
from babyllama_ds.teachers.cache.opening import CacheContext
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput
from babyllama_ds.teachers.cache.topk import remember_top_k
from babyllama_ds.teachers.ensemble import Ensemble


def remembered_ensemble(
    loss: DistillationSpec,
    teachers: Sequence[Teacher],
    seen: TeacherInput,
    context: CacheContext,
) -> Ensemble:
    """Teachers whose states (`hidden`) or mixture (`topk`) are computed once. A collective.

    Raises:
        ModelError, MachineError, RunError, Stopped: as `hidden.remember` and
            `topk.remember_top_k`.
    """
    if loss.cache == "topk":
        return remember_top_k(loss, teachers, seen, context)
    return Ensemble([remember(teacher, seen, context) for teacher in teachers])
