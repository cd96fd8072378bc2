"""The job: one frozen tree of validated values that describes an experiment.

Enters: plain data (from `spec.loading`). Leaves: a `JobSpec`, every default spelled out.
Every field carries its unit in its name or its docstring. Nothing here touches the disk, the
network or a device: a job is checked on any machine, with or without its data.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from babyllama_ds.spec.base import Mismatch, Name, Seed, Spec, consistent, repeated_names
from babyllama_ds.spec.corpus import CorpusSpec, NurseryCorpus, TokenizerSpec, WindowsSpec
from babyllama_ds.spec.distillation import (
    DistillationSpec,
    HiddenMatching,
    no_use_of_a_cache,
    unknown_layers,
)
from babyllama_ds.spec.evaluation import EvaluationSpec
from babyllama_ds.spec.explain import did_you_mean
from babyllama_ds.spec.models import ModelSpec, PretrainedModel
from babyllama_ds.spec.training import Milestones, TrainingSpec


class TeacherSpec(Spec):
    """A teacher: trained by this job (`training` given) or loaded (`model.kind: pretrained`)."""

    name: Name
    """Its folder, and its name in metrics and report."""
    model: ModelSpec
    """What it is."""
    training: TrainingSpec | None = None
    """How it is trained; none: it is used as loaded."""
    weight: PositiveFloat = 1.0
    """Its share of the ensemble, relative to the other teachers' weights."""
    seed: Seed | None = None
    """Seed of its initialisation and data order; none: derived from the job's seed and its name."""
    tensor_parallel: PositiveInt = 1
    """Ranks over which each copy of the frozen teacher is split, for one that no card holds: they
    gather their windows, run it together, and keep each its own share. A divisor of the ranks, and
    of the model's heads, key-value heads and inner columns. Results change by rounding alone; it
    is trained, where it is, without."""

    @model_validator(mode="after")
    def _usable(self) -> TeacherSpec:
        found = []
        if self.training is None and self.model.kind != "pretrained":
            hint = f"a {self.model.kind} starts from random weights; give `training`, or load one"
            found.append(Mismatch(("training",), "nothing", "how it is trained", hint))
        if self.training is None and isinstance(self.model, PretrainedModel):
            found += [
                Mismatch(
                    ("model", key),
                    getattr(self.model, key),
                    "none for a teacher that is not trained",
                    hint="dropout has an effect in training alone",
                )
                for key in ("dropout", "attention_dropout")
                if getattr(self.model, key) is not None
            ]
        return consistent(self, found + self._undivided())

    def _undivided(self) -> list[Mismatch]:
        """What the job alone tells of a split that cannot be; of loaded models their files tell."""
        parts, model = self.tensor_parallel, self.model
        if parts == 1 or model.kind == "pretrained":
            return []
        if model.kind == "gpt2":
            hint = "DeepSpeed's AutoTP, which splits teachers, does not know this family"
            return [Mismatch(("tensor_parallel",), f"{parts} for a gpt2", "1", hint)]
        divided = {
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads or model.num_heads,
            "intermediate_size": model.intermediate_size,
        }
        return [
            Mismatch(
                ("tensor_parallel",),
                f"{parts} for a model whose {key} is {number}",
                f"a divisor of {number}: each rank has as many",
            )
            for key, number in divided.items()
            if number % parts
        ][:1]


class StudentSpec(Spec):
    """The model that is distilled."""

    model: ModelSpec
    """What it is; `pretrained` warm-starts it."""
    training: TrainingSpec
    """How it is trained."""
    milestones: Milestones | None = None
    """Words seen, after each of which the model is kept as it then is (`milestones/student/`):
    a list, or `babylm`, those that the challenge asks for; none: only the finished one. See
    docs/milestones.md."""
    seed: Seed | None = None
    """Seed of its initialisation and data order; none: derived from the job's seed."""


class ControlSpec(Spec):
    """The same student, same initialisation and data order, trained without teachers."""

    training: TrainingSpec | None = None
    """Its own training; none: the student's."""
    milestones: Milestones | None = None
    """As of the student, whose are not taken over."""


class DeepSpeedSpec(Spec):
    """What DeepSpeed runs on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one. A device asked for by name must be there."""
    config: Annotated[str, Field(min_length=1)] = "auto"
    """A shipped configuration (`zero2_cuda`, `zero2_cpu`), a path to a JSON file, or `auto`:
    the shipped one for the device."""
    compile: Literal["auto", "none", "student", "all"] = "auto"
    """What torch.compile makes faster: the models that are trained (`student`), the frozen
    teachers beside them too (`all`), or nothing; `auto`: see docs/decisions/compiling.md."""
    join_timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 10.0
    """How long ranks wait at the start until all of them have come."""
    node_timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 5.0
    """How long another node's host may be silent (switched off, cut off) before all ranks end;
    nodes that compute for long are not silent."""
    storage: Literal["shared", "node"] = "shared"
    """Where the runs folder is on several nodes: one that all of them see (`shared`), or one on
    each node's own disk (`node`); see docs/storage.md."""


