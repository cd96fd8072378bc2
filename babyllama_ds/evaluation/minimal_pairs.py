"""Minimal pairs and their like: which of several sentences does a model find likeliest?

Tasks (`pair_files`) and a model enter; accuracy per task, per linguistic term and overall leave.
`sentences` encodes and scores: a sentence's score is the sum of log P(token | tokens before it), in
nats, over the part that its item says. By default no prefix token stands before a sentence, because
none was in the training stream, so its first token is context and is not scored. A tie is wrong: a
model that gives every sentence the same score earns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from babyllama_ds.evaluation.forward import OnBatch, Share
from babyllama_ds.evaluation.pair_files import Task
from babyllama_ds.evaluation.sentences import Part, part_encoder, prefix_ids, score_sentences
from babyllama_ds.spec.evaluation import Prefix

RIGHT, WRONG, TIE = "1", "0", "="
"""An item's outcome. A tie, which is wrong, is with the best of the others, or there is a candidate
with nothing to score."""

CHANCE_OF_PAIRS = 0.5
"""The share of pairs that guessing gets right."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """On which items, pairs mostly, a model prefers the right sentence."""

    name: str
    outcomes: str
    """A character for each item that was measured, in the order of the file."""
    term: str | None = None
    chance: float = CHANCE_OF_PAIRS
    """The share of items that guessing gets right."""

    @property
    def pairs(self) -> int:
        """At least one."""
        return len(self.outcomes)

    @property
    def correct(self) -> int:
        """Items whose right sentence scores strictly higher than all others."""
        return self.outcomes.count(RIGHT)

    @property
    def ties(self) -> int:
        """Items of which no sentence does."""
        return self.outcomes.count(TIE)

    @property
    def accuracy(self) -> float:
        """Share of items, in [0, 1]."""
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
    parts, sources = encode_items(tokenizer, tasks, leading_space=leading_space, prefix=prefix)
    scores = score_sentences(
        model,
        [part.ids for part in parts],
        firsts=[part.first for part in parts],
        device=device,
        batch_tokens=batch_tokens,
        vocab_size=vocab_size,
        sources=sources,
        share=share,
        on_batch=on_batch,
    )
    # A sentence without a scored token has no score to compare.
    remaining = iter(
        score if part.first < len(part.ids) else None
        for part, score in zip(parts, scores, strict=True)
    )
    return PairScores(
        tasks=tuple(_task_score(task, remaining) for task in tasks),
        leading_space=leading_space,
        prefix=tokenizer.bos_token if prefix_ids(tokenizer, prefix) else None,
    )


def encode_items(
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    *,
    leading_space: bool,
    prefix: Prefix = "none",
) -> tuple[list[Part], list[str]]:
    """The tokens of every candidate, those of an item after each other, and the file:line that each
    is from.

    Raises:
        DataError: the tokenizer has not the prefix token.
    """
    encode = part_encoder(tokenizer, leading_space=leading_space, prefix=prefix)
    items = [item for task in tasks for item in task.items]
    return (
        encode([candidate for item in items for candidate in item.candidates]),
        [item.source for item in items for _ in item.candidates],
    )


def _task_score(task: Task, scores: Iterator[float | None]) -> TaskScore:
    """`scores` are those of its candidates, and more."""
    return TaskScore(
        name=task.name,
        outcomes="".join(_outcome(islice(scores, len(item.candidates))) for item in task.items),
        term=task.term,
        chance=fmean(1 / len(item.candidates) for item in task.items),
    )


def _outcome(scores: Iterable[float | None]) -> str:
    """Of an item's scores, that of the right sentence first; none: it has nothing to score."""
    right, *others = scores
    if right is None or None in others:
        return TIE
    best = max(score for score in others if score is not None)
    return RIGHT if right > best else TIE if right == best else WRONG


def _mean_accuracy(tasks: Sequence[TaskScore]) -> float:
    return sum(task.accuracy for task in tasks) / len(tasks)
