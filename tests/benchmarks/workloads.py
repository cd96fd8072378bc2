"""The published workloads: a shipped job's name enters; models, batches and sides of it leave.

Sizes, batches, losses and temperatures are those of `launcher/jobs`: there is no second copy of
them here. What the jobs do not say is how the published code cut its batches up
(`PUBLISHED_MICRO`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from scenario import NUM_BATCHES

from babyllama_ds.models.sizes import model_sizes
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.job import JobSpec, TeacherSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.training.meter import Work, work_of

STUDENT = "student"
PUBLISHED_MICRO = {
    "babyllama": {STUDENT: 32, "gpt2": 8, "llama": 16},
    "babyllama2": {STUDENT: 32, "first": 32},
}
"""`per_device_train_batch_size` of the published code: accumulation is what is left of the batch.
Of BabyLlama's teachers by its configuration files; of its control, which is in no script, as of
the student."""
TINY_VOCAB, TINY_LENGTH, TINY_HEAD = 384, 32, 4
TINY_PART = 8
"""What batches and micro-batches of a rehearsal are divided by."""


@dataclass(frozen=True)
class Workload:
    """What is trained in a step: a job's student with its teachers, or one of its models alone."""

    job_name: str
    trains: str = STUDENT
    """`student`, or a teacher's name."""
    distilled: bool = True
    """With the teachers of the job; else by plain cross-entropy."""
    windows_asked: int | None = None
    """Windows in a batch; none: as the job has it."""
    tiny: bool = False
    """For a rehearsal: the same kinds of models, narrow and of two layers."""

    @property
    def name(self) -> str:
        """`babyllama`, `babyllama/gpt2`, `babyllama/control`, with `@N` for another batch."""
        alone = "control" if self.trains == STUDENT else self.trains
        name = self.job_name if self.distilled else f"{self.job_name}/{alone}"
        return name if self.windows_asked is None else f"{name}@{self.windows_asked}"

    @cached_property
    def job(self) -> JobSpec:
        """The shipped job; for a rehearsal, in small."""
        spec = load_job(find_job(self.job_name), environ={"BABYLM_DATA": "."})
        if not self.tiny:
            return spec
        plain = spec.model_dump(mode="json", exclude_none=True)
        plain["tokenizer"]["vocab_size"] = TINY_VOCAB
        plain["windows"]["length"] = TINY_LENGTH
        for part in (plain["student"], *plain["teachers"]):
            part["model"] |= _narrow(part["model"])
            part["training"]["batch_windows"] //= TINY_PART
            part["training"].pop("micro_batch", None)
        return JobSpec.model_validate_json(json.dumps(plain))

    @property
    def teachers(self) -> tuple[TeacherSpec, ...]:
        """Those of a distillation; none where a model is trained alone."""
        return self.job.teachers if self.distilled else ()

    @property
    def distillation(self) -> DistillationSpec | None:
        """The loss of a distillation; none: cross-entropy."""
        return self.job.distillation if self.distilled else None

    @property
    def model(self) -> ModelSpec:
        """What is trained."""
        model: ModelSpec = self._part.model
        return model

    @property
    def training(self) -> TrainingSpec:
        """Its training in the job, for longer than anybody measures."""
        endless = {"epochs": 1e6, "batch_windows": self.batch_windows, "micro_batch": None}
        training: TrainingSpec = self._part.training
        return training.model_copy(update=endless)

    @property
    def _part(self) -> Any:
        if self.trains == STUDENT:
            return self.job.student
        (teacher,) = (each for each in self.job.teachers if each.name == self.trains)
        return teacher

    # -- sizes, named as those of `scenario.Sizes` -------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        tokenizer = self.job.tokenizer
        assert tokenizer.kind == "bpe", "the shipped jobs train theirs"
        return tokenizer.vocab_size

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self.job.windows.length

    @property
    def batch_windows(self) -> int:
        """Windows in an optimizer step."""
        return self.windows_asked or int(self._part.training.batch_windows)

    @property
    def tokens(self) -> int:
        """Tokens in an optimizer step."""
        return self.batch_windows * self.length

    @property
    def published_micro(self) -> int:
        """Windows of a forward pass in the published code; of a larger batch the same."""
        micro = PUBLISHED_MICRO[self.job_name][self.trains]
        return min(self.batch_windows, max(1, micro // TINY_PART) if self.tiny else micro)

    def work(self, *, cached: bool, micro: int | None = None) -> Work:
        """FLOPs of a token and products of a forward and backward pass."""
        return work_of(
            self.model,
            [teacher.model for teacher in self.teachers],
            length=self.length,
            micro_batch=micro or self.batch_windows,
            vocab_size=self.vocab_size,
            cache="hidden" if cached else "none",
            where=self.name,
        )

    @cached_property
    def _flops_per_token(self) -> dict[bool, float]:
        """With a cache or without; to look at the models' shapes takes as long as a turn."""
        return {cached: self.work(cached=cached).flops_per_token for cached in (False, True)}

    def flops_per_step(self, *, cached: bool) -> float:
        """Of the matrix products that the work takes, however it is done."""
        return self._flops_per_token[cached] * self.tokens

    def params(self) -> dict[str, int]:
        """Parameters of every model in it."""
        models = {self.trains: self.model, **{each.name: each.model for each in self.teachers}}
        return {
            name: model_sizes(model, self.vocab_size, where=name).params
            for name, model in models.items()
        }

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            **asdict(self),
            "params": self.params(),
            "vocab_size": self.vocab_size,
            "length": self.length,
            "batch_windows": self.batch_windows,
            "published_micro_batch": self.published_micro,
            "batches": NUM_BATCHES,
        }


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the work of a workload."""

    kind: str
    """`ours` or `textbook`."""
    work: Workload
    device: str
    threads: int
    """On a CPU."""
    cache: bool = False
    """With the teachers' hidden states in the device's memory (ours)."""
    compiled: bool = False
    """Under torch.compile: ours as long jobs have it (`auto`), the textbook's by its flag."""
    precision: str = "bf16"
    """Of the textbook: `fp32` or `autocast`, as textbook.py says."""
    tf32: bool = False
    """fp32 products of the textbook in TF32."""
    at_its_best: bool = True
    """Spared what the trainer does by default and a user may switch off: it looks at the loss
    after every pass, for which it waits for the device."""


def _narrow(model: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model with as many heads, in two layers."""
    width = TINY_HEAD * model["num_heads"]
    return {"hidden_size": width, "intermediate_size": 2 * width, "num_layers": 2}
