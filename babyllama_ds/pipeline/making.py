"""One model is made: what describes it, a corpus and its teachers enter; weights, a summary leave.

build → settle what is `auto` → the teachers' ensemble → train
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.engine.compiling import Compiled
from babyllama_ds.models.build import build_model
from babyllama_ds.models.export import write_model
from babyllama_ds.pipeline.ensembles import cached_ensemble, live_ensemble
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.settling import Settling
from babyllama_ds.pipeline.speed import Speed
from babyllama_ds.rundir import MILESTONES_NAME, RunDirectory
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.training.loop import train
from babyllama_ds.training.milestones import MilestoneFolder
from babyllama_ds.training.out_of_memory import memory_needed
from babyllama_ds.training.stage import RunContext, Stage

log = logging.getLogger(__name__)

LESS_MEMORY = (
    "fewer windows (`auto` finds the most that fit), gradient_checkpointing=true, or what else "
    "docs/low-memory.md lists; the same command then goes on from the last checkpoint"
)


class Maker:
    """Makes the models of one run; every method is a collective."""

    def __init__(
        self,
        setup: JobSetup,
        directory: RunDirectory,
        speed: Speed,
        store: Store,
        storages: Storages,
        stop: StopRequest,
    ) -> None:
        self.setup = setup
        self.run_dir = directory.path
        self.speed = speed
        self.settling = Settling(setup, directory, storages, speed)
        self.store = store
        self.storages = storages
        self.stop = stop

    def make(
        self,
        stage: str,
        spec: ModelSpec,
        training: TrainingSpec | None,
        corpus: Corpus,
        checkpoints: CheckpointFolder,
        *,
        teachers: dict[str, Path] | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model of a stage and its summary (`training.json`); rank 0's has the kept weights.

        No `training`: it is loaded as it is. No `teachers`: it learns from the text alone.

        Raises:
            UserError: it cannot be built, settled or trained.
            Stopped: the run was asked to stop; a checkpoint was written.
        """
        model = self._build(stage, spec, corpus, to_train=training is not None)
        if training is None:
            return model, {"params": None, "steps": 0, "train_tokens": 0, "seconds": 0.0}
        with memory_needed(f"{self.setup.job.training_key(stage)}.micro_batch", hint=LESS_MEMORY):
            return model, self._trained(stage, model, training, corpus, checkpoints, teachers)

    def _trained(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        corpus: Corpus,
        checkpoints: CheckpointFolder,
        teachers: dict[str, Path] | None,
    ) -> dict[str, Any]:
        training, compiled = self.settling.settle(stage, model, training, corpus, teachers)
        ensemble = self._ensemble(model, training, compiled, corpus, teachers) if teachers else None
        seed = self.setup.job.stage_seed(stage)
        log.info("%s: training", stage)
        summary = self._train(
            self._stage(stage, model, training, compiled, corpus, distilled=ensemble is not None),
            self._context(stage, training, corpus, checkpoints),
            windows=self.setup.windows(corpus, seed=seed),
            dev=self.setup.dev_windows(corpus, training.evaluate_windows),
            ensemble=ensemble,
        )
        summary["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        if ensemble is not None:
            summary |= ensemble.closing_facts(model)
            ensemble.destroy()
        return summary

    def _build(self, stage: str, spec: ModelSpec, corpus: Corpus, *, to_train: bool) -> nn.Module:
        """The stage's model before training. One that is not trained is on rank 0; on the others,
        whose host may have no room for more copies of it, an empty module."""
        seed = self.setup.job.stage_seed(stage)
        attention = self.setup.attention(stage, spec, training=to_train)

        def build() -> nn.Module:
            if not to_train and ranks.rank() != 0:
                return nn.Module()
            return build_model(spec, corpus.tokenizer, seed=seed, attention=attention, where=stage)

        return ranks.on_every_rank(build)

    def _ensemble(
        self,
        student: nn.Module,
        training: TrainingSpec,
        compiled: Compiled,
        corpus: Corpus,
        teachers: dict[str, Path],
    ) -> Ensemble:
        if self.setup.job.distillation.cache == "none":
            return live_ensemble(self.setup, teachers, compiled=compiled == "all")
        return cached_ensemble(
            self.setup,
            student,
            training,
            corpus,
            teachers,
            store=self.store,
            storages=self.storages,
            stop=self.stop,
        )

    def _train(self, stage: Stage, context: RunContext, **given: Any) -> dict[str, Any]:
        """The training itself; rank 0's module then has the kept weights."""
        return train(stage, context, **given)

    def _stage(
        self,
        stage: str,
        model: nn.Module,
        training: TrainingSpec,
        compiled: Compiled,
        corpus: Corpus,
        *,
        distilled: bool,
    ) -> Stage:
        setup = self.setup
        return Stage(
            name=stage,
            model=model,
            training=training,
            distillation=setup.job.distillation if distilled else None,
            vocab_size=len(corpus.tokenizer),
            seed=setup.job.stage_seed(stage),
            micro_batch=setup.micro_batch(stage, training),
            deepspeed=setup.deepspeed_config(stage, training),
            compiled=compiled != "none",
            meter=self.speed.meter(stage, corpus),
            has_label=setup.has_label(stage, training, corpus),
        )

    def _context(
        self, stage: str, training: TrainingSpec, corpus: Corpus, checkpoints: CheckpointFolder
    ) -> RunContext:
        return RunContext(
            run_dir=self.run_dir,
            device=self.setup.device,
            stop=self.stop,
            checkpoints=checkpoints,
            milestones=self._milestones(stage, training, corpus, checkpoints),
        )

    def _milestones(
        self, stage: str, training: TrainingSpec, corpus: Corpus, checkpoints: CheckpointFolder
    ) -> MilestoneFolder | None:
        milestones = self.setup.milestones(stage, training, corpus)
        if not milestones:
            return None

        def write(model: nn.Module, directory: Path, summary: Mapping[str, Any]) -> None:
            write_model(model, corpus.entries.tokenizer_dir, directory, summary)
            files.write_manifest(directory, fingerprint=checkpoints.fingerprint)

        return MilestoneFolder(
            self.run_dir / MILESTONES_NAME / stage, milestones, write, self.storages
        )
