"""Sentences: their text and a model enter, their token ids and log-probabilities leave.

A sentence's score is the sum of log P(token | tokens before it), in nats, over its tokens, or over
those of its end from a character on. The first token given is context and is not scored: a
sentence's own first, or the prefix token that stands before it.

Shapes: B sentences, S positions, T = S - 1 next tokens, N scored tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, ModelError
from babyllama_ds.evaluation.forward import (
    Likelihood,
    OnBatch,
    Share,
    each_batch,
    likelihood_of,
)
from babyllama_ds.memory import sent
from babyllama_ds.models.families import positions_of
from babyllama_ds.models.probe import embedding_rows
from babyllama_ds.spec.evaluation import Prefix

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Sentences to the ids that are given to the model: the prefix token, if any, first."""


class Part(NamedTuple):
    """A sentence as it is given to the model, and which part of it is scored."""

    ids: list[int]
    first: int
    """The first token that is scored, at least 1; the rest is, too. With none left, nothing is."""


EncodeParts = Callable[[Sequence[tuple[str, int]]], list[Part]]
"""As `Encode`, of sentences of which the part from a character on is scored; 0: all."""


# -- encoding -----------------------------------------------------------------------------------


def sentence_encoder(
    tokenizer: PreTrainedTokenizerFast, *, leading_space: bool, prefix: Prefix = "none"
) -> Encode:
    """Sentences to token ids: with one leading space or none, behind the prefix token or none.

    Whatever the tokenizer would add to a text by itself is switched off in a copy, so the space
    and the prefix token are there if and only if they are asked for. Line breaks within a
    sentence stay.

    Raises:
        DataError: a prefix token that the tokenizer does not have.
    """
    encode = part_encoder(tokenizer, leading_space=leading_space, prefix=prefix)
    return lambda sentences: [part.ids for part in encode([(one, 0) for one in sentences])]


