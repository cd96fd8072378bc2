"""What the finished models of a job are measured on."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator

from babyllama_ds.spec.base import Name, Spec, consistent, repeated_names

Prefix = Literal["none", "bos"]


class MinimalPairs(Spec):
    """A directory of BLiMP-format files: one task a file, `sentence_good`, `sentence_bad`."""

    name: Name
    """The benchmark's name in the report."""
    path: str
    """Directory of `*.jsonl`."""


class EvaluationSpec(Spec):
    """What finished models are measured on. Changing it retrains nothing."""

    minimal_pairs: tuple[MinimalPairs, ...] = ()
    """Benchmarks; the nursery corpus adds its own."""
    max_pairs_per_task: PositiveInt | None = None
    """Only the first pairs of each task, for a quick look; none: all."""
    dev_windows: PositiveInt | None = None
    """Development windows, evenly spaced, that finished models are measured on; none: all."""
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

    @field_validator("minimal_pairs")
    @classmethod
    def _names_differ(cls, sets: tuple[MinimalPairs, ...]) -> tuple[MinimalPairs, ...]:
        return consistent(sets, repeated_names([one.name for one in sets]))
