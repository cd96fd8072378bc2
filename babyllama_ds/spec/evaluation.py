"""What the finished models of a job are measured on."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from babyllama_ds.spec.base import FolderPath, Mismatch, Name, Spec, consistent, repeated_names

Prefix = Literal["none", "bos"]

MEASURED_WITH = {"mnli-mm": "mnli"}
"""Tasks that have no training text of their own, and the task whose classifier they are given."""

LEAST_TOKENS = 3
"""Of an example: what stands before two texts, and behind each."""


class MinimalPairs(Spec):
    """A directory of items of two or more sentences, of which one is right: files in the formats of
    BLiMP, EWoK, entity tracking or COMPS, as BabyLM has them (docs/evaluation.md)."""

    name: Name
    """The benchmark's name in the report."""
    path: FolderPath
    """Directory of `*.jsonl`."""


class TaskSettings(NamedTuple):
    """How a task's classifiers are trained."""

    learning_rate: float
    batch_size: int
    epochs: int


class FineTunedTask(Spec):
    """A task of a suite, and what is otherwise for it than for the suite's others."""

    name: Name
    """`NAME.train.jsonl` and `NAME.valid.jsonl` in the suite's directory."""
    learning_rate: PositiveFloat | None = None
    """None: the suite's."""
    batch_size: PositiveInt | None = None
    """None: the suite's."""
    epochs: PositiveInt | None = None
    """None: the suite's."""


class FineTuning(Spec):
    """A directory of labelled tasks, as BabyLM has (Super)GLUE: a copy of each finished model is
    trained on each of them, with a linear classifier on its last token's state
    (docs/fine-tuning.md). The defaults are those of the challenge's pipeline."""

    name: Name
    """The suite's name in the report."""
    path: FolderPath
    """Directory of `TASK.train.jsonl` and `TASK.valid.jsonl`."""
    tasks: Annotated[tuple[FineTunedTask, ...], Field(min_length=1)] | None = None
    """The tasks; none: every one of which both files are there."""
    teachers: bool = True
    """Whether teachers are measured too, which costs in proportion to their size."""
    seeds: PositiveInt = 1
    """Times that each task is trained, with another classifier and order of examples each time;
    scores are means over them."""
    learning_rate: PositiveFloat = 5e-5
    """The first step's learning rate (AdamW); it falls to zero linearly over `epochs`."""
    batch_size: PositiveInt = 64
    """Examples in one optimizer step."""
    epochs: PositiveInt = 10
    """Passes over a task's training examples, at most; the best epoch's score counts."""
    patience: PositiveInt | None = 3
    """Epochs in a row without a better score, after which a task's training ends; none: never."""
    max_tokens: Annotated[int, Field(ge=LEAST_TOKENS)] = 128
    """Tokens of an example; what is longer is cut, of two texts the longer one."""
    max_train_examples: PositiveInt | None = None
    """Only the first training examples of each task, for a quick look; none: all."""
    max_examples: PositiveInt | None = None
    """Only the first validation examples of each task, for a quick look; none: all."""

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(
        cls, tasks: tuple[FineTunedTask, ...] | None
    ) -> tuple[FineTunedTask, ...] | None:
        return consistent(tasks, repeated_names([task.name for task in tasks or ()]))

    @field_validator("tasks")
    @classmethod
    def _settings_are_of_trainings(
        cls, tasks: tuple[FineTunedTask, ...] | None
    ) -> tuple[FineTunedTask, ...] | None:
        vain = [
            Mismatch((i, key), value, "nothing", f"give it to {trained}, whose classifier it has")
            for i, task in enumerate(tasks or ())
            if (trained := MEASURED_WITH.get(task.name)) is not None
            for key, value in task.model_dump(exclude={"name"}, exclude_none=True).items()
        ]
        return consistent(tasks, vain)

    def settings_of(self, name: str) -> TaskSettings:
        """A task's own settings, or else the suite's."""
        own = next((task for task in self.tasks or () if task.name == name), None)
        own = own or FineTunedTask(name=name)
        return TaskSettings(
            own.learning_rate or self.learning_rate,
            own.batch_size or self.batch_size,
            own.epochs or self.epochs,
        )


class MilestoneEvaluation(Spec):
    """How milestones are measured: on development text and minimal pairs, as finished models are
    but for what is said here."""

    max_pairs_per_task: PositiveInt | None = None
    """Only the first pairs of each task; none: as many as of finished models."""
    dev_windows: PositiveInt | None = None
    """Development windows, evenly spaced; none: as many as of finished models."""


class EvaluationSpec(Spec):
    """What finished models are measured on. Changing it retrains nothing."""

    minimal_pairs: tuple[MinimalPairs, ...] = ()
    """Benchmarks; the nursery corpus adds its own."""
    max_pairs_per_task: PositiveInt | None = None
    """Only the first pairs of each task, for a quick look; none: all."""
    fine_tuning: tuple[FineTuning, ...] = ()
    """Suites of tasks that copies of the models are fine-tuned on. Far longer than the rest."""
    dev_windows: PositiveInt | None = None
    """Development windows, evenly spaced, that finished models are measured on; none: all."""
    milestones: MilestoneEvaluation | None = None
    """Measures what `student.milestones` and `control.milestones` keep, too: how models learned
    (docs/milestones.md). `{}`: as finished models are; none: they are not measured."""
    leading_space: bool = True
    """Whether sentences are tokenized with a leading space, as inside running text."""
    prefix: Prefix = "none"
    """What stands before each sentence: `none`, as in the training stream (a sentence's first
    token is then not scored), or `bos`, the token that begins a text, as in lm-eval."""
    samples: NonNegativeInt = 0
    """Texts that each finished model writes, to be read: a few tokens of as many development
    windows are given, the model goes on. They stand in the report and in TensorBoard."""
    batch_tokens: PositiveInt = 8_192
    """Tokens, padding included, in one forward pass of one rank."""

    @field_validator("minimal_pairs", "fine_tuning")
    @classmethod
    def _names_differ(
        cls, sets: tuple[MinimalPairs | FineTuning, ...]
    ) -> tuple[MinimalPairs | FineTuning, ...]:
        return consistent(sets, repeated_names([one.name for one in sets]))

    def of_milestones(self) -> EvaluationSpec | None:
        """What milestones are measured on; none: they are not."""
        if self.milestones is None:
            return None
        own = self.milestones.model_dump(exclude_none=True)
        nothing_more = {"fine_tuning": (), "samples": 0, "milestones": None}
        return self.model_copy(update={**own, **nothing_more})

    def suites_of(self, *, teacher: bool) -> tuple[FineTuning, ...]:
        """The suites that a model is fine-tuned on."""
        return tuple(suite for suite in self.fine_tuning if suite.teachers or not teacher)
