"""The planner: a job, rank counts and a machine enter; a `Plan` leaves.

    plan_corpus → plan_stages → for each stage and rank count: rank_memory, seconds → disk

Nothing is written, no weight allocated and nothing downloaded but the configuration of a model
that the job names by a hub id.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from babyllama_ds.engine.distributed import check_precision
from babyllama_ds.errors import JobError
from babyllama_ds.losses.chunks import votes_are_summed
from babyllama_ds.losses.rows import is_kernels_work, work_of_divergence
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.models.sizes import absent_kernels
from babyllama_ds.models.splitting import check_groups
from babyllama_ds.plan.activations import MicroBatchShape, is_estimated
from babyllama_ds.plan.corpus import PlannedCorpus, plan_corpus
from babyllama_ds.plan.disk import DiskItem, cache_bytes, disk_items
from babyllama_ds.plan.machines import HERE, UTILISATION, Machine, find_machine
from babyllama_ds.plan.measured import MeasuredTime, measured_time
from babyllama_ds.plan.memory import (
    HeldTeacher,
    MatchedPair,
    RankMemory,
    StageShape,
    element_bytes,
    rank_memory,
)
from babyllama_ds.plan.rates import Rate
from babyllama_ds.plan.stages import PlannedStage, PlannedStages, plan_stages
from babyllama_ds.spec.deepspeed import Precision, deepspeed_config, micro_batch, precision
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.cache.tiers import (
    TRAINED_BYTES_A_PARAMETER,
    Need,
    Room,
    Tier,
    choose_tier,
)
from babyllama_ds.training.pace import JobPace

_NOT_KNOWN = sys.maxsize
"""Room that the plan does not know, and takes to be enough."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned for."""

    ranks: Sequence[int] = (1, 2, 4, 8)
    gpu: str | None = None
    """A card's name, `here` for this machine, or none in particular."""
    rate: Rate | None = None
    """What one rank was measured to do; none: the card's peak times an assumed share."""
    pace: JobPace | None = None
    """What was measured of the whole job on one rank of this machine; none: `rate`, or the card's
    peak."""
    tokens: int | None = None
    """Tokens of the training text; none: counted or estimated."""
    runs: Path = Path("runs")


