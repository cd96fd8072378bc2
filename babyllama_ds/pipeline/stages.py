"""A job's stages, in order, each skipped when its outputs already stand.

Enters: a validated job and its run directory. Leaves: the directory, from tokenizer to report.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus, CorpusEntries, open_corpus, prepare_corpus
from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.fingerprints import (
    loaded_teacher_fingerprint,
    student_fingerprint,
    trained_fingerprint,
)
from babyllama_ds.models.export import export_model
from babyllama_ds.pipeline.checks import check_job
from babyllama_ds.pipeline.describing import describe_run
from babyllama_ds.pipeline.equal import check_same_corpus
from babyllama_ds.pipeline.evaluations import Evaluations
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.making import Maker
from babyllama_ds.pipeline.speed import Speed
from babyllama_ds.report.board import write_boards
from babyllama_ds.report.card import render_model_card
from babyllama_ds.report.write import write_report
from babyllama_ds.rundir import METRICS_NAME, MILESTONES_NAME, RunDirectory
from babyllama_ds.spec.job import JobSpec, TeacherSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store, link_entry, lost_target
from babyllama_ds.training.metrics import logged_of, restore_boards, tell_as_done
from babyllama_ds.training.milestones import share_milestones

log = logging.getLogger(__name__)


class Pipeline:
    """One job on one device; the methods are its stages."""

    def __init__(
        self,
        job: JobSpec,
        directory: RunDirectory,
        store: Store,
        storages: Storages,
        device: torch.device,
        stop: StopRequest,
    ) -> None:
        self.job = job
        self.directory = directory
        self.run_dir = directory.path
        self.store = store
        self.storages = storages
        self.stop = stop
        self.setup = JobSetup(job, device)
        self.speed = Speed(self.setup)
        self.maker = Maker(self.setup, directory, self.speed, store, storages, stop)
        self.evaluations = Evaluations(self.setup, self.run_dir, store, storages, stop)

    def run(self) -> None:
        """Every stage, in order."""
        corpus = self.prepare()
        ranks.on_every_rank(lambda: check_job(self.setup, corpus))
        describe_run(self.setup, self.directory, self.storages, self.speed, corpus)
        teachers = {spec.name: self.teacher(spec, corpus) for spec in self.job.teachers}
        student = self.student(corpus, teachers)
        models = {**teachers, "student": student}
        if self.job.control is not None:
            models["control"] = self.control(corpus)
        self.evaluations.make(models, corpus)
        self.storages.on_each(self.tidy)
        ranks.on_rank_zero(self.report)

    # -- before training --------------------------------------------------------------------------

    def prepare(self) -> Corpus:
        """Tokenizer and token shards, from the store or made now, on each storage."""
        of_each = self.storages.on_each(
            lambda: prepare_corpus(self.job, self.store, self.stop.check)
        )
        check_same_corpus(self.storages, of_each)
        entries = of_each[0]
        self.storages.on_each(lambda: self._link_corpus(entries))
        return ranks.on_every_rank(lambda: open_corpus(entries))

    def _link_corpus(self, entries: CorpusEntries) -> None:
        for stage, key in (("tokenizer", entries.tokenizer_key), ("tokens", entries.tokens_key)):
            self.directory.claim_stage(stage, key, made_from="the text or the tokenizer")
        link_entry(entries.tokenizer_dir, self.run_dir / "tokenizer")
        link_entry(entries.tokens_dir, self.run_dir / "tokens")

    # -- training ---------------------------------------------------------------------------------

    def teacher(self, spec: TeacherSpec, corpus: Corpus) -> Path:
        """The teacher's model directory in the store: found, trained, or taken in.

        While it is trained, its checkpoints lie in the store too: they belong to whoever holds its
        lock, so that a run that waited for one that died goes on where that one was.
        """
        stage = f"teachers/{spec.name}"
        key = ranks.on_rank_zero(lambda: self._teacher_key(spec, corpus))
        self.storages.on_each(
            lambda: self.directory.claim_stage(
                stage, key, made_from="its text, weights or precision"
            )
        )
        with self.storages.held(self.store.lock("teachers", key)):
            checkpoints = self._checkpoints_in_store(key)
            entry = self.storages.everywhere(lambda: self.store.find_whole("teachers", key))
            if entry is None:
                if lost := ranks.on_rank_zero(lambda: lost_target(self.run_dir / stage)):
                    log.warning(
                        "%s: a link to %s, which is not there: it is made anew", stage, lost
                    )
                entry = self._teacher_in_store(spec, corpus, stage, key, checkpoints)
            else:
                log.info("%s: done before", stage)
                done = entry
                ranks.on_rank_zero(lambda: self._tell_as_done(stage, done))
                # Some are left where a run died when the model stood already.
                self.storages.on_each(checkpoints.remove)
        found = entry
        self.storages.on_each(lambda: link_entry(found, self.run_dir / "teachers" / spec.name))
        return found

    def _teacher_key(self, spec: TeacherSpec, corpus: Corpus) -> str:
        if spec.training is None:
            return loaded_teacher_fingerprint(
                spec, corpus.entries.tokenizer_key, precision=self.setup.precision
            )
        return self._trained_key(f"teachers/{spec.name}", spec.model, spec.training, corpus)

    def _checkpoints_in_store(self, key: str) -> CheckpointFolder:
        of_each = self.storages.on_each(lambda: self.store.building_place("teachers", key))
        return CheckpointFolder(
            of_each[self.storages.mine], fingerprint=key, storages=self.storages
        )

    def _teacher_in_store(
        self,
        spec: TeacherSpec,
        corpus: Corpus,
        stage: str,
        key: str,
        checkpoints: CheckpointFolder,
    ) -> Path:
        model, summary = self.maker.make(stage, spec.model, spec.training, corpus, checkpoints)

        def publish() -> None:
            directory = self.store.new_directory("teachers", key)
            try:
                tokenizer_dir = corpus.entries.tokenizer_dir
                export_model(model, tokenizer_dir, directory, summary, dtype=self.setup.dtype)
                if spec.training is not None:  # for the curves of other runs, which find it done
                    files.write_atomic(directory / METRICS_NAME, logged_of(self.run_dir, stage))
                self.store.publish("teachers", key, directory, {"stage": stage})
            finally:
                # Gone already when published; else it would leave no room to say what happened.
                shutil.rmtree(directory, ignore_errors=True)

        ranks.on_rank_zero(publish)
        return self._finished(lambda: self.store.find("teachers", key), checkpoints)

    def _tell_as_done(self, stage: str, entry: Path) -> None:
        metrics = entry / METRICS_NAME
        if metrics.exists():
            logged = metrics.read_text(encoding="utf-8")
        else:  # loaded, or of an earlier version: what stands here, where it is all of it
            steps: int = files.read_json(entry / "training.json")["steps"]
            logged = logged_of(self.run_dir, stage, to_step=steps)
        tell_as_done(self.run_dir, stage, logged)

    def student(self, corpus: Corpus, teachers: dict[str, Path]) -> Path:
        """The distilled model."""
        training = self.job.student.training
        key = student_fingerprint(
            self._student_key(training, corpus), self.job, sorted(teachers.items())
        )
        return self._trained_in_run("student", training, corpus, key, teachers)

    def control(self, corpus: Corpus) -> Path:
        """The student's twin, trained without teachers."""
        assert self.job.control is not None
        training = self.job.control.training or self.job.student.training
        key = self._student_key(training, corpus)
        return self._trained_in_run("control", training, corpus, key, None)

    def _student_key(self, training: TrainingSpec, corpus: Corpus) -> str:
        return self._trained_key("student", self.job.student.model, training, corpus)

    def _trained_in_run(
        self,
        stage: str,
        training: TrainingSpec,
        corpus: Corpus,
        key: str,
        teachers: dict[str, Path] | None,
    ) -> Path:
        target = self.run_dir / stage
        self.storages.on_each(
            lambda: self.directory.claim_stage(
                stage, key, made_from="its text, teachers or precision"
            )
        )

        def find() -> Path | None:
            return target if files.read_manifest(target) is not None else None

        def find_whole() -> Path | None:
            if find() is not None:
                files.verify_manifest(target)
            return find()

        if self.storages.everywhere(find_whole) is not None:
            log.info("%s: done before", stage)
            self._share_milestones(stage)
            return target
        checkpoints = CheckpointFolder(
            self.run_dir / "checkpoints" / stage, fingerprint=key, storages=self.storages
        )
        model, summary = self.maker.make(
            stage, self.job.student.model, training, corpus, checkpoints, teachers=teachers
        )

        def publish() -> None:
            with files.appearing(target) as directory:
                directory.mkdir(parents=True)
                tokenizer_dir = corpus.entries.tokenizer_dir
                export_model(model, tokenizer_dir, directory, summary, dtype=self.setup.dtype)
                files.write_manifest(directory, fingerprint=key)

        ranks.on_rank_zero(publish)
        self._share_milestones(stage)
        return self._finished(find, checkpoints)

    def _share_milestones(self, stage: str) -> None:
        share_milestones(self.run_dir / MILESTONES_NAME / stage, self.storages)

    def _finished(self, find: Callable[[], Path | None], checkpoints: CheckpointFolder) -> Path:
        """The model just made on rank 0, now on every storage; its checkpoints are gone."""
        made = self.storages.everywhere(find)
        assert made is not None, "it was published"
        others = range(1, len(self.storages.leads))
        self.directory.send_metrics(self.storages, source=0, to=others)
        self.storages.on_each(checkpoints.remove)
        return made

    def _trained_key(
        self, stage: str, model: ModelSpec, training: TrainingSpec, corpus: Corpus
    ) -> str:
        return trained_fingerprint(
            model,
            training,
            tokens_key=corpus.entries.tokens_key,
            windows=self.job.windows,
            seed=self.job.stage_seed(stage),
            precision=self.setup.precision,
        )

    # -- after training ---------------------------------------------------------------------------

    def tidy(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.run_dir / "checkpoints", ignore_errors=True)

    def report(self) -> None:
        """report/, TensorBoard's part of it, and the model cards that quote it."""
        report = write_report(self.run_dir)
        for name in ("student", "control"):
            if (self.run_dir / name).is_dir():
                card = render_model_card(report, name)
                files.write_atomic(self.run_dir / name / "README.md", card)
        restore_boards(self.run_dir)  # of trainings that another node logged, or that were lost
        write_boards(self.run_dir, report)
        log.info("report: %s", self.run_dir / "report" / "report.html")
