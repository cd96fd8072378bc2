"""Minimal pairs in BLiMP's file format: which of two sentences does a model find likelier?

A directory of `*.jsonl` and a model enter; accuracy per task and overall leave. A sentence's
score is the sum of log P(token | tokens before it), in nats. There is no prefix token, because
none was in the training stream, so the first token is context and is not scored. A tie is wrong:
a model that gives every sentence the same score earns nothing.

Shapes: B sentences, S positions, T = S - 1 next tokens, N scored tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, ModelError
from babyllama_ds.evaluation.forward import Likelihood, OnBatch, likelihood_of

GOOD, BAD = "sentence_good", "sentence_bad"


class Pair(NamedTuple):
    """An acceptable sentence, its unacceptable twin, and the line they came from."""

    good: str
    bad: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One file of pairs about one phenomenon."""

    name: str
    """The file's stem."""
    pairs: tuple[Pair, ...]
    """At least one."""
    path: Path
    """Where it came from, for error messages."""
    term: str | None = None
    """BLiMP's `linguistics_term` (the phenomenon that several tasks share), where given."""
    field: str | None = None
    """BLiMP's `field` (syntax, morphology, …), where given."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """How often a model prefers the acceptable sentence."""

    name: str
    correct: int
    """Pairs whose acceptable sentence scores strictly higher."""
    ties: int
    """Pairs with equal scores, or with a sentence in which nothing could be scored; wrong."""
    pairs: int
    term: str | None = None

    @property
    def accuracy(self) -> float:
        """Share of pairs, in [0, 1]."""
        return self.correct / self.pairs


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """A benchmark's scores, and how its sentences were presented to the model."""

    tasks: tuple[TaskScore, ...]
    leading_space: bool
    """Whether each sentence began with a space, as inside running text."""
    prefix: None = None
    """The token put before each sentence: none."""

    @property
    def accuracy(self) -> float:
        """Unweighted mean over tasks, in [0, 1]: BLiMP's overall score."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    @property
    def pooled_accuracy(self) -> float:
        """Share of all pairs, in [0, 1]: large tasks weigh more."""
        return sum(task.correct for task in self.tasks) / sum(task.pairs for task in self.tasks)


# -- reading ------------------------------------------------------------------------------------


def load_tasks(directory: Path, *, max_pairs: int | None) -> list[Task]:
    """Every `*.jsonl` of a directory, by name; of each the first `max_pairs` pairs.

    Raises:
        DataError: no such directory, no task in it, or (with file:line) a line that is not a
            UTF-8 JSON object with both sentences.
    """
    paths = sorted(directory.glob("*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise DataError.of(
            directory,
            got="no *.jsonl files" if directory.is_dir() else "no such directory",
            expected="a directory of minimal pairs, one *.jsonl file a task",
            hint="see `evaluation.minimal_pairs[].path`",
        )
    return [_load_task(path, max_pairs) for path in paths]


def _load_task(path: Path, max_pairs: int | None) -> Task:
    records = list(islice(_records(path), max_pairs))
    if not records:
        raise DataError.of(path, got="an empty file", expected="at least one pair of sentences")
    first = records[0][1]
    return Task(
        name=path.stem,
        pairs=tuple(Pair(record[GOOD], record[BAD], line) for line, record in records),
        path=path,
        term=first.get("linguistics_term"),
        field=first.get("field"),
    )


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and checked objects of a file; blank lines are skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError.of(
            path, got=error.strerror or str(error), expected="a readable file"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _checked_record(line, f"{path}:{number}")


def _checked_record(line: bytes, source: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError.of(
            "line",
            got=f"byte 0x{line[error.start]:02x} at offset {error.start}, which is not UTF-8",
            expected="UTF-8 text",
            source=source,
        ) from error
    except ValueError as error:
        raise DataError.of("line", got=error, expected="a JSON object", source=source) from error
    if not isinstance(record, dict):
        raise DataError.of(
            "line", got=f"a JSON {type(record).__name__}", expected="a JSON object", source=source
        )
    for key in (GOOD, BAD):
        if not isinstance(record.get(key), str):
            got = f"a {type(record[key]).__name__}" if key in record else "nothing"
            raise DataError.of(key, got=got, expected="a sentence (a JSON string)", source=source)
    return record


# -- measuring ----------------------------------------------------------------------------------


def evaluate_minimal_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    *,
    leading_space: bool,
    device: torch.device | str,
    batch_tokens: int,
    vocab_size: int,
    on_batch: OnBatch | None = None,
) -> PairScores:
    """The model's accuracy on every task; called by every rank, the same on every rank.

    `batch_tokens` is the number of tokens, padding included, in one forward pass.

    Raises:
        DataError: a sentence is longer than the model's positions.
        ModelError: a score is not finite.
    """
    encode = sentence_encoder(tokenizer, leading_space=leading_space)
    pairs = [(task, pair) for task in tasks for pair in task.pairs]
    ids = encode([sentence for _, pair in pairs for sentence in (pair.good, pair.bad)])
    scores = score_sentences(
        model,
        ids,
        device=device,
        batch_tokens=batch_tokens,
        vocab_size=vocab_size,
        sources=[f"{task.path}:{pair.line}" for task, pair in pairs for _ in (GOOD, BAD)],
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
    )


def sentence_encoder(
    tokenizer: PreTrainedTokenizerFast, *, leading_space: bool
) -> Callable[[Sequence[str]], list[list[int]]]:
    """Sentences to token ids, with exactly one leading space or with none, no special tokens.

    Whatever the tokenizer would add before a text by itself is switched off in a copy, so the
    space is there if and only if it is asked for.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        described[part] = _add_no_space(described[part])
    plain = Tokenizer.from_str(json.dumps(described))
    plain.no_padding()
    plain.no_truncation()
    space = " " if leading_space else ""

    def encode(sentences: Sequence[str]) -> list[list[int]]:
        texts = [space + sentence.lstrip() for sentence in sentences]
        return [list(e.ids) for e in plain.encode_batch(texts, add_special_tokens=False)]

    return encode