class JobSpec(Spec):
    """An experiment, from raw text to an evaluated student."""

    name: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]|\{seed\}){0,63}$"),
    ]
    """Name of the run's folder; may hold `{seed}`."""
    seed: Seed = 1
    """Every stage derives its own seed from this one and its name."""
    corpus: CorpusSpec
    """Where text comes from."""
    tokenizer: TokenizerSpec
    """How text becomes token ids."""
    windows: WindowsSpec = WindowsSpec()
    """How tokens become training examples."""
    teachers: Annotated[tuple[TeacherSpec, ...], Field(min_length=1)]
    """The ensemble."""
    student: StudentSpec
    """The model that is distilled."""
    control: ControlSpec | None = None
    """The undistilled twin of the student; none: not trained."""
    distillation: DistillationSpec = DistillationSpec()
    """The loss."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """The engine."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """The measurements."""

    # Per field, not on the whole: each is then checked even where another part is wrong.

    @field_validator("tokenizer")
    @classmethod
    def _document_tokens_have_a_place(
        cls, tokenizer: TokenizerSpec, info: ValidationInfo
    ) -> TokenizerSpec:
        asked = tokenizer.document_tokens
        return consistent(tokenizer, _needs_documents("document_tokens", asked, "none", info))

    @field_validator("windows")
    @classmethod
    def _documents_are_known(cls, windows: WindowsSpec, info: ValidationInfo) -> WindowsSpec:
        return consistent(windows, _needs_documents("attention", windows.attention, "window", info))

    @field_validator("teachers")
    @classmethod
    def _teachers_fit(
        cls, teachers: tuple[TeacherSpec, ...], info: ValidationInfo
    ) -> tuple[TeacherSpec, ...]:
        found = repeated_names([teacher.name for teacher in teachers])
        found += [
            Mismatch((i, "name"), repr(teacher.name), "another name", hint="it is taken")
            for i, teacher in enumerate(teachers)
            if teacher.name in RESERVED_NAMES
        ]
        for i, teacher in enumerate(teachers):
            found += _too_few_positions((i, "model"), teacher.model, info.data.get("windows"))
        return consistent(teachers, found)

    @field_validator("student")
    @classmethod
    def _student_fits(cls, student: StudentSpec, info: ValidationInfo) -> StudentSpec:
        found = _too_few_positions(("model",), student.model, info.data.get("windows"))
        return consistent(student, found)

    @field_validator("distillation")
    @classmethod
    def _windows_repeat(
        cls, distillation: DistillationSpec, info: ValidationInfo
    ) -> DistillationSpec:
        windows, student = info.data.get("windows"), info.data.get("student")
        if distillation.cache == "none" or windows is None or student is None:
            return distillation
        return consistent(
            distillation, no_use_of_a_cache(distillation.cache, windows, student.training.epochs)
        )

    @field_validator("distillation")
    @classmethod
    def _matched_layers_exist(
        cls, distillation: DistillationSpec, info: ValidationInfo
    ) -> DistillationSpec:
        teachers, student = info.data.get("teachers"), info.data.get("student")
        if distillation.hidden_matching is None or teachers is None or student is None:
            return distillation
        found = _wrong_pairs(distillation.hidden_matching, teachers, student.model)
        return consistent(distillation, found)

    @field_validator("student")
    @classmethod
    def _no_trial_of_split_teachers(cls, student: StudentSpec, info: ValidationInfo) -> StudentSpec:
        split = _split_teacher(info)
        if split is None or student.training.micro_batch != "auto":
            return student
        expected = f"a number, since {split} is split over ranks"
        hint = (
            "a trial that finds no memory on one rank would leave the others of its group waiting"
        )
        return consistent(student, [Mismatch(("training", "micro_batch"), "auto", expected, hint)])

    @field_validator("deepspeed")
    @classmethod
    def _no_compiled_split_teachers(
        cls, deepspeed: DeepSpeedSpec, info: ValidationInfo
    ) -> DeepSpeedSpec:
        split = _split_teacher(info)
        if split is None or deepspeed.compile != "all":
            return deepspeed
        expected = f"student, none or auto, since {split} is split over ranks"
        hint = "its layers wait for other ranks, which torch.compile does not follow"
        return consistent(deepspeed, [Mismatch(("compile",), "all", expected, hint)])

    @field_validator("evaluation")
    @classmethod
    def _benchmarks_are_told_apart(
        cls, evaluation: EvaluationSpec, info: ValidationInfo
    ) -> EvaluationSpec:
        corpus: CorpusSpec | None = info.data.get("corpus")
        if not isinstance(corpus, NurseryCorpus):
            return evaluation
        hint = "it is taken by the pairs that the nursery corpus adds"
        taken = [
            Mismatch(("minimal_pairs", i, "name"), repr(one.name), "another name", hint)
            for i, one in enumerate(evaluation.minimal_pairs)
            if one.name == corpus.kind
        ]
        return consistent(evaluation, taken)

    @field_validator("evaluation")
    @classmethod
    def _no_fine_tuned_split_teachers(
        cls, evaluation: EvaluationSpec, info: ValidationInfo
    ) -> EvaluationSpec:
        split = _split_teacher(info)
        if split is None:
            return evaluation
        expected = f"false, since {split} is split over ranks"
        hint = "a copy that is fine-tuned has to fit one rank"
        taught = [
            Mismatch(("fine_tuning", i, "teachers"), "true", expected, hint)
            for i, suite in enumerate(evaluation.fine_tuning)
            if suite.teachers
        ]
        return consistent(evaluation, taught)

    @field_validator("evaluation")
    @classmethod
    def _milestones_are_kept(
        cls, evaluation: EvaluationSpec, info: ValidationInfo
    ) -> EvaluationSpec:
        student, control = info.data.get("student"), info.data.get("control")
        kept = student is None or any(one and one.milestones for one in (student, control))
        if evaluation.milestones is None or kept:
            return evaluation
        hint = "say which are kept: student.milestones: babylm, or a list of words"
        found = Mismatch(("milestones",), "milestones to measure", "none: none are kept", hint)
        return consistent(evaluation, [found])

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        taken = [Mismatch((), repr(name), "another name", hint="runs share a folder of that name")]
        return consistent(name, taken if name == "store" else [])

    @property
    def run_name(self) -> str:
        """The run's folder: `name` with `{seed}` filled in."""
        return self.name.replace("{seed}", str(self.seed))

    def stage_seed(self, stage: str) -> int:
        """The seed of a stage: its own if the job names one, else derived."""
        own = {f"teachers/{teacher.name}": teacher.seed for teacher in self.teachers}
        own["student"] = own["control"] = self.student.seed
        if own.get(stage) is not None:
            return int(own[stage])  # type: ignore[arg-type]
        # The control is the student's twin: same initialisation, same data order.
        return derive_seed(self.seed, "student" if stage == "control" else stage)

    def milestones_of(self, stage: str) -> Milestones | None:
        """What is to be kept of a training on its way; none: nothing."""
        own = {"student": self.student, "control": self.control}.get(stage)
        return None if own is None else own.milestones

    def training_key(self, stage: str) -> str:
        """Where the training of a stage stands in the job: the control's may be the student's."""
        if stage == "control" and (self.control is None or self.control.training is None):
            stage = "student"
        return f"{stage.replace('/', '.')}.training"

    def model_key(self, stage: str) -> str:
        """Where the model of a stage stands in the job: the control has the student's."""
        return f"{'student' if stage == 'control' else stage.replace('/', '.')}.model"