@dataclass(frozen=True, kw_only=True)
class RankCount:
    """The whole job on so many ranks."""

    ranks: int
    impossible: str | None
    """Why the job cannot be cut for so many ranks; none: it can."""
    memory: dict[str, RankMemory]
    """By stage."""
    micro_batches: dict[str, int]
    """Windows in one forward pass of one rank, by stage; where the job says `auto`, the most that
    fit by this plan, one where nothing does, the rank's whole share where no machine was named."""
    estimated: Sequence[str]
    """Stages whose activations are no more than an estimate (`activations.is_estimated`)."""
    cached: Mapping[Tier, int]
    """Bytes of the teacher cache that one rank reads from each tier; empty: no cache."""
    seconds: dict[str, float] | None
    """By stage; none: no speed is known."""

    @property
    def hungriest(self) -> str:
        """The stage with the highest peak."""
        return max(self.memory, key=lambda stage: self.memory[stage].peak_bytes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will cost."""

    job: JobSpec
    question: Question
    machine: Machine
    precision: Precision
    corpus: PlannedCorpus
    work: PlannedStages
    counts: Sequence[RankCount]
    disk: Sequence[DiskItem]
    measured: MeasuredTime | None
    """Time by what was measured; none: it was not."""
    assumptions: Sequence[str]

    def usable_bytes(self, ranks: int) -> int | None:
        """What a rank may use; none: no machine was named."""
        return self.machine.usable_bytes(ranks)

    def too_large(self, count: RankCount) -> list[str]:
        """The stages that do not fit on so many ranks."""
        usable = self.usable_bytes(count.ranks)
        if usable is None:
            return []
        return [name for name, memory in count.memory.items() if memory.peak_bytes > usable]

    def fits(self, count: RankCount) -> bool:
        """Whether every stage can run on so many ranks, as far as is known."""
        return count.impossible is None and not self.too_large(count)


def plan_job(job: JobSpec, question: Question) -> Plan:
    """Plan `job`.

    Raises:
        JobError: an unknown card, a job that none of the rank counts can cut.
        DataError, ModelError, MachineError: what the job needs and is not there.
    """
    return _Planner(job, question).plan()


@dataclass(frozen=True)
class _Planner:
    job: JobSpec
    question: Question

    def plan(self) -> Plan:
        machine, work = self.machine, self.work
        counts = [self._count(ranks) for ranks in self.question.ranks]
        if all(count.impossible for count in counts):
            raise JobError.of(
                "--ranks",
                got=", ".join(str(count.ranks) for count in counts),
                expected="at least one number of ranks that the job can be cut for",
                hint="; ".join(f"{count.ranks}: {count.impossible}" for count in counts),
            )
        return Plan(
            job=self.job,
            question=self.question,
            machine=machine,
            precision=self.precision,
            corpus=self.corpus,
            work=work,
            counts=counts,
            disk=disk_items(self.job, self.corpus, work, element_bytes=self._element_bytes),
            measured=self.measured,
            assumptions=self._assumptions(counts),
        )

    @cached_property
    def machine(self) -> Machine:
        return find_machine(self.question.gpu, self.job.deepspeed.device)

    @cached_property
    def corpus(self) -> PlannedCorpus:
        return plan_corpus(self.job, runs=self.question.runs, tokens=self.question.tokens)

    @cached_property
    def work(self) -> PlannedStages:
        return plan_stages(self.job, self.corpus)

    @cached_property
    def measured(self) -> MeasuredTime | None:
        pace = self.question.pace
        return None if pace is None else measured_time(self.job, self.corpus, self.work, pace)

    @cached_property
    def precision(self) -> Precision:
        student = self.job.student.training
        config = deepspeed_config(self.job, student, device=self.machine.device, ranks=1)
        if self.question.gpu == HERE:
            check_precision(self.machine.device, precision(config))
        return precision(config)

    def _count(self, ranks: int) -> RankCount:
        try:
            for teacher in self.work.teachers:
                check_groups(teacher.parts, ranks, where=f"teachers.{teacher.name}.tensor_parallel")
            shapes = {stage.name: self._shape(stage, ranks) for stage in self.work.stages}
            estimated = [n for n, shape in shapes.items() if is_estimated(shape.model, shape.micro)]
        except JobError as error:
            problem = error.problems[0]
            reason = f"{problem.where}: {problem.got}, expected {problem.expected}"
            return RankCount(
                ranks=ranks,
                impossible=reason,
                memory={},
                micro_batches={},
                estimated=(),
                cached={},
                seconds=None,
            )
        return RankCount(
            ranks=ranks,
            impossible=None,
            memory={name: rank_memory(shape) for name, shape in shapes.items()},
            micro_batches={name: shape.micro.windows for name, shape in shapes.items()},
            estimated=estimated,
            cached=self._cached(ranks),
            seconds=self._seconds(ranks),
        )

    def _shape(self, stage: PlannedStage, ranks: int) -> StageShape:
        """The stage as the job has it; of `auto`, with the largest micro-batch that fits."""
        usable = self.machine.usable_bytes(ranks)
        if stage.training.micro_batch != "auto" or usable is None:
            return self._shape_of(stage, stage.training, ranks)
        share = micro_batch(stage.training, ranks, where=stage.key)
        for windows in (n for n in range(share, 0, -1) if share % n == 0):
            training = stage.training.model_copy(update={"micro_batch": windows})
            shape = self._shape_of(stage, training, ranks)
            if rank_memory(shape).peak_bytes <= usable:
                break
        return shape

    def _shape_of(self, stage: PlannedStage, training: TrainingSpec, ranks: int) -> StageShape:
        config = deepspeed_config(
            self.job, training, device=self.machine.device, ranks=ranks, where=stage.key
        )
        micro = MicroBatchShape(
            windows=config["train_micro_batch_size_per_gpu"],
            length=self.job.windows.length,
            kernel=self._kernel(stage.spec, where=f"{stage.name}.model.attention"),
            element_bytes=element_bytes(config),
            device=self.machine.device,
            documents=self.job.windows.attention == "document",
            checkpointed=training.gradient_checkpointing,
        )
        loss = self.job.distillation
        teachers = self.work.teachers if stage.distilled and loss.cache != "topk" else ()
        weights = [each.weight for each in self.job.teachers]
        summed = bool(teachers) and votes_are_summed(loss.mean_of, weights)
        cached = self._cached(ranks) if stage.distilled else {}
        # On a CPU the host's memory is the device's.
        in_memory = cached.get("host", 0)
        on_cpu = self.machine.device == "cpu"
        return StageShape(
            model=stage.sizes,
            micro=micro,
            accumulation=config["gradient_accumulation_steps"],
            ranks=ranks,
            vocab_size=self.corpus.vocab_size,
            chunk_tokens=loss.chunk_tokens if stage.distilled else None,
            teachers=[
                HeldTeacher(sizes=t.sizes, live=loss.cache == "none", parts=t.parts)
                for t in teachers
            ],
            summed=summed,
            work_spaces=self._work_spaces(1 if summed else len(teachers), stage),
            cache_bytes=in_memory if on_cpu else cached.get("device", 0),
            host_cache_bytes=0 if on_cpu else in_memory,
            filling=self._filling() if stage.distilled else (),
            evaluation_tokens=self.job.evaluation.batch_tokens,
            averaged=training.ema is not None,
            muon=training.muon is not None,
            deepspeed=config,
            matched=self._matched() if stage.distilled else (),
        )

    def _work_spaces(self, num_voters: int, stage: PlannedStage) -> int:
        """None where a kernel does the work: on CUDA, whose torch brings Triton."""
        loss = self.job.distillation
        if stage.distilled and loss.cache == "topk":
            return 2
        kind = loss.divergence.kind
        if self.machine.device == "cuda" and is_kernels_work(kind, num_voters):
            return 0
        return work_of_divergence(kind) if stage.distilled else 1

    def _matched(self) -> Sequence[MatchedPair]:
        matching = self.job.distillation.hidden_matching
        if matching is None:
            return ()
        widths = {teacher.name: teacher.sizes.hidden_size for teacher in self.work.teachers}
        return [
            MatchedPair(teacher_width=widths[pair.teacher], loss=matching.loss)
            for pair in matching.layers
        ]

    def _filling(self) -> Sequence[Sequence[HeldTeacher]]:
        """Hidden states are computed teacher by teacher, most likely tokens by all at once."""
        held = [HeldTeacher(sizes=t.sizes, live=True, parts=t.parts) for t in self.work.teachers]
        together = {"none": [], "hidden": [[one] for one in held], "topk": [held]}
        return together[self.job.distillation.cache]

    def _cached(self, ranks: int) -> Mapping[Tier, int]:
        """Bytes of one rank's teacher caches by tier: `auto` as `choose_tier` has it.

        The caches are opened one after another, each in the room that those before it left.
        """
        held: dict[Tier, int] = {}
        for size_bytes in cache_bytes(
            self.job, self.corpus, self.work, element_bytes=self._element_bytes
        ):
            tier = self._tier(size_bytes, ranks, held)
            held[tier] = held.get(tier, 0) + size_bytes
        return held

    def _tier(self, size_bytes: int, ranks: int, held: Mapping[Tier, int]) -> Tier:
        """A tier asked for by name is taken as it is: where it does not fit, the plan shows it."""
        asked, on_cpu = self.job.distillation.cache_tier, self.machine.device == "cpu"
        if asked != "auto":
            return "host" if asked == "device" and on_cpu else asked
        student = next(stage for stage in self.work.stages if stage.name == "student")
        need = Need(
            name="teacher cache",
            memory_bytes=size_bytes,
            disk_bytes=size_bytes,
            student_bytes=TRAINED_BYTES_A_PARAMETER * student.sizes.params,
        )
        usable = self.machine.usable_bytes(ranks)
        free = _NOT_KNOWN if usable is None else usable - sum(held.values())
        room = Room(
            device=None if on_cpu else free,
            device_total=self.machine.memory_bytes or 0,
            host=free if on_cpu else _NOT_KNOWN,
            disk=_NOT_KNOWN,
        )
        return choose_tier("auto", need, room).tier

    @property
    def _element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    def _kernel(self, spec: ModelSpec, *, where: str) -> str:
        missing = absent_kernels(spec, where=where)
        if self.machine.device == "cpu":
            return resolve_attention(
                spec.attention,
                device="cpu",
                precision=self.precision,
                training=True,
                where=where,
                missing=missing,
            )
        if spec.attention != "auto":
            return spec.attention
        # Whatever is installed there: FlashAttention and the fused kernel keep the same tensors.
        return "eager" if "sdpa" in missing else "sdpa"

    def _seconds(self, ranks: int) -> dict[str, float] | None:
        if self.measured is not None:
            planned = {stage.name for stage in self.work.stages}
            return {one.name: one.seconds for one in self.measured.stages if one.name in planned}
        speed = self._flops_a_second()
        if speed is None:
            return None
        return {stage.name: stage.flops.total / (speed * ranks) for stage in self.work.stages}

    def _flops_a_second(self) -> float | None:
        """Of one rank: measured, or the card's peak times what is assumed of it."""
        rate = self.question.rate
        if rate is not None:
            student = next(stage for stage in self.work.stages if stage.name == "student")
            return rate.flops_a_second(
                (student.flops.training + student.flops.teachers) / student.tokens
            )
        peak = self._peak_flops
        return None if peak is None else peak * UTILISATION

    @property
    def _peak_flops(self) -> float | None:
        """The card's, which is that of bf16: in fp32 none is known."""
        return None if self.precision == "fp32" else self.machine.peak_flops

    def _assumptions(self, counts: Sequence[RankCount]) -> list[str]:
        found = [f"tokens: {self.corpus.assumption}"]
        if self.corpus.dev_tokens is None:
            found.append("evaluations during training: left out, the development text is not known")
        if self.measured is not None:
            found += ["minimal pairs: left out of FLOPs", *self.measured.notes]
        else:
            found += ["minimal pairs: left out of FLOPs and time", self._assumed_speed()]
        found += self._early_ends()
        possible = [count for count in counts if count.impossible is None]
        found += self._settled_micro_batches(possible)
        found += self._settled_tiers(possible)
        found += self._estimated(possible)
        if self.measured is None:
            found.append(
                "ranks: N times as fast as one; communication, checkpoints and start left out"
            )
        return found

    def _assumed_speed(self) -> str:
        """Where times come from, where they were not measured."""
        if self.question.rate is not None:
            return f"speed: {self.question.rate}, for each rank; other stages by their FLOPs"
        if self._peak_flops is not None:
            return (
                f"speed: {UTILISATION:.0%} of the {self.machine.name}'s "
                f"{self._peak_flops / 1e12:g} TFLOP/s (dense bf16); give --rate where "
                "one was measured"
            )
        if self.machine.peak_flops is not None:
            return "time: not known; a card's peak is that of bf16, give a measured --rate"
        return "time: not known; name a card with --gpu or give a measured --rate"

    def _early_ends(self) -> list[str]:
        """Limits that nobody knows before."""
        return [
            f"{stage.name}: all {stage.steps:,} steps; {limit} may end it earlier"
            for stage in self.work.stages
            for limit in ("early_stopping", "max_minutes")
            if getattr(stage.training, limit) is not None
        ]

    def _settled_micro_batches(self, counts: Sequence[RankCount]) -> list[str]:
        """What `micro_batch: auto` was taken to be."""
        unnamed = self.machine.memory_bytes is None
        how = "the rank's whole share: no machine was named" if unnamed else "the most that fit"
        return [
            f"micro-batch of {stage.name}: auto, {how}: "
            + _by_ranks((count.ranks, str(count.micro_batches[stage.name])) for count in counts)
            for stage in self.work.stages
            if stage.training.micro_batch == "auto"
        ]

    def _estimated(self, counts: Sequence[RankCount]) -> list[str]:
        """What is counted as something else is."""
        names = {name for count in counts for name in count.estimated}
        found = [
            f"memory of {stage.name}: activations of {stage.sizes.family} counted as those of a "
            "LLaMA of its widths, and may be more: it could not be run on shapes"
            for stage in self.work.stages
            if stage.name in names
        ]
        frozen = {teacher.name for teacher in self.work.teachers if teacher.sizes.config}
        if frozen:
            found.append(
                f"memory of {', '.join(sorted(frozen))}, teachers of other families: while they "
                "compute, a layer's work is counted as that of a LLaMA of their widths"
            )
        return found

    def _settled_tiers(self, counts: Sequence[RankCount]) -> list[str]:
        """Where a cache of tier `auto` was taken to be read from."""
        if self.job.distillation.cache == "none" or self.job.distillation.cache_tier != "auto":
            return []
        tiers = _by_ranks((count.ranks, " and ".join(count.cached)) for count in counts)
        return [
            f"teacher cache: tier auto, the first that fits: {tiers}; enough room on the disk"
            + (" and in the host's memory" if self.machine.device == "cuda" else "")
        ]


def _by_ranks(settled: Iterable[tuple[int, str]]) -> str:
    """`64 (ranks 1 2), 32 (ranks 4)`; `64` alone where all rank counts have it."""
    ranks_of: dict[str, list[str]] = {}
    for ranks, what in settled:
        ranks_of.setdefault(what, []).append(str(ranks))
    if len(ranks_of) == 1:
        return next(iter(ranks_of))
    return ", ".join(f"{what} (ranks {' '.join(ranks)})" for what, ranks in ranks_of.items())