def part_encoder(
    tokenizer: PreTrainedTokenizerFast, *, leading_space: bool, prefix: Prefix = "none"
) -> EncodeParts:
    """As `sentence_encoder`; of each sentence also the first token that reaches into its part.

    A token that holds the part's first character and others before it is scored, as "Ġmat" is for
    "mat"; one that ends where the part begins is not, as a "Ġ" by itself.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for step in ("normalizer", "pre_tokenizer"):
        described[step] = _add_no_space(described[step])
    # It adds special tokens, which are not asked for, and it may cut spaces from tokens' offsets.
    described["post_processor"] = None
    plain = Tokenizer.from_str(json.dumps(described))
    plain.no_padding()
    plain.no_truncation()
    space = " " if leading_space else ""
    before = prefix_ids(tokenizer, prefix)

    def encode(parts: Sequence[tuple[str, int]]) -> list[Part]:
        texts = [space + sentence.lstrip() for sentence, _ in parts]
        encodings = plain.encode_batch(texts, add_special_tokens=False)
        # The part is a sentence's end: what is removed and added before it changes no distance.
        starts = [
            len(text) - len(sentence[start:]) if sentence[:start].strip() else 0
            for text, (sentence, start) in zip(texts, parts, strict=True)
        ]
        return [
            Part([*before, *encoding.ids], max(1, len(before) + _first_token(encoding, start)))
            for encoding, start in zip(encodings, starts, strict=True)
        ]

    return encode


def _first_token(encoding: Encoding, start: int) -> int:
    """The first that ends behind a character; as many as there are: none does.

    All bytes of a character end where it ends, also those that are tokens of their own.
    """
    if start == 0:
        return 0
    ends = (end for _, end in encoding.offsets)
    return next((token for token, end in enumerate(ends) if end > start), len(encoding.ids))


def prefix_ids(
    tokenizer: PreTrainedTokenizerFast, prefix: Prefix, *, where: str = "evaluation.prefix"
) -> list[int]:
    """The id of the prefix token; none: an empty list. `where` is what named it.

    Raises:
        DataError: the tokenizer has no such token.
    """
    if prefix == "none":
        return []
    if tokenizer.bos_token_id is None:
        raise DataError.of(
            where,
            got="bos, and a tokenizer without a token that begins a text",
            expected="none, or a tokenizer with a bos_token",
        )
    return [tokenizer.bos_token_id]


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


# -- scoring ------------------------------------------------------------------------------------


def score_sentences(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    *,
    device: torch.device | str,
    batch_tokens: int,
    vocab_size: int,
    firsts: Sequence[int] | None = None,
    sources: Sequence[str] | None = None,
    share: Share | None = None,
    on_batch: OnBatch | None = None,
) -> list[float]:
    """Each sentence's log-probability in nats from its first scored token on, given those before.

    `firsts` are the numbers of these tokens; none: 1, the second of every sentence. Called by every
    rank with the same sentences; batches go to ranks in turn (or as `share` says), and every rank
    gets all scores. Log-probabilities are fp32 and are summed in float64, where the order of
    summation does not matter: a score depends on its batch only as far as the model's own rounding
    does. What is identical, and scored in the same part, is scored once. A sentence that ends
    before its first scored token has nothing to score: 0. One longer than `batch_tokens` makes a
    batch of its own.

    Raises:
        DataError: a sentence is longer than the model's positions, or has a token that the model
            has no embedding for (`sources`, its file:line).
        ModelError: a score is not finite.
    """
    check_positions(token_ids, positions_of(model.config), sources)
    _check_embedded(model, token_ids, sources)
    parts = [
        (tuple(ids), first)
        for ids, first in zip(token_ids, firsts or [1] * len(token_ids), strict=True)
    ]
    unique = list(dict.fromkeys(parts))
    lengths = [len(ids) if first < len(ids) else 0 for ids, first in unique]
    batches = length_batches(lengths, batch_tokens)
    share = share or Share.of_rank()
    mine = batches[share.number :: share.count]
    local = _score_batches(model, unique, mine, device, vocab_size, on_batch)
    scores = dict.fromkeys(unique, 0.0)
    for of_rank in ranks.gather_objects(local):
        scores.update((unique[index], score) for index, score in of_rank.items())
    return [_finite(scores[part]) for part in parts]


def check_positions(
    token_ids: Sequence[Sequence[int]],
    positions: int | None,
    sources: Sequence[str] | None = None,
    *,
    whose: str = "the model's positions",
    remedy: str = "evaluate a model with more positions",
) -> None:
    """Every sentence fits into so many positions; none: there is no limit.

    Raises:
        DataError: the longest one does not (`sources`, its file:line).
    """
    longest = max(range(len(token_ids)), key=lambda i: len(token_ids[i]), default=None)
    if positions is None or longest is None or len(token_ids[longest]) <= positions:
        return
    raise DataError.of(
        f"sentence {longest + 1}" if sources is None else "sentence",
        got=f"{len(token_ids[longest])} tokens",
        expected=f"at most {positions}, {whose}",
        hint=f"shorten or remove the sentence, or {remedy}",
        source=None if sources is None else sources[longest],
    )


def length_batches(
    lengths: Sequence[int], batch_tokens: int, *, shortest: int = 2
) -> list[list[int]]:
    """Indices of sentences with at least `shortest` tokens, in batches of like lengths.

    The longest come first: if memory does not suffice, the first batch shows it.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] < shortest:
            break
        if not room:
            batches.append([])
            room = max(1, batch_tokens // lengths[index])
        batches[-1].append(index)
        room -= 1
    return batches


def _score_batches(
    model: nn.Module,
    parts: Sequence[tuple[Sequence[int], int]],
    batches: Sequence[Sequence[int]],
    device: torch.device | str,
    vocab_size: int,
    on_batch: OnBatch | None,
) -> dict[int, float]:
    """Index of sentence to score, for this rank's batches. A collective."""
    scores: list[Tensor] = []
    with likelihood_of(model, vocab_size=vocab_size) as likelihood:

        def score(batch: Sequence[int]) -> None:
            scores.append(_score_batch(likelihood, [parts[index] for index in batch], device))

        each_batch(batches, score, on_batch)
    # One device synchronisation for all batches.
    values = ranks.on_every_rank(lambda: torch.cat(scores).tolist() if scores else [])
    indices = [index for batch in batches for index in batch]
    return dict(zip(indices, values, strict=True))


def _score_batch(
    likelihood: Likelihood, parts: Sequence[tuple[Sequence[int], int]], device: torch.device | str
) -> Tensor:
    """Scores [B] in float64, on the device."""
    tokens_BS, lengths_B = padded([ids for ids, _ in parts])
    firsts_B = torch.tensor([first for _, first in parts])
    place_T = torch.arange(1, tokens_BS.shape[1])
    counted_BT = (place_T >= firsts_B[:, None]) & (place_T < lengths_B[:, None])
    row_N = sent(counted_BT.nonzero()[:, 0], device)
    nll_N = likelihood(sent(tokens_BS, device), counted_BT)
    score_B = torch.zeros(len(parts), dtype=torch.float64, device=device)
    return score_B.index_add_(0, row_N, nll_N.double(), alpha=-1)


def padded(sentences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] and the lengths [B] of sentences of at least one token, on the CPU.

    Padded on the right: attention is causal, so padding cannot reach what is looked at. Its id is
    the sentence's own first, not `<pad>`, at whose sight transformers asks for an attention mask.
    """
    lengths_B = torch.tensor([len(ids) for ids in sentences])
    tokens_BS = torch.tensor([ids[:1] for ids in sentences]).repeat(1, int(lengths_B.max()))
    for row, ids in enumerate(sentences):
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
    return tokens_BS, lengths_B


def _check_embedded(
    model: nn.Module, token_ids: Sequence[Sequence[int]], sources: Sequence[str] | None
) -> None:
    rows = embedding_rows(model)
    for index, ids in enumerate(token_ids):
        if (largest := max(ids, default=0)) >= rows:
            raise DataError.of(
                f"sentence {index + 1}" if sources is None else "sentence",
                got=f"token id {largest}",
                expected=f"ids below {rows}, the rows of the model's embedding",
                hint="use the tokenizer that this model was trained with",
                source=None if sources is None else sources[index],
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
