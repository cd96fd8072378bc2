"""What a job was measured to take on a machine: plain numbers, in seconds.

`training.trial` and `pipeline.trial` measure them, `plan.measured` reckons with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepPace:
    """The pace of one training, once it is under way."""

    steps: int
    """Optimizer steps that were timed."""
    step_s: float
    """One of them, on average: logging where it is due, no evaluation, no checkpoint."""
    teachers_s: float
    """The live teachers' part of it, 0 without teachers."""
    engine_s: float
    """From the model to its first steps: the engine, and whatever is compiled."""
    dev_window_s: float
    """A development window of an evaluation during training."""
    best_s: float
    """Keeping an evaluation's weights, as one that is the best so far does."""
    checkpoint_s: float
    """A checkpoint, written whole."""


@dataclass(frozen=True, kw_only=True)
class StagePace:
    """The pace of one stage, from its first line to its model's directory."""

    build_s: float
    """The model, what is settled (`auto`), and for a student its teachers, loaded."""
    training: StepPace | None
    """None: the model is loaded, not trained."""
    export_s: float
    """Writing the finished model."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPace:
    """The pace of measuring one finished model."""

    load_s: float
    """From its directory to the device."""
    dev_window_s: float
    pair_s: float
    """A minimal pair, encoding included."""
    samples_s: float
    """All the texts that the job lets a model write."""


@dataclass(frozen=True, kw_only=True)
class JobPace:
    """The pace of a whole job on one rank of this machine."""

    start_s: float
    """From the process's start to a device, with the checks before training."""
    preparation_s: float
    """Tokenizer and token shards; little where they stood already."""
    prepared_before: bool
    """Whether they did."""
    pairs_s: float
    """Reading all minimal pairs, which is done for each model."""
    num_pairs: int
    num_milestone_pairs: int
    """Those that milestones are measured on: fewer, or more; 0 where they are not measured."""
    stages: Mapping[str, StagePace]
    """`teachers/NAME`, `student`, `control`."""
    evaluations: Mapping[str, EvaluationPace]
    """By the same names."""
