"""Stages: a job and its corpus enter; each training's models, steps, tokens and FLOPs leave.

FLOPs are the matrix products of `models.sizes`. A stage's are those of training (forward and
backward, head included), of the teachers' forward passes (heads included; with a cache, backbones
once for each distinct window), of Muon's updates, and of the evaluations on development windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine.muon import layer_matrices, orthogonalising_flops
from babyllama_ds.models.sizes import ModelSizes, meta_model, model_sizes
from babyllama_ds.models.splitting import check_split
from babyllama_ds.plan.corpus import PlannedCorpus, cut
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.training.batches import check_warmup, steps_per_epoch, total_steps
from babyllama_ds.training.milestones import TextSize, milestones_within


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """FLOPs of one training, over all ranks."""

    training: int
    """The trained model, forward and backward; with gradient checkpointing, its layers forward
    once more."""
    teachers: int
    """The teachers, forward."""
    cache: int
    """Those of the teachers' that fill a cache, before the first step."""
    updates: int
    """Muon's iteration; AdamW multiplies no matrices."""
    evaluation: int
    """The trained model on development windows, during training and after."""

    @property
    def steps(self) -> int:
        """What is computed in the steps: a run's tokens per second are of these."""
        return self.training + self.teachers - self.cache + self.updates

    @property
    def total(self) -> int:
        """All of them."""
        return self.training + self.teachers + self.updates + self.evaluation


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One training."""

    name: str
    """`teachers/NAME`, `student` or `control`."""
    key: str
    """The key path of its training in the job."""
    spec: ModelSpec
    training: TrainingSpec
    sizes: ModelSizes
    steps: int
    tokens: int
    """Tokens seen, all ranks and epochs together; padding of a short last batch included."""
    flops: StageFlops
    distilled: bool


@dataclass(frozen=True, kw_only=True)
class PlannedTeacher:
    """A member of the ensemble."""

    name: str
    spec: ModelSpec
    sizes: ModelSizes
    parts: int
    """Ranks that it is split over."""


@dataclass(frozen=True, kw_only=True)
class PlannedStages:
    """What the job trains, in order, and its ensemble."""

    stages: Sequence[PlannedStage]
    teachers: Sequence[PlannedTeacher]
    num_windows: int
    """Training windows of an epoch."""
    distinct_windows: int | None
    """Windows that differ, over all epochs; none: each epoch has its own."""


def plan_stages(job: JobSpec, corpus: PlannedCorpus) -> PlannedStages:
    """Every training of `job`.

    Raises:
        ModelError: a configuration that cannot be read or does not fit the vocabulary, or a teacher
            that cannot be split over ranks.
        JobError: a warm-up longer than its training.
        DataError: a corpus shorter than a window.
    """
    teachers = [
        PlannedTeacher(
            name=teacher.name,
            spec=teacher.model,
            sizes=model_sizes(
                teacher.model, corpus.vocab_size, where=f"teachers.{teacher.name}.model"
            ),
            parts=teacher.tensor_parallel,
        )
        for teacher in job.teachers
    ]
    for one in teachers:
        check_split(one.sizes, one.parts, where=f"teachers.{one.name}.tensor_parallel")
    windows = cut(job, corpus.train_tokens)
    planner = _Planner(job, corpus, windows, teachers)
    stages = [
        planner.stage(f"teachers/{teacher.name}", teacher.model, one.sizes, teacher.training)
        for teacher, one in zip(job.teachers, teachers, strict=True)
        if teacher.training is not None
    ]
    sizes = model_sizes(job.student.model, corpus.vocab_size, where="student.model")
    stages.append(planner.stage("student", job.student.model, sizes, job.student.training))
    if job.control is not None:
        training = job.control.training or job.student.training
        stages.append(planner.stage("control", job.student.model, sizes, training))
    return PlannedStages(
        stages=stages,
        teachers=teachers,
        num_windows=windows.num_windows,
        distinct_windows=windows.num_distinct,
    )


@dataclass(frozen=True)
class _Planner:
    job: JobSpec
    corpus: PlannedCorpus
    windows: TrainWindows
    teachers: Sequence[PlannedTeacher]

    def stage(
        self, name: str, spec: ModelSpec, sizes: ModelSizes, training: TrainingSpec
    ) -> PlannedStage:
        num_windows, length = self.windows.num_windows, self.windows.length
        key = self.job.training_key(name)
        check_warmup(training, num_windows, length, where=key)
        steps = total_steps(training, num_windows, length)
        tokens = steps * training.batch_windows * length
        distilled = name == "student"
        a_token = sizes.training_flops(length, self.corpus.vocab_size)
        if training.gradient_checkpointing:
            a_token += sizes.backbone_flops(length)
        in_steps, cache = self._teacher_flops(tokens) if distilled else (0, 0)
        flops = StageFlops(
            training=tokens * a_token,
            teachers=in_steps + cache,
            cache=cache,
            updates=steps * self._update_flops(name, spec, training),
            evaluation=self._evaluation_flops(name, sizes, training, steps),
        )
        return PlannedStage(
            name=name,
            key=key,
            spec=spec,
            training=training,
            sizes=sizes,
            steps=steps,
            tokens=tokens,
            flops=flops,
            distilled=distilled,
        )

    def _update_flops(self, name: str, spec: ModelSpec, training: TrainingSpec) -> int:
        """Of one step."""
        if training.muon is None:
            return 0
        model = meta_model(spec, self.corpus.vocab_size, where=f"{name}.model")
        return sum(orthogonalising_flops(matrix.shape) for matrix, _ in layer_matrices(model))

    def _teacher_flops(self, tokens: int) -> tuple[int, int]:
        """In the steps, on every token; to fill a cache, on distinct windows alone."""
        length, cache = self.windows.length, self.job.distillation.cache
        distinct = (self.windows.num_distinct or 0) * length
        sizes = [teacher.sizes for teacher in self.teachers]
        backbones = sum(one.backbone_flops(length) for one in sizes)
        heads = sum(one.head_flops(self.corpus.vocab_size) for one in sizes)
        if cache == "hidden":
            return tokens * heads, distinct * backbones
        if cache == "topk":
            return 0, distinct * (backbones + heads)
        return tokens * (backbones + heads), 0

    def _evaluation_flops(
        self, name: str, sizes: ModelSizes, training: TrainingSpec, steps: int
    ) -> int:
        """Forward passes over development windows, during training, at the end, and of what was
        kept on the way."""
        if self.corpus.dev_tokens is None:
            return 0
        length = self.windows.length
        available = self.corpus.dev_tokens // length
        times, windows = evaluations(
            training, steps, self.corpus, length=length, num_windows=self.windows.num_windows
        )
        after = min(available, self.job.evaluation.dev_windows or available)
        if (of_milestones := self.job.evaluation.of_milestones()) is not None:
            tokens = steps * training.batch_windows * length
            number = num_milestones(self.job, self.corpus, name, tokens)
            after += number * min(available, of_milestones.dev_windows or available)
        flops = sizes.forward_flops(length, self.corpus.vocab_size)
        return (times * windows + after) * length * flops


def num_milestones(job: JobSpec, corpus: PlannedCorpus, stage: str, tokens: int) -> int:
    """How many models a training that shows so many tokens keeps on its way."""
    asked = job.milestones_of(stage)
    text = TextSize(words=corpus.train_words, tokens=corpus.train_tokens)
    return 0 if asked is None else len(milestones_within(asked, text.words_in(tokens)))


def evaluations(
    training: TrainingSpec, steps: int, corpus: PlannedCorpus, *, length: int, num_windows: int
) -> tuple[int, int]:
    """How often a training of so many steps is evaluated, and on how many windows of `length`.

    `num_windows`: those of an epoch.
    """
    available = (corpus.dev_tokens or 0) // length
    every = training.evaluate_every_steps or steps_per_epoch(training, num_windows)
    times = steps // every + (steps % every > 0)
    return times, min(available, training.evaluate_windows or available)
