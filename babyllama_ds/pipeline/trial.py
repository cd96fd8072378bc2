"""A job tried out on this machine: a job and some seconds enter, the pace of its parts leaves.

What is timed is what a run does, at the job's sizes: text is prepared (and stays in the store), and
each model is built, trained for a few steps, evaluated on a little, checkpointed, exported and
measured on a few windows and pairs. Teachers of the student are those few steps old: how good they
are costs nothing. One rank; everything but the prepared text lies in a folder of its own beside the
runs, and is removed: by the next trial there, where this one was killed.

With a cache the student's steps are timed with live teachers, whose part is known apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus, open_corpus, prepare_corpus
from babyllama_ds.engine import distributed
from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.engine.compiling import Compiled
from babyllama_ds.evaluation.evaluate import DevWindows, evaluate_model
from babyllama_ds.evaluation.pair_files import Task
from babyllama_ds.locks import scratch_folder
from babyllama_ds.models.build import load_model
from babyllama_ds.models.export import export_model
from babyllama_ds.pipeline.checks import check_job
from babyllama_ds.pipeline.ensembles import live_ensemble
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.making import Maker
from babyllama_ds.pipeline.speed import Speed
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.training.pace import EvaluationPace, JobPace, StagePace, StepPace
from babyllama_ds.training.stage import RunContext, Stage
from babyllama_ds.training.trial import try_out

TIMED_PAIRS = 2_000
"""Minimal pairs that a model is timed on, evenly taken from all tasks."""
TIMED_BATCHES = 4
"""Forward passes over development windows that a finished model is timed on."""


def try_job(job: JobSpec, *, runs: Path, seconds: float, began_s: float = 0.0) -> JobPace:
    """The pace of `job` on one rank; about so many seconds go to steps, dealt out to its stages.

    `began_s`: seconds that this process has taken to come here, as that of a run will.

    Raises:
        UserError: whatever a run of it would raise on its way.
        Stopped: asked to stop.
    """
    entered = time.perf_counter()
    stop = StopRequest()
    stop.install()
    try:
        device = distributed.start(distributed.resolve_device(job.deepspeed.device))
        assert ranks.world_size() == 1, "a trial is of one rank"
        with scratch_folder(runs, ".trial-") as scratch:
            setup, store = JobSetup(job, device), Store(runs / "store", while_waiting=stop.check)
            with _timed() as prepared:
                corpus, before = _prepare(job, store, stop)
            speed = Speed(setup)
            check_job(setup, corpus)
            speed.facts(corpus)
            so_far_s = began_s + time.perf_counter() - entered - prepared.seconds
            trial = _Trial(setup, corpus, speed, scratch, stop, seconds / _num_trained(job))
            return replace(
                trial.run(),
                start_s=so_far_s,
                preparation_s=prepared.seconds,
                prepared_before=before,
            )
    finally:
        stop.uninstall()
        distributed.stop()


def _prepare(job: JobSpec, store: Store, stop: StopRequest) -> tuple[Corpus, bool]:
    """The corpus, and whether its tokens stood in the store."""
    folder = store.root / "tokens"
    there = set(folder.iterdir()) if folder.is_dir() else set()
    entries = prepare_corpus(job, store, stop.check)
    return open_corpus(entries), entries.tokens_dir in there


def _num_trained(job: JobSpec) -> int:
    teachers = sum(teacher.training is not None for teacher in job.teachers)
    return teachers + 1 + (job.control is not None)


class _Trial:
    """The stages of one job, each for a moment."""

    def __init__(
        self,
        setup: JobSetup,
        corpus: Corpus,
        speed: Speed,
        scratch: Path,
        stop: StopRequest,
        seconds: float,
    ) -> None:
        self.setup, self.corpus, self.scratch = setup, corpus, scratch
        directory = RunDirectory(scratch)
        files.write_json(scratch / "environment.json", {})  # to which is added what is settled
        store, storages = Store(scratch / "store"), Storages()
        self.maker = _TryingMaker(setup, directory, speed, store, storages, stop)
        self.maker.seconds = seconds

    def run(self) -> JobPace:
        """Every stage of a run, in its order."""
        job, paces = self.setup.job, dict[str, StagePace]()
        models: dict[str, tuple[ModelSpec, Path]] = {}
        teachers = {}
        for teacher in job.teachers:
            stage = f"teachers/{teacher.name}"
            paces[stage], path = self._stage(stage, teacher.model, teacher.training, None)
            teachers[teacher.name] = path
            models[stage] = teacher.model, path
        of_student = job.student.training
        paces["student"], path = self._stage("student", job.student.model, of_student, teachers)
        models["student"] = job.student.model, path
        if job.control is not None:
            training = job.control.training or of_student
            paces["control"], path = self._stage("control", job.student.model, training, None)
            models["control"] = job.student.model, path
        with _timed() as read:
            benchmarks = self.setup.benchmarks(self.corpus)
        of_milestones = self.setup.of_milestones()
        return JobPace(
            start_s=0,
            preparation_s=0,
            prepared_before=False,
            pairs_s=read.seconds,
            num_pairs=_num_pairs(benchmarks),
            # Read for themselves: they may be more than those of finished models.
            num_milestone_pairs=_num_pairs(of_milestones.benchmarks(self.corpus))
            if of_milestones
            else 0,
            stages=paces,
            evaluations={
                stage: self._evaluation(stage, spec, path, benchmarks)
                for stage, (spec, path) in models.items()
            },
        )

    def _stage(
        self,
        stage: str,
        spec: ModelSpec,
        training: TrainingSpec | None,
        teachers: dict[str, Path] | None,
    ) -> tuple[StagePace, Path]:
        """A stage's pace, and the model that came out."""
        checkpoints = CheckpointFolder(self.scratch / "checkpoints" / stage, fingerprint="trial")
        self.maker.pace = None
        with _timed() as made:
            model, _ = self.maker.make(
                stage, spec, training, self.corpus, checkpoints, teachers=teachers
            )
        checkpoints.remove()
        path = self.scratch / stage
        with _timed() as exported:
            tokenizer_dir = self.corpus.entries.tokenizer_dir
            export_model(model, tokenizer_dir, path, {}, dtype=self.setup.dtype)
        pace = StagePace(
            build_s=made.seconds - self.maker.tried_s,
            training=self.maker.pace,
            export_s=exported.seconds,
        )
        return pace, path

    # -- finished models --------------------------------------------------------------------------

    def _evaluation(
        self, stage: str, spec: ModelSpec, path: Path, benchmarks: Mapping[str, Sequence[Task]]
    ) -> EvaluationPace:
        evaluation = self.setup.job.evaluation
        attention = self.setup.attention(stage, spec, training=False)
        with _timed() as loaded:
            model = load_model(str(path), attention=attention, where=stage, dtype="auto")
            model = model.to(self.setup.device)
        dev = self.setup.dev_windows(self.corpus, evaluation.dev_windows)
        one = replace(dev, num_windows=min(dev.num_windows, dev.batch_windows))
        some = replace(dev, num_windows=min(dev.num_windows, TIMED_BATCHES * dev.batch_windows))
        few = _thinned(benchmarks, TIMED_PAIRS)
        num_few = _num_pairs(few)
        measure = partial(self._measure, model, stage)
        measure(one, {})  # warms up
        windows_s = measure(some, {})
        if num_few:
            measure(None, _thinned(few, TIMED_PAIRS // 10))
        return EvaluationPace(
            load_s=loaded.seconds,
            dev_window_s=windows_s / some.num_windows,
            pair_s=measure(None, few) / num_few if num_few else 0.0,
            samples_s=measure(one, {}, evaluation.samples) if evaluation.samples else 0.0,
        )

    def _measure(
        self,
        model: nn.Module,
        name: str,
        dev: DevWindows | None,
        benchmarks: Mapping[str, Sequence[Task]],
        samples: int = 0,
    ) -> float:
        """The seconds that it takes to measure a model."""
        evaluation = self.setup.job.evaluation
        with _timed() as measured:
            evaluate_model(
                model,
                self.corpus.tokenizer,
                name=name,
                dev=dev,
                benchmarks=benchmarks,
                leading_space=evaluation.leading_space,
                prefix=evaluation.prefix,
                batch_tokens=evaluation.batch_tokens,
                device=self.setup.device,
                samples=samples,
            )
        return measured.seconds


class _TryingMaker(Maker):
    """Makes models whose training is a trial; `pace` is that of the last one."""

    seconds = 0.0
    pace: StepPace | None = None
    tried_s = 0.0

    def make(self, *given: Any, **named: Any) -> tuple[nn.Module, dict[str, Any]]:
        """As in a run; where nothing is trained, `tried_s` is 0."""
        self.tried_s = 0.0
        return super().make(*given, **named)

    def _ensemble(
        self,
        student: nn.Module,  # noqa: ARG002 - as overridden
        training: TrainingSpec,  # noqa: ARG002
        compiled: Compiled,
        corpus: Corpus,  # noqa: ARG002
        teachers: dict[str, Path],
    ) -> Ensemble:
        """Live in any case: those that fill a cache are not compiled."""
        live = self.setup.job.distillation.cache == "none"
        return live_ensemble(self.setup, teachers, compiled=live and compiled == "all")

    def _train(self, stage: Stage, context: RunContext, **given: Any) -> dict[str, Any]:
        with _timed() as tried:
            self.pace = try_out(stage, context, **given, seconds=self.seconds)
        self.tried_s = tried.seconds
        return {}


def _num_pairs(benchmarks: Mapping[str, Sequence[Task]]) -> int:
    return sum(len(task.items) for tasks in benchmarks.values() for task in tasks)


def _thinned(benchmarks: Mapping[str, Sequence[Task]], pairs: int) -> dict[str, list[Task]]:
    """About so many pairs in all, every n-th of each task."""
    every = max(1, _num_pairs(benchmarks) // pairs)
    return {
        name: [replace(task, items=task.items[::every]) for task in tasks]
        for name, tasks in benchmarks.items()
    }


@dataclass
class _Timed:
    seconds: float = 0.0


@contextmanager
def _timed() -> Iterator[_Timed]:
    """How long what is inside takes, until the device has done it."""
    timed, wait = _Timed(), _waiter()
    began = time.perf_counter()
    yield timed
    wait()
    timed.seconds = time.perf_counter() - began


def _waiter() -> Callable[[], None]:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.synchronize
    return lambda: None
