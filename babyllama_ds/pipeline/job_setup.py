"""A job set up on a device: both enter; kernels, configurations, windows and texts leave, as every
stage needs them.

Nothing here trains or writes. `where` and `stage` name a stage as people see it: `student`,
`control`, `teachers/<name>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from babyllama_ds import ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.corpus.tokenizer import ids_of_tokens
from babyllama_ds.corpus.windows import DevWindows as DevText
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine import distributed
from babyllama_ds.engine.tensor_parallel import RankGroup, rank_group
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.evaluation.fine_tuning import load_suite
from babyllama_ds.evaluation.labelled_files import LabelledTask
from babyllama_ds.evaluation.pair_files import Task, load_tasks
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.models.documents import varies_in_shape
from babyllama_ds.models.sizes import absent_kernels, attention_dropout
from babyllama_ds.spec import deepspeed
from babyllama_ds.spec.evaluation import FineTuning
from babyllama_ds.spec.job import JobSpec, TeacherSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.training.batches import LabelMask, label_mask
from babyllama_ds.training.milestones import Milestone, TextSize, milestones_of


class JobSetup:
    """One job on one device: what of it depends on both, and what several stages read."""

    def __init__(self, job: JobSpec, device: torch.device) -> None:
        self.job = job
        self.device = device
        self.precision = deepspeed.precision(self.deepspeed_config("student", job.student.training))

    def of_milestones(self) -> JobSetup | None:
        """With the evaluation that is milestones' own; none: they are not measured."""
        evaluation = self.job.evaluation.of_milestones()
        if evaluation is None:
            return None
        return JobSetup(self.job.model_copy(update={"evaluation": evaluation}), self.device)

    @property
    def device_kind(self) -> distributed.Device:
        """The device without its number."""
        return "cuda" if self.device.type == "cuda" else "cpu"

    @property
    def within_documents(self) -> bool:
        """Whether attention stays within documents."""
        return self.job.windows.attention == "document"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def models(self) -> Iterator[tuple[str, ModelSpec, TrainingSpec | None]]:
        """Stage, model and training; none: it is loaded. A control with the student's training
        is not named."""
        for spec in self.job.teachers:
            yield f"teachers/{spec.name}", spec.model, spec.training
        yield "student", self.job.student.model, self.job.student.training
        if self.job.control is not None and self.job.control.training is not None:
            yield "control", self.job.student.model, self.job.control.training

    def attention(self, stage: str, model: ModelSpec, *, training: bool) -> str:
        """The attention kernel of a model here.

        Raises:
            MachineError: one asked for by name is not usable.
            ModelError: a model to be loaded is of a family without it, or cannot be read.
        """
        key = self.job.model_key(stage)
        return resolve_attention(
            model.attention,
            device=self.device_kind,
            precision=self.precision,
            training=training,
            where=f"{key}.attention",
            # Only cards have kernels without dropout: elsewhere no configuration need be read.
            dropout=attention_dropout(model, where=key)
            if training and self.device_kind == "cuda"
            else 0.0,
            missing=absent_kernels(model, where=key),
        )

    def shapes_vary(self) -> bool:
        """Whether a model gets inputs of another shape in every micro-batch.

        Raises:
            MachineError: as `attention`.
        """
        return self.within_documents and any(
            varies_in_shape(self.attention(where, model, training=training is not None))
            for where, model, training in self.models()
        )

    def deepspeed_config(self, stage: str, training: TrainingSpec) -> dict[str, Any]:
        """The dict that DeepSpeed gets. Raises `JobError`."""
        return deepspeed.deepspeed_config(
            self.job,
            training,
            device=self.device_kind,
            ranks=ranks.world_size(),
            where=self.job.training_key(stage),
        )

    def micro_batch(self, stage: str, training: TrainingSpec) -> int:
        """Windows in one forward pass of one rank; of `auto` the most that can come out."""
        return deepspeed.micro_batch(
            training, ranks.world_size(), where=self.job.training_key(stage)
        )

    def group(self, teacher: TeacherSpec) -> RankGroup | None:
        """The ranks that a frozen teacher is split over; none: each has it whole. A collective."""
        if teacher.tensor_parallel == 1:
            return None
        return rank_group(teacher.tensor_parallel, self.device)

    def has_label(self, stage: str, training: TrainingSpec, corpus: Corpus) -> LabelMask | None:
        """Which positions of a stage's windows have a label; none: all but each window's last.

        Raises:
            JobError: a token to be left unlabelled that the vocabulary does not have.
        """
        where = f"{self.job.training_key(stage)}.unlabelled_tokens"
        return label_mask(ids_of_tokens(corpus.tokenizer, training.unlabelled_tokens, where=where))

    def windows(self, corpus: Corpus, *, seed: int) -> TrainWindows:
        """The windows of the training text."""
        spec = self.job.windows
        return TrainWindows(
            corpus.shards,
            length=spec.length,
            offsets=spec.offsets,
            seed=seed,
            within_documents=self.within_documents,
            order=spec.order,
        )

    def milestones(self, stage: str, training: TrainingSpec, corpus: Corpus) -> list[Milestone]:
        """What is to be kept of a stage's training on its way.

        Raises:
            JobError: words that the training does not show.
        """
        asked = self.job.milestones_of(stage)
        if asked is None:
            return []
        shards = corpus.shards
        return milestones_of(
            asked,
            training,
            text=TextSize(words=shards.num_words("train"), tokens=shards.num_tokens("train")),
            num_windows=self.windows(corpus, seed=0).num_windows,
            length=self.job.windows.length,
            where=f"{stage}.milestones",
        )

    def dev_windows(self, corpus: Corpus, limit: int | None) -> DevWindows:
        """So many windows of the development text, evenly spaced; none: all."""
        text = DevText(
            corpus.shards,
            length=self.job.windows.length,
            limit=limit,
            within_documents=self.within_documents,
        )
        return DevWindows.of(
            text,
            batch_tokens=self.job.evaluation.batch_tokens,
            byte_lengths=corpus.byte_lengths,
        )

    def benchmarks(self, corpus: Corpus) -> dict[str, list[Task]]:
        """The minimal pairs by benchmark, read and checked."""
        folders = {pairs.name: Path(pairs.path) for pairs in self.job.evaluation.minimal_pairs}
        if corpus.entries.pairs_dir is not None:
            folders["nursery"] = corpus.entries.pairs_dir
        limit = self.job.evaluation.max_pairs_per_task
        return {name: load_tasks(path, max_pairs=limit) for name, path in folders.items()}

    def suites(self, *, teacher: bool) -> dict[str, tuple[FineTuning, list[LabelledTask]]]:
        """What a model is fine-tuned on, by the suite's name, read and checked."""
        return {
            suite.name: (suite, load_suite(suite))
            for suite in self.job.evaluation.suites_of(teacher=teacher)
        }
