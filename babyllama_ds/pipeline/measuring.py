"""One model is measured: its directory and a corpus enter, its evaluation leaves.

The same measurement of the same model is done once for all runs: the store keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from babyllama_ds import ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.corpus.tokenizer import tokenizer_fingerprint
from babyllama_ds.evaluation.evaluate import SplitModel, evaluate_model
from babyllama_ds.evaluation.fine_tuning import Learner, fine_tune_suite, kernel_to_learn
from babyllama_ds.evaluation.forward import OnBatch, Share
from babyllama_ds.evaluation.labelled_files import LabelledTask
from babyllama_ds.evaluation.stored import remembering, store_key, stored_evaluation
from babyllama_ds.fingerprints import model_hashes
from babyllama_ds.heartbeat import Heartbeat
from babyllama_ds.models.sizes import absent_kernels
from babyllama_ds.pipeline.ensembles import frozen_teacher
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.spec.evaluation import FineTuning
from babyllama_ds.spec.job import TeacherSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store


class Measurer:
    """Measures the models of one run; `measure` is a collective."""

    def __init__(self, setup: JobSetup, store: Store, stop: StopRequest) -> None:
        self.setup = setup
        self.store = store
        self.stop = stop

    def measure(self, name: str, path: Path, corpus: Corpus, fingerprint: str) -> dict[str, Any]:
        """The evaluation of a run's model by the name it has there, from the store or made now.

        Raises:
            UserError: it cannot be read or measured.
            Stopped: the run was asked to stop.
        """
        job = self.setup.job
        teacher = next((spec for spec in job.teachers if spec.name == name), None)
        stage, model = self._stage_of(teacher)
        attention = self.setup.attention(stage, model, training=False)
        key = store_key(
            fingerprint,
            device=self.setup.device_kind,
            attention=attention,
            tensor_parallel=1 if teacher is None else teacher.tensor_parallel,
        )

        def measure() -> dict[str, Any]:
            with Heartbeat(f"evaluation of {name}") as heartbeat:
                return self._measure_now(name, path, corpus, attention, teacher, heartbeat)

        return stored_evaluation(self.store, key, measure, name=name)

    def _stage_of(self, teacher: TeacherSpec | None) -> tuple[str, ModelSpec]:
        """What a model is in the job: all that are no teachers are what the student is."""
        if teacher is None:
            return "student", self.setup.job.student.model
        return f"teachers/{teacher.name}", teacher.model

    def _measure_now(
        self,
        name: str,
        path: Path,
        corpus: Corpus,
        attention: str,
        teacher: TeacherSpec | None,
        heartbeat: Heartbeat,
    ) -> dict[str, Any]:
        """`teacher`: the one that it is. One that is split is measured as it taught, in groups."""
        started = time.monotonic()

        def on_batch(done: int, batches: int) -> None:
            heartbeat.beat(f"batch {done} of {batches}")
            self.stop.check()

        def on_step(done: int, steps: int) -> None:
            heartbeat.beat(f"step {done} of {steps} of fine-tuning")
            self.stop.check()

        evaluation = self.setup.job.evaluation
        # Hours after the checks: a disk that one rank reads from may be gone.
        benchmarks, suites = ranks.on_every_rank(
            lambda: (
                self.setup.benchmarks(corpus),
                self.setup.suites(teacher=teacher is not None),
            )
        )
        measure = partial(
            evaluate_model,
            tokenizer=corpus.tokenizer,
            name=name,
            dev=self.setup.dev_windows(corpus, evaluation.dev_windows),
            benchmarks=benchmarks,
            leading_space=evaluation.leading_space,
            prefix=evaluation.prefix,
            batch_tokens=evaluation.batch_tokens,
            device=self.setup.device,
            attention=attention,
            samples=evaluation.samples,
            on_batch=on_batch,
        )
        group = None if teacher is None else self.setup.group(teacher)
        if teacher is None or group is None:
            result = measure(path.resolve())
        else:
            frozen = frozen_teacher(self.setup, teacher, path)
            try:
                result = measure(
                    SplitModel(
                        module=frozen.module,
                        params=frozen.params,
                        share=Share(group.number, group.count, counts=group.index == 0),
                    )
                )
            finally:
                frozen.destroy()
        if suites:
            result["fine_tuning"] = self._fine_tune(name, path, corpus, teacher, suites, on_step)
        # By the name that the store's key has, whatever the model's configuration calls it.
        return {**result, "attention": attention, "seconds": time.monotonic() - started}

    def _fine_tune(
        self,
        name: str,
        path: Path,
        corpus: Corpus,
        teacher: TeacherSpec | None,
        suites: Mapping[str, tuple[FineTuning, list[LabelledTask]]],
        on_step: OnBatch,
    ) -> dict[str, Any]:
        """Every suite's scores; each training is in the store as soon as it has ended."""
        evaluation = self.setup.job.evaluation
        stage, model = self._stage_of(teacher)
        key = self.setup.job.model_key(stage)
        attention = kernel_to_learn(
            model.attention,
            device=self.setup.device_kind,
            precision=self.setup.precision,
            where=f"{key}.attention",
            missing=absent_kernels(model, where=key),
        )
        learner = Learner(
            model=str(path.resolve()),
            tokenizer=corpus.tokenizer,
            attention=attention,
            device=self.setup.device,
            batch_tokens=evaluation.batch_tokens,
            leading_space=evaluation.leading_space,
            prefix=evaluation.prefix,
            where=name,
        )
        remember = remembering(
            self.store,
            ranks.on_every_rank(lambda: model_hashes(path)),
            tokenizer_fingerprint(corpus.tokenizer),
            device=self.setup.device_kind,
            attention=attention,
        )
        return {
            suite_name: fine_tune_suite(learner, suite, tasks, remember=remember, on_step=on_step)
            for suite_name, (suite, tasks) in suites.items()
        }
