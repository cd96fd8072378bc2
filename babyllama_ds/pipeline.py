"""A job's stages, in order, each skipped when its outputs already stand.

Enters: a validated job. Leaves: a run directory, from tokenizer to report.

    prepare (corpus → tokenizer → tokens) → check → teachers → (cache) → student → control
    → evaluate → report

Every rank walks through every stage. What one rank does alone goes through
`ranks.on_rank_zero`, so that its result, or its error, reaches all.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus, CorpusEntries, open_corpus, prepare_corpus
from babyllama_ds.corpus.tokenizer import differing_ids, load_tokenizer, vocabulary_hash
from babyllama_ds.corpus.windows import DevWindows as DevText
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine import distributed
from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.engine.compiling import Compiled, choose_compiled
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.matmul_rate import MatmulRates, measure_matmul_rates
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
from babyllama_ds.models.build import (
    build_model,
    check_positions,
    count_parameters,
    load_model,
)
from babyllama_ds.models.export import export_model
from babyllama_ds.models.parts import HeadKind, check_plain_head
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
from babyllama_ds.teachers.cache.check import check_head, check_top_k
from babyllama_ds.teachers.cache.opening import Surroundings as CacheSurroundings
from babyllama_ds.teachers.cache.remembered import Teacher, TeacherInput, remembered_ensemble
from babyllama_ds.teachers.cache.tiers import TRAINED_BYTES_A_PARAMETER
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import check_warmup, total_steps
from babyllama_ds.training.loop import Stage, Surroundings, train
from babyllama_ds.training.meter import Meter, Work, work_of
from babyllama_ds.training.micro_batch import find_micro_batch
from babyllama_ds.training.objective import Objective

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
        self._rates: MatmulRates | None = None

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
        choose_compiled(self.job.deepspeed.compile, device=self._device_kind, products_s=0)
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
                head = self._check_loaded(f"teachers.{spec.name}.model", spec.model, corpus)
                if self.job.distillation.cache == "hidden":
                    check_head(head, teacher=spec.name)
        check_top_k(self.job.distillation, len(corpus.tokenizer))
        if isinstance(self.job.student.model, PretrainedModel):
            self._check_loaded("student.model", self.job.student.model, corpus)

    def _check_loaded(self, where: str, model_spec: PretrainedModel, corpus: Corpus) -> HeadKind:
        """The vocabulary, positions and head of a loaded model fit; what kind of head it has."""
        theirs = load_tokenizer(model_spec.path, where=where)
        different = differing_ids(corpus.tokenizer, theirs)
        if different:
            shown = [f"{i} is {b}, not {a}" for i, (a, b) in islice(different.items(), 4)]
            more = ["…"] if len(different) > len(shown) else []
            raise ModelError.of(
                where,
                got=f"a vocabulary that differs in {len(different)} of "
                f"{len(corpus.tokenizer)} ids ({'; '.join(shown + more)})",
                expected="the job's: the same bytes for every id",
                hint=f"use this model's tokenizer: tokenizer={{kind: pretrained, "
                f"path: {model_spec.path}}}",
            )
        attention = self._attention(where, model_spec, training=False)
        model = build_model(model_spec, corpus.tokenizer, seed=0, attention=attention, where=where)
        check_positions(model, self.job.windows.length, where=where)
        return check_plain_head(model, where=where)

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
            "matmul_rate": None if self._is_made() else self._matmul_rate(corpus),
            "seeds": {where: self.job.stage_seed(where) for where in attention},
            "settled": ranks.on_rank_zero(self.directory.settled),
            "fingerprints": {
                "job": files.hash_json(self.job.model_dump(mode="json")),
                "tokenizer": corpus.entries.tokenizer_key,
                "tokens": corpus.entries.tokens_key,
                "vocabulary": vocabulary_hash(corpus.tokenizer),
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
        if not _made_before(self.run_dir):
            files.write_json(self.run_dir / "environment.json", facts)

    # -- speed ------------------------------------------------------------------------------------

    def _is_made(self) -> bool:
        return ranks.on_rank_zero(lambda: _made_before(self.run_dir))

    def _matmul_rate(self, corpus: Corpus) -> dict[str, float]:
        """FLOP/s of this machine's bf16 products: large, and at the shapes of the distillation."""
        rates = self._measured_rates(corpus)
        return {
            "square_flops_per_s": rates.square,
            "same_shapes_flops_per_s": rates.same_shapes(self._work("student", corpus).products),
        }

    def _measured_rates(self, corpus: Corpus) -> MatmulRates:
        """Of the products of all stages; measured once, when first asked for. A collective."""
        if self._rates is None:
            stages = [where for where, _, training in self._models() if training is not None]
            works = [self._work(stage, corpus) for stage in (*stages, "control")]
            products = dict.fromkeys(product for work in works for product in work.products)
            self._rates = measure_matmul_rates(products, self.device)
        return self._rates

    def _meter(self, stage: str, corpus: Corpus) -> Meter:
        work = self._work(stage, corpus)
        return Meter(
            flops_per_token=work.flops_per_token,
            matmul_flops_per_s=self._measured_rates(corpus).same_shapes(work.products),
        )

    def _work(self, stage: str, corpus: Corpus) -> Work:
        trained = {f"teachers/{teacher.name}": teacher for teacher in self.job.teachers}
        spec = trained.get(stage, self.job.student)
        training = spec.training
        if stage == "control" and self.job.control is not None:
            training = self.job.control.training or training
        assert training is not None, "a stage that trains"
        return work_of(
            spec.model,
            [teacher.model for teacher in self.job.teachers] if stage == "student" else [],
            length=self.job.windows.length,
            micro_batch=micro_batch(training, ranks.world_size(), where=_training_key(stage)),
            vocab_size=len(corpus.tokenizer),
            cache=self.job.distillation.cache,
            where=stage,
        )

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
            training, compiled = self._settle(stage, model, spec.training, corpus)
            summary = self._train(stage, model, training, compiled, corpus, checkpoints, None, None)

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

        return self._trained_in_run("student", training, corpus, key, teachers)

    def _ensemble(
        self,
        student: nn.Module,
        training: TrainingSpec,
        compiled: Compiled,
        corpus: Corpus,
        teachers: dict[str, Path],
    ) -> Ensemble:
        if self.job.distillation.cache != "none":
            return self._remembered(student, training, corpus, teachers)
        return self._live(teachers, compiled=compiled == "all")

    def _live(self, teachers: dict[str, Path], *, compiled: bool) -> Ensemble:
        return Ensemble(
            [
                Member(
                    spec.name,
                    self._frozen(spec, teachers[spec.name], compiled=compiled),
                    spec.weight,
                )
                for spec in self.job.teachers
            ]
        )

    def _remembered(
        self,
        student: nn.Module,
        training: TrainingSpec,
        corpus: Corpus,
        teachers: dict[str, Path],
    ) -> Ensemble:
        """The ensemble computed once for each distinct window, or found in the store."""
        windows = self._windows(corpus, seed=0)  # what is distinct depends on no seed
        return remembered_ensemble(
            self.job.distillation,
            [
                Teacher(
                    name=spec.name,
                    weight=spec.weight,
                    model_dir=teachers[spec.name].resolve(),
                    attention=self._attention(f"teachers/{spec.name}", spec.model, training=False),
                    load=partial(self._frozen, spec, teachers[spec.name]),
                )
                for spec in self.job.teachers
            ],
            TeacherInput(
                windows=windows,
                tokens_dir=corpus.entries.tokens_dir,
                vocab_size=len(corpus.tokenizer),
                dtype=self._dtype,
                forward_windows=micro_batch(
                    training, ranks.world_size(), where=_training_key("student")
                ),
            ),
            CacheSurroundings(
                store=self.store,
                stop=self.stop,
                device=self.device,
                tier=self.job.distillation.cache_tier,
                student_bytes=TRAINED_BYTES_A_PARAMETER * count_parameters(student),
            ),
        )

    def control(self, corpus: Corpus) -> Path:
        """The student's twin, trained without teachers."""
        assert self.job.control is not None
        training = self.job.control.training or self.job.student.training
        key = self._student_key(training, corpus)
        return self._trained_in_run("control", training, corpus, key, None)

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
        teachers: dict[str, Path] | None,
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
        distillation = self.job.distillation if teachers else None
        training, compiled = self._settle(stage, model, training, corpus, distillation, teachers)
        ensemble = self._ensemble(model, training, compiled, corpus, teachers) if teachers else None
        checkpoints = CheckpointFolder(self.run_dir / "checkpoints" / stage, fingerprint=key)
        summary = self._train(
            stage, model, training, compiled, corpus, checkpoints, distillation, ensemble
        )
        if ensemble is not None:
            summary |= ensemble.closing_facts(model)
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

    def _settle(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        corpus: Corpus,
        distillation: DistillationSpec | None = None,
        teachers: dict[str, Path] | None = None,
    ) -> tuple[TrainingSpec, Compiled]:
        """What the job leaves open (`auto`), as found at the first start on such ranks.

        Later starts do the same, also where memory is less or a compiler is gone: another
        micro-batch rounds otherwise.
        """
        where = f"{stage} on {ranks.world_size()} {self.device.type} ranks"
        known = ranks.on_rank_zero(self.directory.settled).get(where, {})
        if training.micro_batch == "auto":
            windows = known.get("micro_batch") or self._find_micro_batch(
                stage, model, training, corpus, distillation, teachers
            )
            log.info("%s: micro_batch auto: %d windows", stage, windows)
            known = {**known, "micro_batch": windows}
            training = training.model_copy(update={"micro_batch": windows})
        asked = self.job.deepspeed.compile
        compiled, why = choose_compiled(
            asked, device=self._device_kind, products_s=self._products_s(stage, training, corpus)
        )
        if asked == "auto":
            if "compile" in known:
                compiled, why = known["compile"], "as at the first start"
            # Rates are measured anew by every start: what rank 0 chooses is for all, and for good.
            compiled = ranks.broadcast_object(compiled)
            known = {**known, "compile": compiled}
        log.info("%s: torch.compile %s: %s", stage, compiled, why)
        ranks.on_rank_zero(lambda: self._keep_settled(where, known))
        return training, compiled

    def _products_s(self, stage: str, training: TrainingSpec, corpus: Corpus) -> float:
        """Seconds of the training's matrix products at the rate measured here."""
        windows = self._windows(corpus, seed=0)
        steps = total_steps(training, windows.num_windows, windows.length)
        meter, tokens = self._meter(stage, corpus), training.batch_windows * windows.length
        return steps * tokens * meter.flops_per_token / meter.matmul_flops_per_s

    def _keep_settled(self, where: str, found: dict[str, Any]) -> None:
        """For later starts, and for the report beside the other facts of where the run is made."""
        self.directory.settle(where, found)
        path = self.run_dir / "environment.json"
        files.write_json(path, files.read_json(path) | {"settled": self.directory.settled()})

    def _find_micro_batch(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        corpus: Corpus,
        distillation: DistillationSpec | None,
        teachers: dict[str, Path] | None,
    ) -> int:
        """By trying out, with live teachers: those of a cache run once in the same shape."""
        ensemble = self._live(teachers, compiled=False) if teachers else None
        try:
            return find_micro_batch(
                Objective(model, vocab_size=len(corpus.tokenizer), distillation=distillation),
                ensemble,
                training=training,
                deepspeed=self._deepspeed(stage, training),
                share=micro_batch(training, ranks.world_size(), where=_training_key(stage)),
                length=self.job.windows.length,
                device=self.device,
                where=_training_key(stage),
            )
        finally:
            if ensemble is not None:
                ensemble.destroy()

    def _train(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        compiled: Compiled,
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
                compiled=compiled != "none",
                meter=self._meter(stage, corpus),
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
    def _device_kind(self) -> distributed.Device:
        return "cuda" if self.device.type == "cuda" else "cpu"

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

    def _frozen(self, spec: TeacherSpec, path: Path, *, compiled: bool = False) -> FrozenModel:
        where = f"teachers/{spec.name}"
        attention = self._attention(where, spec.model, training=False)
        model = load_model(str(path.resolve()), attention=attention, where=where, dtype=self._dtype)
        return FrozenModel(model, device=self.device, dtype=self._dtype, with_compiler=compiled)

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


def _made_before(run_dir: Path) -> bool:
    """Whether the models, and where they were made, are there from an earlier start."""
    student = run_dir / "student" / files.MANIFEST_NAME
    return student.exists() and (run_dir / "environment.json").exists()


def _training_key(stage: str) -> str:
    return f"{stage.replace('/', '.')}.training"
