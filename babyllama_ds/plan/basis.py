"""What a plan stands on: the same for all rank counts, each found when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from babyllama_ds.engine.distributed import check_precision
from babyllama_ds.plan.corpus import PlannedCorpus, plan_corpus
from babyllama_ds.plan.machines import HERE, Machine, find_machine
from babyllama_ds.plan.measured import MeasuredTime, measured_time
from babyllama_ds.plan.planned import Question
from babyllama_ds.plan.stages import PlannedStage, PlannedStages, plan_stages
from babyllama_ds.spec.deepspeed import Precision, deepspeed_config, precision
from babyllama_ds.spec.deepspeed_file import read_config
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.training import TrainingSpec


@dataclass(frozen=True)
class Basis:
    """What the plan of `job` that `question` asks for stands on."""

    job: JobSpec
    question: Question

    @cached_property
    def machine(self) -> Machine:
        """The one that is asked about."""
        return find_machine(self.question.gpu, self.job.deepspeed.device)

    @cached_property
    def corpus(self) -> PlannedCorpus:
        """Its tokens."""
        return plan_corpus(self.job, runs=self.question.runs, tokens=self.question.tokens)

    @cached_property
    def work(self) -> PlannedStages:
        """Steps and FLOPs of every stage."""
        return plan_stages(self.job, self.corpus)

    @cached_property
    def measured(self) -> MeasuredTime | None:
        """Time by what was measured; none: it was not."""
        pace = self.question.pace
        return None if pace is None else measured_time(self.job, self.corpus, self.work, pace)

    @cached_property
    def machinery(self) -> dict[str, Any]:
        """DeepSpeed's JSON file."""
        return read_config(self.job.deepspeed, self.machine.device)

    @cached_property
    def precision(self) -> Precision:
        """What parameters are in; checked against this machine where it is the one asked about."""
        found = precision(self.machinery)
        if self.question.gpu == HERE:
            check_precision(self.machine.device, found)
        return found

    def check_configurations(self) -> None:
        """Every training goes with DeepSpeed's configuration, on however many ranks.

        Raises:
            JobError: a file that is not there or not right, or what a training may not ask of it.
        """
        for stage in self.work.stages:
            self.configuration(stage, stage.training, ranks=1)  # every batch can be cut for one

    def configuration(
        self, stage: PlannedStage, training: TrainingSpec, *, ranks: int
    ) -> dict[str, Any]:
        """The dict that DeepSpeed gets of a stage, trained so. Raises `JobError`."""
        return deepspeed_config(
            self.job,
            training,
            device=self.machine.device,
            ranks=ranks,
            base=self.machinery,
            where=stage.key,
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in that precision."""
        return 2 if self.precision == "bf16" else 4

    @property
    def student(self) -> PlannedStage:
        """The student's stage."""
        return next(stage for stage in self.work.stages if stage.name == "student")
