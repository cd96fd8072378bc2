"""Time from what was measured: a plan's stages and a job's pace enter, seconds of a run leave.

    start → preparation → for each stage: build, cache, engine, steps, evaluations, checkpoints,
    export → for each model: load, development windows, minimal pairs, samples

Of one rank, as the pace is; nothing is taken to stand from an earlier run but the prepared text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from babyllama_ds.errors import MachineError
from babyllama_ds.plan.corpus import PlannedCorpus
from babyllama_ds.plan.stages import (
    PlannedStage,
    PlannedStages,
    evaluations,
    num_milestones,
)
from babyllama_ds.spec.evaluation import EvaluationSpec
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.training.pace import EvaluationPace, JobPace, StagePace

LEFT_OUT = (
    "writing the report, looks at disks and locks, and what other programs take meanwhile",
    "early ends (early_stopping, max_minutes), and stages that an earlier run has done",
)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Seconds of one stage of a run, by what they go to."""

    name: str
    step_s: float
    """Seconds of one step, a cache's gain taken out; 0 where nothing is trained."""
    tokens_per_s: float
    flops_per_s: float
    """FLOP/s of training and of the teachers in its steps."""
    parts: Mapping[str, float]
    """`start`, `cache`, `steps`, `evaluations`, `checkpoints`, `export`."""

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class MeasuredTime:
    """Seconds of a whole run."""

    before: Mapping[str, float]
    """`start` and `preparation`."""
    stages: Sequence[StageTime]
    evaluations: Mapping[str, float]
    """Seconds for each finished model, by stage, and for each one's milestones together."""
    notes: Sequence[str]

    @property
    def seconds(self) -> float:
        """From the command to the evaluated models."""
        stages = sum(stage.seconds for stage in self.stages)
        return sum(self.before.values()) + stages + sum(self.evaluations.values())


def measured_time(
    job: JobSpec, corpus: PlannedCorpus, work: PlannedStages, pace: JobPace
) -> MeasuredTime:
    """What a run takes at this pace; `corpus` is that of the prepared text."""
    planned = {stage.name: stage for stage in work.stages}
    return MeasuredTime(
        before={"start": pace.start_s, "preparation": pace.preparation_s},
        stages=[
            _stage_time(job, corpus, work, planned[name], of)
            if name in planned
            else _loaded_time(name, of)
            for name, of in pace.stages.items()
        ],
        evaluations={
            name: _evaluation_s(job, job.evaluation, pace.num_pairs, corpus, pace, of)
            for name, of in pace.evaluations.items()
        }
        | _milestones_s(job, corpus, planned, pace),
        notes=list(_notes(job, pace)),
    )


def check_within(time: MeasuredTime, minutes: float, *, name: str) -> None:
    """The run ends in so many minutes.

    Raises:
        MachineError: it does not; what takes longest is named.
    """
    if time.seconds <= 60 * minutes:
        return
    takes = {**time.before, **{stage.name: stage.seconds for stage in time.stages}}
    takes["the evaluations"] = sum(time.evaluations.values())
    longest = sorted(takes, key=lambda key: -takes[key])[:2]
    told = ", ".join(f"{key} {takes[key] / 60:.1f}" for key in longest)
    raise MachineError.of(
        f"--within, {name} on this machine",
        got=f"{time.seconds / 60:.1f} minutes by what was measured",
        expected=f"at most {minutes:g}",
        hint=f"what takes longest: {told} minutes",
    )


def _stage_time(
    job: JobSpec, corpus: PlannedCorpus, work: PlannedStages, stage: PlannedStage, pace: StagePace
) -> StageTime:
    of, batch = pace.training, stage.training.batch_windows
    assert of is not None, "a stage of the plan trains"
    cached = stage.distilled and job.distillation.cache != "none"
    step_s = of.step_s - (of.teachers_s if cached else 0.0)
    every = stage.training.checkpoint_every_steps
    times, windows = evaluations(
        stage.training,
        stage.steps,
        corpus,
        length=job.windows.length,
        num_windows=work.num_windows,
    )
    a_token = stage.flops.steps / stage.tokens
    tokens_per_s = batch * job.windows.length / step_s
    passes = (work.distinct_windows or 0) / batch if cached else 0
    return StageTime(
        name=stage.name,
        step_s=step_s,
        tokens_per_s=tokens_per_s,
        flops_per_s=a_token * tokens_per_s,
        parts={
            "start": pace.build_s + of.engine_s,
            "cache": passes * of.teachers_s,
            "steps": stage.steps * step_s,
            "evaluations": times * (windows * of.dev_window_s + of.best_s),
            "checkpoints": (times if every is None else stage.steps // every) * of.checkpoint_s,
            "export": pace.export_s,
        },
    )


def _loaded_time(name: str, pace: StagePace) -> StageTime:
    parts = {"start": pace.build_s, "export": pace.export_s}
    return StageTime(name=name, step_s=0, tokens_per_s=0, flops_per_s=0, parts=parts)


def _evaluation_s(
    job: JobSpec,
    evaluation: EvaluationSpec,
    num_pairs: int,
    corpus: PlannedCorpus,
    pace: JobPace,
    of: EvaluationPace,
) -> float:
    available = (corpus.dev_tokens or 0) // job.windows.length
    windows = min(available, evaluation.dev_windows or available)
    pairs_s = pace.pairs_s + num_pairs * of.pair_s
    samples_s = of.samples_s if evaluation.samples else 0.0
    return of.load_s + windows * of.dev_window_s + pairs_s + samples_s


def _milestones_s(
    job: JobSpec, corpus: PlannedCorpus, stages: Mapping[str, PlannedStage], pace: JobPace
) -> dict[str, float]:
    """Of measuring each model's milestones."""
    evaluation = job.evaluation.of_milestones()
    if evaluation is None:
        return {}
    found = {}
    for name, stage in stages.items():
        if number := num_milestones(job, corpus, name, stage.tokens):
            one_s = _evaluation_s(
                job, evaluation, pace.num_milestone_pairs, corpus, pace, pace.evaluations[name]
            )
            found[f"milestones of {name}"] = number * one_s
    return found


def _notes(job: JobSpec, pace: JobPace) -> Iterator[str]:
    steps = ", ".join(
        f"{name} {stage.training.steps}"
        for name, stage in pace.stages.items()
        if stage.training is not None
    )
    yield f"measured here, on one rank, with real text; steps that were timed: {steps}"
    if pace.prepared_before:
        yield "preparation: the prepared text stood in the store, and is only looked at"
    if job.distillation.cache != "none":
        yield (
            "cache: the live teachers' part of a step; writing the cache and reading it back are "
            "left out"
        )
    if job.distillation.cache == "topk":
        yield "student: its steps with the teachers' heads, which a top-k cache spares"
    yield from (f"left out: {what}" for what in LEFT_OUT)
