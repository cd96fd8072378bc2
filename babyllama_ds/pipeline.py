"""A job's stages, in order, each skipped when its outputs already stand.

Enters: a validated job. Leaves: a run directory, from tokenizer to report.

    prepare (corpus → tokenizer → tokens) → check → teachers → student → control
    → evaluate → report

Every rank walks through every stage. What one rank does alone goes through
`ranks.on_rank_zero`, so that its result, or its error, reaches all.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus, CorpusEntries, open_corpus, prepare_corpus
from babyllama_ds.corpus.tokenizer import differing_ids, load_tokenizer
from babyllama_ds.corpus.windows import DevWindows as DevText
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine import distributed
from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.environment import describe_environment
from babyllama_ds.errors import ModelError, Stopped, UserError
from babyllama_ds.evaluation.evaluate import DevWindows, evaluate_model
from babyllama_ds.evaluation.minimal_pairs import Task, load_tasks
from babyllama_ds.fingerprints import (
    evaluation_fingerprint,
    loaded_teacher_fingerprint,
    student_fingerprint,
    trained_fingerprint,
)
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.models.build import build_model, check_positions, load_model
from babyllama_ds.models.export import export_model
from babyllama_ds.models.parts import check_plain_head
from babyllama_ds.report.card import render_model_card
from babyllama_ds.report.write import write_report
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.deepspeed import deepspeed_config, micro_batch, precision
from babyllama_ds.spec.job import (
    DistillationSpec,
    JobSpec,
    ModelSpec,
    PretrainedModel,
    TeacherSpec,
    TrainingSpec,
)
from babyllama_ds.stopping import StopRequest, started_by_launcher
from babyllama_ds.store import RunLock, Store, link_entry
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import check_warmup
from babyllama_ds.training.loop import Stage, Surroundings, train

log = logging.getLogger(__name__)


def run_job(job: JobSpec, *, runs: Path) -> Path:
    """Run every stage of `job` that is not done yet; called by every rank.

    Returns the run directory, `<runs>/<job name>/`.

    Raises:
        UserError: anything a user can mend; the same error on every rank.
        Stopped: the run was asked to stop and can be started again.
    """
    stop = StopRequest(watch_parent=started_by_launcher())
    stop.install()
    device = distributed.start(distributed.resolve_device(job.deepspeed.device))
    directory = RunDirectory(runs / job.run_name)
    try:
        with held_by_rank_zero(RunLock(directory.path, launcher_pid=stop.launcher_pid)):
            ranks.on_rank_zero(lambda: directory.open(job))
            with _state_kept(directory):
                Pipeline(
                    job, directory, Store(runs / "store", while_waiting=stop.check), device, stop
                ).run()
    finally:
        stop.uninstall()
        distributed.stop()
    return directory.path


class Pipeline:
    """One job on one device; the methods are its stages."""

    def __init__(
        self,
        job: JobSpec,
        directory: RunDirectory,
        store: Store,
        device: torch.device,
        stop: StopRequest,
    ) -> None:
        self.job = job
        self.directory = directory
        self.run_dir = directory.path
        self.store = store
        self.device = device
        self.stop = stop
        self.precision = precision(self._deepspeed("student", job.student.training))

    def run(self) -> None:
        """Every stage, in order."""
        corpus = self.prepare()
        self.check(corpus)
        self.describe(corpus)
        teachers = {spec.name: self.teacher(spec, corpus) for spec in self.job.teachers}
        student = self.student(corpus, teachers)
        models = {**teachers, "student": student}
        if self.job.control is not None:
            models["control"] = self.control(corpus)
        for name, path in models.items():
            self.evaluate(name, path, corpus)
        ranks.on_rank_zero(self.report)

    # -- before training --------------------------------------------------------------------------

    def prepare(self) -> Corpus:
        """Tokenizer and token shards, from the store or made now."""
        entries = ranks.on_rank_zero(lambda: prepare_corpus(self.job, self.store, self.stop.check))
        ranks.on_rank_zero(lambda: self._link_corpus(entries))
        return ranks.on_every_rank(lambda: open_corpus(entries))

    def _link_corpus(self, entries: CorpusEntries) -> None:
        for stage, key in (("tokenizer", entries.tokenizer_key), ("tokens", entries.tokens_key)):
            self.directory.claim_stage(stage, key, made_from="the text or the tokenizer")
        link_entry(entries.tokenizer_dir, self.run_dir / "tokenizer")
        link_entry(entries.tokens_dir, self.run_dir / "tokens")

    def check(self, corpus: Corpus) -> None:
        """Everything that can be known to fail, before hours of training."""
        ranks.on_every_rank(lambda: self._check(corpus))

    def _check(self, corpus: Corpus) -> None:
        for where, model, training in self._models():
            self._attention(where, model, training=training is not None)
            if training is not None:
                self._deepspeed(where, training)
                windows = self._windows(corpus, seed=0)
                check_warmup(
                    training, windows.num_windows, windows.length, where=_training_key(where)
                )
        self._dev_text(corpus, self.job.evaluation.dev_windows)
        self._benchmarks(corpus)
        for spec in self.job.teachers:
            if isinstance(spec.model, PretrainedModel):
                self._check_loaded(f"teachers.{spec.name}.model", spec.model, corpus)
        if isinstance(self.job.student.model, PretrainedModel):
            self._check_loaded("student.model", self.job.student.model, corpus)

    def _check_loaded(self, where: str, model_spec: PretrainedModel, corpus: Corpus) -> None:
        """The vocabulary, positions and head of a loaded model fit."""
        theirs = load_tokenizer(model_spec.path)
        different = differing_ids(corpus.tokenizer, theirs)
        if different:
            shown = ", ".join(map(str, different[:8]))
            raise ModelError.of(
                where,
                got=f"a vocabulary that differs in {len(different)} ids ({shown}, …)",
                expected="the student's: the same bytes for every id",
                hint=f"use this model's tokenizer: tokenizer={{kind: pretrained, "
                f"path: {model_spec.path}}}",
            )
        attention = self._attention(where, model_spec, training=False)
        model = build_model(model_spec, corpus.tokenizer, seed=0, attention=attention, where=where)
        check_positions(model, self.job.windows.length, where=where)
        check_plain_head(model, where=where)

    def describe(self, corpus: Corpus) -> None:
        """Say what runs where, and keep it for the report."""
        attention = {
            where: self._attention(where, model, training=training is not None)
            for where, model, training in self._models()
        }
        facts: dict[str, Any] = {
            **describe_environment(self.device),
            "ranks": ranks.world_size(),
            "threads_per_rank": torch.get_num_threads(),
            "zero_stage": self._deepspeed("student", self.job.student.training)[
                "zero_optimization"
            ]["stage"],
            "device": self.device.type,
            "attention": attention,
            "precision": self.precision,
            "seeds": {where: self.job.stage_seed(where) for where in attention},
            "fingerprints": {
                "job": files.hash_json(self.job.model_dump(mode="json")),
                "tokenizer": corpus.entries.tokenizer_key,
                "tokens": corpus.entries.tokens_key,
            },
        }
        ranks.on_rank_zero(lambda: self._keep_environment(facts))
        log.info(
            "%s: ranks %d, on %s, threads per rank %d, ZeRO-%d, %s, attention %s, in %s",
            self.job.run_name,
            facts["ranks"],
            facts["hardware"]["cuda_device"] or facts["hardware"]["host_cpu"] or "cpu",
            facts["threads_per_rank"],
            facts["zero_stage"],
            self.precision,
            ", ".join(sorted(set(attention.values()))),
            self.run_dir,
        )

    def _keep_environment(self, facts: dict[str, Any]) -> None:
        """Write where the models are made; a later start that makes none does not rewrite it."""
        path = self.run_dir / "environment.json"
        made = (self.run_dir / "student" / files.MANIFEST_NAME).exists()
        if not (made and path.exists()):
            files.write_json(path, facts)

    # -- training ---------------------------------------------------------------------------------

    def teacher(self, spec: TeacherSpec, corpus: Corpus) -> Path:
        """The teacher's model directory in the store: found, trained, or taken in."""
        stage = f"teachers/{spec.name}"
        key = ranks.on_rank_zero(lambda: self._teacher_key(spec, corpus))
        ranks.on_rank_zero(
            lambda: self.directory.claim_stage(
                stage, key, made_from="its text, weights or precision"
            )
        )
        with held_by_rank_zero(self.store.lock("teachers", key)):
            entry = ranks.on_rank_zero(lambda: self.store.find("teachers", key))
            if entry is None:
                entry = self._make_teacher(spec, corpus, stage, key)
            else:
                log.info("%s: done before", stage)
        found = entry
        ranks.on_rank_zero(lambda: link_entry(found, self.run_dir / "teachers" / spec.name))
        return found

    def _teacher_key(self, spec: TeacherSpec, corpus: Corpus) -> str:
        if spec.training is None:
            return loaded_teacher_fingerprint(spec, corpus.entries.tokenizer_key)
        return trained_fingerprint(
            spec.model,
            spec.training,
            tokens_key=corpus.entries.tokens_key,
            windows=self.job.windows,
            seed=self.job.stage_seed(f"teachers/{spec.name}"),
            precision=self.precision,
        )

    def _make_teacher(self, spec: TeacherSpec, corpus: Corpus, stage: str, key: str) -> Path:
        model = self._build(stage, spec.model, corpus, seed=self.job.stage_seed(stage))
        summary = {"params": None, "steps": 0, "train_tokens": 0, "seconds": 0.0}
        checkpoints = CheckpointFolder(self.run_dir / "checkpoints" / stage, fingerprint=key)
        if spec.training is not None:
            summary = self._train(stage, model, spec.training, corpus, checkpoints, None, None)

        def publish() -> Path:
            directory = self.store.new_directory("teachers", key)
            export_model(model, corpus.entries.tokenizer_dir, directory, summary, dtype=self._dtype)
            return self.store.publish("teachers", key, directory, {"stage": stage})

        entry = ranks.on_rank_zero(publish)
        ranks.on_rank_zero(checkpoints.remove)
        return entry

    def student(self, corpus: Corpus, teachers: dict[str, Path]) -> Path:
        """The distilled model."""
        training = self.job.student.training
        key = student_fingerprint(
            self._student_key(training, corpus), self.job, sorted(teachers.items())
        )

        def ensemble() -> Ensemble:
            return Ensemble(
                [
                    Member(spec.name, self._frozen(spec, teachers[spec.name]), spec.weight)
                    for spec in self.job.teachers
                ]
            )

        return self._trained_in_run(
            "student", training, corpus, key, self.job.distillation, ensemble
        )

    def control(self, corpus: Corpus) -> Path:
        """The student's twin, trained without teachers."""
        assert self.job.control is not None
        training = self.job.control.training or self.job.student.training
        key = self._student_key(training, corpus)
        return self._trained_in_run("control", training, corpus, key, None, None)

    def _student_key(self, training: TrainingSpec, corpus: Corpus) -> str:
        return trained_fingerprint(
            self.job.student.model,
            training,
            tokens_key=corpus.entries.tokens_key,
            windows=self.job.windows,
            seed=self.job.stage_seed("student"),
            precision=self.precision,
        )

    def _trained_in_run(
        self,
        stage: str,
        training: TrainingSpec,
        corpus: Corpus,
        key: str,
        distillation: DistillationSpec | None,
        make_ensemble: Callable[[], Ensemble] | None,
    ) -> Path:
        target = self.run_dir / stage
        ranks.on_rank_zero(
            lambda: self.directory.claim_stage(
                stage, key, made_from="its text, teachers or precision"
            )
        )
        if ranks.on_rank_zero(lambda: files.read_manifest(target) is not None):
            log.info("%s: done before", stage)
            return target
        model = self._build(stage, self.job.student.model, corpus, seed=self.job.stage_seed(stage))
        ensemble = make_ensemble() if make_ensemble else None
        checkpoints = CheckpointFolder(self.run_dir / "checkpoints" / stage, fingerprint=key)
        summary = self._train(stage, model, training, corpus, checkpoints, distillation, ensemble)
        if ensemble is not None:
            ensemble.destroy()

        def publish() -> None:
            directory = files.temporary_beside(target)
            directory.mkdir(parents=True)
            export_model(model, corpus.entries.tokenizer_dir, directory, summary, dtype=self._dtype)
            files.write_manifest(directory, fingerprint=key)
            directory.rename(target)

        ranks.on_rank_zero(publish)
        ranks.on_rank_zero(checkpoints.remove)
        return target

    def _train(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        corpus: Corpus,
        checkpoints: CheckpointFolder,
        distillation: DistillationSpec | None,
        ensemble: Ensemble | None,
    ) -> dict[str, Any]:
        seed = self.job.stage_seed(stage)
        log.info("%s: training", stage)
        return train(
            Stage(
                name=stage,
                model=model,
                training=training,
                distillation=distillation,
                vocab_size=len(corpus.tokenizer),
                seed=seed,
                micro_batch=micro_batch(training, ranks.world_size(), where=_training_key(stage)),
                deepspeed=self._deepspeed(stage, training),
            ),
            Surroundings(
                run_dir=self.run_dir,
                device=self.device,
                stop=self.stop,
                checkpoints=checkpoints,
            ),
            windows=self._windows(corpus, seed=seed),
            dev=self._dev_text(corpus, training.evaluate_windows),
            ensemble=ensemble,
        )

    # -- after training ---------------------------------------------------------------------------

    def evaluate(self, name: str, path: Path, corpus: Corpus) -> None:
        """Measure a finished model, unless the same measurement stands."""
        result_path = self.run_dir / "evaluation" / f"{name}.json"
        fingerprint = ranks.on_rank_zero(
            lambda: evaluation_fingerprint(
                path, self.job, corpus.entries.tokens_key, corpus.entries.pairs_dir
            )
        )
        if ranks.on_rank_zero(lambda: _stands(result_path, fingerprint)):
            log.info("evaluation of %s: done before", name)
            return
        started = time.monotonic()
        result = evaluate_model(
            path.resolve(),
            corpus.tokenizer,
            name=name,
            dev=self._dev_text(corpus, self.job.evaluation.dev_windows),
            benchmarks=self._benchmarks(corpus),
            leading_space=self.job.evaluation.leading_space,
            batch_tokens=self.job.evaluation.batch_tokens,
            device=self.device,
            attention=self._attention(name, self._spec_of(name), training=False),
            on_batch=lambda _done, _all: self.stop.check(),
        )
        result |= {"fingerprint": fingerprint, "seconds": time.monotonic() - started}
        ranks.on_rank_zero(lambda: files.write_json(result_path, result))

    def report(self) -> None:
        """report/, and the model cards that quote it."""
        shutil.rmtree(self.run_dir / "checkpoints", ignore_errors=True)
        report = write_report(self.run_dir)
        for name in ("student", "control"):
            if (self.run_dir / name).is_dir():
                card = render_model_card(report, name)
                files.write_atomic(self.run_dir / name / "README.md", card)
        log.info("report: %s", self.run_dir / "report" / "report.md")

    # -- parts ------------------------------------------------------------------------------------

    def _models(self) -> Iterator[tuple[str, ModelSpec, TrainingSpec | None]]:
        for spec in self.job.teachers:
            yield f"teachers/{spec.name}", spec.model, spec.training
        yield "student", self.job.student.model, self.job.student.training
        if self.job.control is not None and self.job.control.training is not None:
            yield "control", self.job.student.model, self.job.control.training

    def _spec_of(self, name: str) -> ModelSpec:
        teachers = {spec.name: spec.model for spec in self.job.teachers}
        return teachers.get(name, self.job.student.model)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def _attention(self, where: str, model: ModelSpec, *, training: bool) -> str:
        return resolve_attention(
            model.attention,
            device=self.device.type,  # type: ignore[arg-type]
            precision=self.precision,
            training=training,
            where=f"{where}.model.attention",
        )

    def _deepspeed(self, stage: str, training: TrainingSpec) -> dict[str, Any]:
        return deepspeed_config(
            self.job,
            training,
            device=self.device.type,  # type: ignore[arg-type]
            ranks=ranks.world_size(),
            where=_training_key(stage),
        )

    def _build(self, where: str, model: ModelSpec, corpus: Corpus, *, seed: int) -> nn.Module:
        attention = self._attention(where, model, training=True)
        return ranks.on_every_rank(
            lambda: build_model(
                model, corpus.tokenizer, seed=seed, attention=attention, where=where
            )
        )

    def _frozen(self, spec: TeacherSpec, path: Path) -> FrozenModel:
        where = f"teachers/{spec.name}"
        attention = self._attention(where, spec.model, training=False)
        model = load_model(str(path.resolve()), attention=attention, where=where, dtype=self._dtype)
        return FrozenModel(model, device=self.device, dtype=self._dtype)

    def _windows(self, corpus: Corpus, *, seed: int) -> TrainWindows:
        spec = self.job.windows
        return TrainWindows(corpus.shards, length=spec.length, offsets=spec.offsets, seed=seed)

    def _dev_text(self, corpus: Corpus, limit: int | None) -> DevWindows:
        text = DevText(corpus.shards, length=self.job.windows.length, limit=limit)
        per_pass = self.job.evaluation.batch_tokens // self.job.windows.length
        return DevWindows(
            windows_of=lambda ids: text.windows(np.asarray(ids, dtype=np.int64)),
            num_windows=text.num_windows,
            batch_windows=max(1, per_pass),
            byte_lengths=corpus.byte_lengths,
        )

    def _benchmarks(self, corpus: Corpus) -> dict[str, list[Task]]:
        folders = {pairs.name: Path(pairs.path) for pairs in self.job.evaluation.minimal_pairs}
        if corpus.entries.pairs_dir is not None:
            folders["nursery"] = corpus.entries.pairs_dir
        limit = self.job.evaluation.max_pairs_per_task
        return {name: load_tasks(path, max_pairs=limit) for name, path in folders.items()}


@contextmanager
def held_by_rank_zero(manager: AbstractContextManager[Any]) -> Iterator[None]:
    """A context that rank 0 holds for all; its error at entry reaches every rank."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(manager)

        ranks.on_rank_zero(enter)
        yield


@contextmanager
def _state_kept(directory: RunDirectory) -> Iterator[None]:
    """`state.json` tells how the run stands and how it ended."""
    lead = ranks.rank() == 0
    if lead:
        directory.set_state("running", pid=os.getpid(), since=time.time())
    try:
        yield
    except Stopped as stop:
        if lead:
            directory.set_state("stopped", reason=stop.reason, at=stop.at)
        raise
    except BaseException as error:
        if lead:
            expected = isinstance(error, UserError)
            text = str(error) if expected else f"{type(error).__name__}: {error}"
            directory.set_state("failed", error=text)
        raise
    if lead:
        directory.set_state("done")


def _stands(result_path: Path, fingerprint: str) -> bool:
    return result_path.exists() and files.read_json(result_path).get("fingerprint") == fingerprint


def _training_key(stage: str) -> str:
    return f"{stage.replace('/', '.')}.training"
