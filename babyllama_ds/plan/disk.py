"""Disk: what a job leaves in its run directory and the store, and what it needs meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from babyllama_ds.engine.checkpoint import KEPT
from babyllama_ds.engine.training import MOMENTS
from babyllama_ds.plan.corpus import PlannedCorpus
from babyllama_ds.plan.stages import PlannedStage, PlannedStages, num_milestones
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.teachers.cache.layout import padded_bytes
from babyllama_ds.teachers.cache.topk import record_bytes

_FP32 = 4
_TOKEN_ID_BYTES = 2
_LONG_ID_BYTES = 4
_SHORT_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class DiskItem:
    """One kind of file."""

    name: str
    bytes: int
    stays: bool
    """False: removed when the stage that needs it is done."""
    nodes: Literal["one", "first two", "every"]
    """Which nodes hold a copy: `one` in all, on the storage that they share, or, where each keeps
    its own (`deepspeed.storage: node`), the first two or every one of them (docs/storage.md)."""


def disk_items(
    job: JobSpec, corpus: PlannedCorpus, work: PlannedStages, *, element_bytes: int
) -> Sequence[DiskItem]:
    """Every kind of file above a few megabytes.

    A new checkpoint is whole before the oldest of those kept goes, so that
    there are at times one more.
    """
    checkpoint = max(
        _checkpoint_bytes(stage, _projections(job, work) if stage.distilled else 0, element_bytes)
        for stage in work.stages
    )
    models = sum(stage.sizes.params for stage in work.stages)
    models += sum(
        teacher.sizes.params
        for teacher in work.teachers
        if f"teachers/{teacher.name}" not in {stage.name for stage in work.stages}
    )
    own = job.deepspeed.storage == "node"
    every: Literal["one", "every"] = "every" if own else "one"
    kept = sum(
        stage.sizes.params * num_milestones(job, corpus, stage.name, stage.tokens)
        for stage in work.stages
    )
    return [
        DiskItem(name="models", bytes=element_bytes * models, stays=True, nodes=every),
        DiskItem(name="milestones", bytes=element_bytes * kept, stays=True, nodes=every),
        DiskItem(
            name="token shards",
            bytes=_id_bytes(corpus.vocab_size) * (corpus.train_tokens + (corpus.dev_tokens or 0)),
            stays=True,
            nodes=every,
        ),
        DiskItem(
            name="teacher cache",
            bytes=sum(cache_bytes(job, corpus, work, element_bytes=element_bytes))
            if job.distillation.cache_kept
            else 0,
            stays=True,
            nodes=every,
        ),
        DiskItem(
            name=f"checkpoints ({KEPT}, and one being written)",
            bytes=(KEPT + 1) * checkpoint,
            stays=False,
            nodes="first two" if own else "one",
        ),
    ]


def cache_bytes(
    job: JobSpec, corpus: PlannedCorpus, work: PlannedStages, *, element_bytes: int
) -> list[int]:
    """Bytes of each cache: the records of every distinct window.

    One cache for each teacher's final states, or one of the ensemble's k most likely tokens.
    """
    loss, length = job.distillation, job.windows.length
    windows = work.distinct_windows or 0
    if loss.cache == "hidden":
        widths = [teacher.sizes.state_size for teacher in work.teachers]
        return [windows * padded_bytes(length * width * element_bytes) for width in widths]
    if loss.cache == "topk":
        return [windows * record_bytes(loss.cache_top_k, length, corpus.vocab_size)]
    return []


def _checkpoint_bytes(stage: PlannedStage, projections: int, element_bytes: int) -> int:
    """Master weights, both moments (of Muon's matrices one) and a moving average where there is
    one, in fp32; and the best weights so far."""
    params, training = stage.sizes.params + projections, stage.training
    states = (1 + len(MOMENTS) + (training.ema is not None)) * params
    if training.muon is not None:
        states -= stage.sizes.backbone_weights
    return _FP32 * states + element_bytes * params


def _projections(job: JobSpec, work: PlannedStages) -> int:
    """Parameters that the student's checkpoints hold beside its own: those of matched layers."""
    matching = job.distillation.hidden_matching
    if matching is None:
        return 0
    widths = {teacher.name: teacher.sizes.hidden_size for teacher in work.teachers}
    student = next(stage for stage in work.stages if stage.distilled)
    return student.sizes.hidden_size * sum(widths[pair.teacher] for pair in matching.layers)


def _id_bytes(vocab_size: int) -> int:
    return _TOKEN_ID_BYTES if vocab_size <= _SHORT_IDS else _LONG_ID_BYTES
