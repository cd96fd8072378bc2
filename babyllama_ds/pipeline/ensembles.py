"""The teachers' ensemble: their model directories enter; one that computes or remembers leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from babyllama_ds import ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.models.build import count_parameters, load_model
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.job import TeacherSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache.layout import padded_bytes
from babyllama_ds.teachers.cache.opening import CacheContext
from babyllama_ds.teachers.cache.remembered import remembered_ensemble
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput
from babyllama_ds.teachers.cache.tiers import (
    TRAINED_BYTES_A_PARAMETER,
    Room,
    held_where_computed,
)
from babyllama_ds.teachers.cache.topk import record_bytes
from babyllama_ds.teachers.ensemble import Ensemble, Member


def live_ensemble(setup: JobSetup, teachers: dict[str, Path], *, compiled: bool) -> Ensemble:
    """The ensemble computed in every step; `compiled`: by torch's compiler, but for teachers that
    are split over ranks, whose layers wait for each other.
    """
    return Ensemble(
        [
            Member(
                spec.name,
                frozen_teacher(
                    setup,
                    spec,
                    teachers[spec.name],
                    compiled=compiled and spec.tensor_parallel == 1,
                    layers=matched_layers(setup.job.distillation, spec.name),
                ),
                spec.weight,
            )
            for spec in setup.job.teachers
        ]
    )


def cached_ensemble(
    setup: JobSetup,
    student: nn.Module,
    training: TrainingSpec,
    corpus: Corpus,
    teachers: dict[str, Path],
    *,
    store: Store,
    storages: Storages,
    stop: StopRequest,
) -> Ensemble:
    """The ensemble computed once for each distinct window, or found in the store. A collective."""
    return remembered_ensemble(
        setup.job.distillation,
        [
            Teacher(
                name=spec.name,
                weight=spec.weight,
                model_dir=teachers[spec.name].resolve(),
                attention=setup.attention(f"teachers/{spec.name}", spec.model, training=False),
                load=partial(frozen_teacher, setup, spec, teachers[spec.name]),
                tensor_parallel=spec.tensor_parallel,
            )
            for spec in setup.job.teachers
        ],
        TeacherInput(
            windows=setup.windows(corpus, seed=0),  # what is distinct depends on no seed
            tokens_dir=corpus.entries.tokens_dir,
            vocab_size=len(corpus.tokenizer),
            dtype=setup.dtype,
            forward_windows=setup.micro_batch("student", training),
        ),
        CacheContext(
            store=store,
            storages=storages,
            stop=stop,
            device=setup.device,
            tier=setup.job.distillation.cache_tier,
            kept=setup.job.distillation.cache_kept,
            student_bytes=TRAINED_BYTES_A_PARAMETER * count_parameters(student),
        ),
    )


def cache_to_come(
    setup: JobSetup, student: nn.Module, corpus: Corpus, live: Ensemble, room: Room
) -> int:
    """Bytes that the cache will take where the student is trained, beyond these live teachers',
    which are gone by then; 0 without a cache. `room`: before they were loaded.

    Raises:
        MachineError: a tier that was asked for by name does not fit.
    """
    loss, length = setup.job.distillation, setup.job.windows.length
    if loss.cache == "none":
        return 0
    windows = setup.windows(corpus, seed=0).num_distinct
    assert windows is not None, "the spec refuses a cache of random windows"
    if loss.cache == "topk":
        records = [record_bytes(loss.cache_top_k, length, len(corpus.tokenizer))]
    else:
        widths = [member.head.weight_PD.shape[1] for member in live.members]
        records = [padded_bytes(length * width * setup.dtype.itemsize) for width in widths]
    cached = held_where_computed(
        loss.cache_tier,
        [windows * each for each in records],
        room,
        student_bytes=TRAINED_BYTES_A_PARAMETER * count_parameters(student),
    )
    return max(0, cached - live.weight_bytes())


def matched_layers(loss: DistillationSpec, teacher: str) -> list[int]:
    """The layers of a teacher whose states the loss asks for."""
    pairs = loss.hidden_matching.layers if loss.hidden_matching else ()
    return [pair.teacher_layer for pair in pairs if pair.teacher == teacher]


def frozen_teacher(
    setup: JobSetup,
    spec: TeacherSpec,
    path: Path,
    *,
    compiled: bool = False,
    layers: Sequence[int] = (),
) -> FrozenModel:
    """A teacher's model directory, loaded. A collective: where one rank cannot, all say so."""
    where = f"teachers/{spec.name}"
    attention = setup.attention(where, spec.model, training=False)

    def load() -> nn.Module:
        return load_model(str(path.resolve()), attention=attention, where=where, dtype=setup.dtype)

    return FrozenModel(
        ranks.on_every_rank(load),
        device=setup.device,
        dtype=setup.dtype,
        with_compiler=compiled,
        layers=layers,
        where=where,
        group=setup.group(spec),
    )
