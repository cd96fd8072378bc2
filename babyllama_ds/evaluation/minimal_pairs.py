"""Minimal pairs: which of two sentences does a model find likelier?

Tasks (`pair_files`) and a model enter; accuracy per task, per linguistic term and overall leave.
`sentences` encodes and scores: a sentence's score is the sum of log P(token | tokens before it), in
nats. By default no prefix token stands before a sentence, because none was in the training stream,
so its first token is context and is not scored. A tie is wrong: a model that gives every sentence
the same score earns nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from babyllama_ds.evaluation.forward import OnBatch, Share
from babyllama_ds.evaluation.pair_files import BAD, GOOD, Task
from babyllama_ds.evaluation.sentences import prefix_ids, score_sentences, sentence_encoder
from babyllama_ds.spec.evaluation import Prefix

RIGHT, WRONG, TIE = "1", "0", "="
"""A pair's outcome. A tie, which is wrong, has equal scores or a sentence with nothing to score."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """On which pairs a model prefers the acceptable sentence."""

    name: str
    outcomes: str
    """A character for each pair that was measured, in the order of the file."""
    term: str | None = None

    @property
    def pairs(self) -> int:
        """At least one."""
        return len(self.outcomes)

    @property
    def correct(self) -> int:
        """Pairs whose acceptable sentence scores strictly higher."""
        return self.outcomes.count(RIGHT)

    @property
    def ties(self) -> int:
        """Pairs of which neither sentence does."""
        return self.outcomes.count(TIE)

    @property
    def accuracy(self) -> float:
        """Share of pairs, in [0, 1]."""
        return self.correct / self.pairs


@dataclass(frozen=True, kw_only=True)
class TermScore:
    """The tasks about one linguistic term together."""

    tasks: tuple[TaskScore, ...]
    """At least one."""

    @property
    def accuracy(self) -> float:
        """Unweighted mean over its tasks, in [0, 1]."""
        return _mean_accuracy(self.tasks)

    @property
    def pairs(self) -> int:
        """Pairs of all its tasks."""
        return sum(task.pairs for task in self.tasks)


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """A benchmark's scores, and how its sentences were presented to the model."""

    tasks: tuple[TaskScore, ...]
    leading_space: bool
    """Whether each sentence began with a space, as inside running text."""
    prefix: str | None = None
    """The token put before each sentence; none: the sentence's own first token is not scored."""

    @property
    def accuracy(self) -> float:
        """Unweighted mean over tasks, in [0, 1]: BLiMP's overall score."""
        return _mean_accuracy(self.tasks)

    @property
    def pooled_accuracy(self) -> float:
        """Share of all pairs, in [0, 1]: large tasks weigh more."""
        return sum(task.correct for task in self.tasks) / sum(task.pairs for task in self.tasks)

    @property
    def terms(self) -> dict[str, TermScore]:
        """By linguistic term, in alphabetical order; a task that names none is in none."""
        named = sorted({task.term for task in self.tasks if task.term is not None})
        return {
            term: TermScore(tasks=tuple(task for task in self.tasks if task.term == term))
            for term in named
        }


def evaluate_minimal_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    *,
    leading_space: bool,
    device: torch.device | str,
    batch_tokens: int,
    vocab_size: int,
    prefix: Prefix = "none",
    share: Share | None = None,
    on_batch: OnBatch | None = None,
) -> PairScores:
    """The model's accuracy on every task; called by every rank, the same on every rank.

    `batch_tokens` is the number of tokens, padding included, in one forward pass.

    Raises:
        DataError: a sentence is longer than the model's positions, or the tokenizer has not the
            prefix token.
        ModelError: a score is not finite.
    """
    ids, sources = encode_pairs(tokenizer, tasks, leading_space=leading_space, prefix=prefix)
    scores = score_sentences(
        model,
        ids,
        device=device,
        batch_tokens=batch_tokens,
        vocab_size=vocab_size,
        sources=sources,
        share=share,
        on_batch=on_batch,
    )
    comparable = [len(good) > 1 and len(bad) > 1 for good, bad in _by_two(ids)]
    # A sentence without a scored token has no score to compare: its pair is a tie.
    margins = [
        good - bad if both else 0.0
        for (good, bad), both in zip(_by_two(scores), comparable, strict=True)
    ]
    remaining = iter(margins)
    return PairScores(
        tasks=tuple(_task_score(task, list(islice(remaining, len(task.pairs)))) for task in tasks),
        leading_space=leading_space,
        prefix=tokenizer.bos_token if prefix_ids(tokenizer, prefix) else None,
    )


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    *,
    leading_space: bool,
    prefix: Prefix = "none",
) -> tuple[list[list[int]], list[str]]:
    """The token ids of every sentence, the good and the bad one of a pair after each other, and
    the file:line that each is from.

    Raises:
        DataError: the tokenizer has not the prefix token.
    """
    encode = sentence_encoder(tokenizer, leading_space=leading_space, prefix=prefix)
    pairs = [(task, pair) for task in tasks for pair in task.pairs]
    return (
        encode([sentence for _, pair in pairs for sentence in (pair.good, pair.bad)]),
        [f"{task.path}:{pair.line}" for task, pair in pairs for _ in (GOOD, BAD)],
    )


def _task_score(task: Task, margins: Sequence[float]) -> TaskScore:
    outcomes = (RIGHT if margin > 0 else TIE if margin == 0 else WRONG for margin in margins)
    return TaskScore(name=task.name, outcomes="".join(outcomes), term=task.term)


def _mean_accuracy(tasks: Sequence[TaskScore]) -> float:
    return sum(task.accuracy for task in tasks) / len(tasks)


def _by_two(values: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(values[::2], values[1::2], strict=True)