def score_sentences(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    *,
    device: torch.device | str,
    batch_tokens: int,
    vocab_size: int,
    sources: Sequence[str] | None = None,
    on_batch: OnBatch | None = None,
) -> list[float]:
    """Each sentence's log-probability in nats, given its first token.

    Called by every rank with the same sentences; batches go to ranks in turn, and every rank
    gets all scores. Log-probabilities are fp32 and are summed in float64, where the order of
    summation does not matter: a score depends on its batch only as far as the model's own
    rounding does. Identical sentences are scored once. A sentence of fewer than 2 tokens has
    nothing to score: 0. A sentence longer than `batch_tokens` makes a batch of its own.

    Raises:
        DataError: a sentence is longer than the model's positions (`sources`, its file:line).
        ModelError: a score is not finite.
    """
    _check_positions(model, token_ids, sources)
    unique = list(dict.fromkeys(tuple(ids) for ids in token_ids))
    batches = length_batches([len(ids) for ids in unique], batch_tokens)
    mine = batches[ranks.rank() :: ranks.world_size()]
    local = ranks.on_every_rank(
        lambda: _score_batches(model, unique, mine, device, vocab_size, on_batch)
    )
    scores = dict.fromkeys(unique, 0.0)
    for share in ranks.gather_objects(local):
        scores.update((unique[index], score) for index, score in share.items())
    return [_finite(scores[tuple(ids)]) for ids in token_ids]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sentences with at least 2 tokens, in batches of like lengths.

    The longest come first: if memory does not suffice, the first batch shows it.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] < 2:
            break
        if not room:
            batches.append([])
            room = max(1, batch_tokens // lengths[index])
        batches[-1].append(index)
        room -= 1
    return batches


def _score_batches(
    model: nn.Module,
    sentences: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    device: torch.device | str,
    vocab_size: int,
    on_batch: OnBatch | None,
) -> dict[int, float]:
    """Index of sentence to score, for this rank's batches."""
    scores: list[Tensor] = []
    with likelihood_of(model, vocab_size=vocab_size) as likelihood:
        for done, batch in enumerate(batches, start=1):
            scores.append(_score_batch(likelihood, [sentences[index] for index in batch], device))
            if on_batch is not None:
                on_batch(done, len(batches))
    # One device synchronisation for all batches.
    values = torch.cat(scores).tolist() if scores else []
    indices = [index for batch in batches for index in batch]
    return dict(zip(indices, values, strict=True))


def _score_batch(
    likelihood: Likelihood, sentences: Sequence[Sequence[int]], device: torch.device | str
) -> Tensor:
    """Scores [B] in float64, on the device."""
    lengths_B = torch.tensor([len(ids) for ids in sentences])
    # Padded on the right: attention is causal, so padding cannot reach what is scored. Its id is
    # the sentence's own first, not `<pad>`, at whose sight transformers asks for an attention mask.
    tokens_BS = torch.tensor([ids[:1] for ids in sentences]).repeat(1, int(lengths_B.max()))
    for row, ids in enumerate(sentences):
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
    counted_BT = torch.arange(1, tokens_BS.shape[1]) < lengths_B[:, None]
    row_N = counted_BT.nonzero()[:, 0].to(device)
    nll_N = likelihood(tokens_BS.to(device), counted_BT.to(device))
    score_B = torch.zeros(len(sentences), dtype=torch.float64, device=device)
    return score_B.index_add_(0, row_N, nll_N.double(), alpha=-1)


def _check_positions(
    model: nn.Module, token_ids: Sequence[Sequence[int]], sources: Sequence[str] | None
) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(token_ids)), key=lambda i: len(token_ids[i]), default=None)
    if positions is None or longest is None or len(token_ids[longest]) <= positions:
        return
    raise DataError.of(
        f"sentence {longest + 1}" if sources is None else "sentence",
        got=f"{len(token_ids[longest])} tokens",
        expected=f"at most {positions}, the model's positions",
        hint="shorten or remove the sentence, or evaluate a model with more positions",
        source=None if sources is None else sources[longest],
    )


def _task_score(task: Task, margins: Sequence[float]) -> TaskScore:
    return TaskScore(
        name=task.name,
        correct=sum(margin > 0 for margin in margins),
        ties=sum(margin == 0 for margin in margins),
        pairs=len(margins),
        term=task.term,
    )


def _finite(score: float) -> float:
    if score - score != 0:  # infinite or not a number
        raise ModelError.of(
            "minimal pairs",
            got=f"a sentence's log-probability of {score}",
            expected="a finite number",
            hint="the model's weights or activations are not finite: look at its training losses",
        )
    return score


def _by_two(values: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(values[::2], values[1::2], strict=True)


def _add_no_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer (as JSON) that puts no space before the text by itself."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "Sequence":
        steps = next(key for key in ("normalizers", "pretokenizers") if key in part)
        kept = [step for step in map(_add_no_space, part[steps]) if step is not None]
        return {**part, steps: kept}
    return part
