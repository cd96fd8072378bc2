"""What a plan stands on: the same for all rank counts, each found when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from babyllama_ds.engine.distributed import check_precision
from babyllama_ds.plan.corpus import PlannedCorpus, plan_corpus
from babyllama_ds.plan.machines import HERE, Machine, find_machine
from babyllama_ds.plan.measured import MeasuredTime, measured_time
from babyllama_ds.plan.planned import Question
from babyllama_ds.plan.stages import PlannedStage, PlannedStages, plan_stages
from babyllama_ds.spec.deepspeed import Precision, deepspeed_config, precision
from babyllama_ds.spec.job import JobSpec


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
    def precision(self) -> Precision:
        """What parameters are in; checked against this machine where it is the one asked about."""
        student = self.job.student.training
        config = deepspeed_config(self.job, student, device=self.machine.device, ranks=1)
        if self.question.gpu == HERE:
            check_precision(self.machine.device, precision(config))
        return precision(config)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in that precision."""
        return 2 if self.precision == "bf16" else 4

    @property
    def student(self) -> PlannedStage:
        """The student's stage."""
        return next(stage for stage in self.work.stages if stage.name == "student")