RESERVED_NAMES = ("student", "control")
"""Models of every run, beside its teachers."""


def derive_seed(seed: int, stage: str) -> int:
    """A 63-bit seed from the job's seed and a stage's name (SHA-256, the same everywhere)."""
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _needs_documents(key: str, got: str, without: str, info: ValidationInfo) -> list[Mismatch]:
    """What is asked of documents where their boundaries are dropped."""
    corpus: CorpusSpec | None = info.data.get("corpus")
    if got == without or corpus is None or corpus.documents != "none":
        return []
    expected = f"{without}, since corpus.documents is none: boundaries are dropped"
    return [Mismatch((key,), got, expected, "set corpus.documents to what a document is")]


def _wrong_pairs(
    matching: HiddenMatching, teachers: tuple[TeacherSpec, ...], student: ModelSpec
) -> list[Mismatch]:
    """Teachers and layers that there are not, as far as the job alone can tell."""
    depths = {teacher.name: _num_layers(teacher.model) for teacher in teachers}
    unknown = [
        Mismatch(
            ("layers", i, "teacher"),
            repr(pair.teacher),
            "the name of a teacher",
            did_you_mean(pair.teacher, depths),
        )
        for i, pair in enumerate(matching.layers)
        if pair.teacher not in depths
    ]
    found = unknown + unknown_layers(matching, depths, _num_layers(student))
    return [replace(one, key=("hidden_matching", *one.key)) for one in found]


def _split_teacher(info: ValidationInfo) -> str | None:
    """The first teacher that is split over ranks, as people see it; none: none is."""
    teachers: tuple[TeacherSpec, ...] = info.data.get("teachers") or ()
    return next((f"teachers.{one.name}" for one in teachers if one.tensor_parallel > 1), None)


def _num_layers(model: ModelSpec) -> int | None:
    """The depth of a model that the job describes; none: its files know."""
    return None if model.kind == "pretrained" else model.num_layers


def _too_few_positions(
    key: tuple[str | int, ...], model: ModelSpec, windows: WindowsSpec | None
) -> list[Mismatch]:
    if windows is None or model.kind == "pretrained" or model.max_positions >= windows.length:
        return []
    expected = f">= windows.length ({windows.length})"
    return [Mismatch((*key, "max_positions"), model.max_positions, expected)]
