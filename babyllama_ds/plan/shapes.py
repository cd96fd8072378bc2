"""A stage on so many ranks: what decides how much memory it takes leaves, for `memory` to count."""

from __future__ import annotations

from collections.abc import Sequence

from babyllama_ds.losses.rows import is_kernels_work, work_of_divergence
from babyllama_ds.losses.voters import votes_are_summed
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.models.sizes import absent_kernels
from babyllama_ds.plan.activations import MicroBatchShape
from babyllama_ds.plan.basis import Basis
from babyllama_ds.plan.memory import (
    HeldTeacher,
    MatchedPair,
    StageShape,
    element_bytes,
    rank_memory,
)
from babyllama_ds.plan.stages import PlannedStage
from babyllama_ds.plan.tiers import cached_by_tier
from babyllama_ds.spec.base import divisors
from babyllama_ds.spec.deepspeed import micro_batch
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec


def stage_shape(basis: Basis, stage: PlannedStage, ranks: int) -> StageShape:
    """The stage as the job has it; of `auto`, with the largest micro-batch that fits.

    Raises `JobError` where the batch cannot be cut for so many ranks.
    """
    usable = basis.machine.usable_bytes(ranks)
    if stage.training.micro_batch != "auto" or usable is None:
        return _shape_of(basis, stage, stage.training, ranks)
    share = micro_batch(stage.training, ranks, where=stage.key)
    for windows in reversed(divisors(share)):
        training = stage.training.model_copy(update={"micro_batch": windows})
        shape = _shape_of(basis, stage, training, ranks)
        if rank_memory(shape).peak_bytes <= usable:
            break
    return shape


def _shape_of(basis: Basis, stage: PlannedStage, training: TrainingSpec, ranks: int) -> StageShape:
    config = basis.configuration(stage, training, ranks=ranks)
    micro = MicroBatchShape(
        windows=config["train_micro_batch_size_per_gpu"],
        length=basis.job.windows.length,
        kernel=_kernel(basis, stage.spec, where=f"{stage.name}.model.attention"),
        element_bytes=element_bytes(config),
        device=basis.machine.device,
        documents=basis.job.windows.attention == "document",
        checkpointed=training.gradient_checkpointing,
    )
    loss = basis.job.distillation
    teachers = basis.work.teachers if stage.distilled and loss.cache != "topk" else ()
    weights = [each.weight for each in basis.job.teachers]
    summed = bool(teachers) and votes_are_summed(loss.mean_of, weights)
    cached = cached_by_tier(basis, ranks) if stage.distilled else {}
    # On a CPU the host's memory is the device's.
    in_memory = cached.get("host", 0)
    on_cpu = basis.machine.device == "cpu"
    return StageShape(
        model=stage.sizes,
        micro=micro,
        accumulation=config["gradient_accumulation_steps"],
        ranks=ranks,
        vocab_size=basis.corpus.vocab_size,
        chunk_tokens=loss.chunk_tokens if stage.distilled else None,
        teachers=[
            HeldTeacher(sizes=t.sizes, live=loss.cache == "none", parts=t.parts) for t in teachers
        ],
        summed=summed,
        work_spaces=_work_spaces(basis, 1 if summed else len(teachers), stage),
        cache_bytes=in_memory if on_cpu else cached.get("device", 0),
        host_cache_bytes=0 if on_cpu else in_memory,
        filling=_filling(basis) if stage.distilled else (),
        evaluation_tokens=basis.job.evaluation.batch_tokens,
        averaged=training.ema is not None,
        muon=training.muon is not None,
        deepspeed=config,
        matched=_matched(basis) if stage.distilled else (),
    )


def _kernel(basis: Basis, spec: ModelSpec, *, where: str) -> str:
    missing = absent_kernels(spec, where=where)
    if basis.machine.device == "cpu":
        return resolve_attention(
            spec.attention,
            device="cpu",
            precision=basis.precision,
            training=True,
            where=where,
            missing=missing,
        )
    if spec.attention != "auto":
        return spec.attention
    # Whatever is installed there: FlashAttention and the fused kernel keep the same tensors.
    return "eager" if "sdpa" in missing else "sdpa"


def _work_spaces(basis: Basis, num_voters: int, stage: PlannedStage) -> int:
    """None where a kernel does the work: on CUDA, whose torch brings Triton."""
    loss = basis.job.distillation
    if stage.distilled and loss.cache == "topk":
        return 2
    kind = loss.divergence.kind
    if basis.machine.device == "cuda" and is_kernels_work(kind, num_voters):
        return 0
    return work_of_divergence(kind) if stage.distilled else 1


def _matched(basis: Basis) -> Sequence[MatchedPair]:
    matching = basis.job.distillation.hidden_matching
    if matching is None:
        return ()
    widths = {teacher.name: teacher.sizes.hidden_size for teacher in basis.work.teachers}
    return [
        MatchedPair(teacher_width=widths[pair.teacher], loss=matching.loss)
        for pair in matching.layers
    ]


def _filling(basis: Basis) -> Sequence[Sequence[HeldTeacher]]:
    """Hidden states are computed teacher by teacher, most likely tokens by all at once."""
    held = [HeldTeacher(sizes=t.sizes, live=True, parts=t.parts) for t in basis.work.teachers]
    together = {"none": [], "hidden": [[one] for one in held], "topk": [held]}
    return together[basis.job.distillation.cache]
