"""Sentences: their text and a model enter, their token ids and log-probabilities leave.

A sentence's score is the sum of log P(token | tokens before it), in nats. The first token given is
context and is not scored: a sentence's own first, or the prefix token that stands before it.

Shapes: B sentences, S positions, T = S - 1 next tokens, N scored tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
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
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        described[part] = _add_no_space(described[part])
    plain = Tokenizer.from_str(json.dumps(described))
    plain.no_padding()
    plain.no_truncation()
    space = " " if leading_space else ""
    before = prefix_ids(tokenizer, prefix)

    def encode(sentences: Sequence[str]) -> list[list[int]]:
        texts = [space + sentence.lstrip() for sentence in sentences]
        return [[*before, *e.ids] for e in plain.encode_batch(texts, add_special_tokens=False)]

    return encode


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
    sources: Sequence[str] | None = None,
    share: Share | None = None,
    on_batch: OnBatch | None = None,
) -> list[float]:
    """Each sentence's log-probability in nats, given its first token.

    Called by every rank with the same sentences; batches go to ranks in turn (or as `share` says),
    and every rank gets all scores. Log-probabilities are fp32 and are summed in float64, where the
    order of summation does not matter: a score depends on its batch only as far as the model's own
    rounding does. Identical sentences are scored once. A sentence of fewer than 2 tokens has
    nothing to score: 0. A sentence longer than `batch_tokens` makes a batch of its own.

    Raises:
        DataError: a sentence is longer than the model's positions, or has a token that the model
            has no embedding for (`sources`, its file:line).
        ModelError: a score is not finite.
    """
    check_positions(token_ids, positions_of(model.config), sources)
    _check_embedded(model, token_ids, sources)
    unique = list(dict.fromkeys(tuple(ids) for ids in token_ids))
    batches = length_batches([len(ids) for ids in unique], batch_tokens)
    share = share or Share.of_rank()
    mine = batches[share.number :: share.count]
    local = _score_batches(model, unique, mine, device, vocab_size, on_batch)
    scores = dict.fromkeys(unique, 0.0)
    for of_rank in ranks.gather_objects(local):
        scores.update((unique[index], score) for index, score in of_rank.items())
    return [_finite(scores[tuple(ids)]) for ids in token_ids]


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
    sentences: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    device: torch.device | str,
    vocab_size: int,
    on_batch: OnBatch | None,
) -> dict[int, float]:
    """Index of sentence to score, for this rank's batches. A collective."""
    scores: list[Tensor] = []
    with likelihood_of(model, vocab_size=vocab_size) as likelihood:

        def score(batch: Sequence[int]) -> None:
            scores.append(_score_batch(likelihood, [sentences[index] for index in batch], device))

        each_batch(batches, score, on_batch)
    # One device synchronisation for all batches.
    values = ranks.on_every_rank(lambda: torch.cat(scores).tolist() if scores else [])
    indices = [index for batch in batches for index in batch]
    return dict(zip(indices, values, strict=True))


def _score_batch(
    likelihood: Likelihood, sentences: Sequence[Sequence[int]], device: torch.device | str
) -> Tensor:
    """Scores [B] in float64, on the device."""
    tokens_BS, lengths_B = padded(sentences)
    counted_BT = torch.arange(1, tokens_BS.shape[1]) < lengths_B[:, None]
    row_N = sent(counted_BT.nonzero()[:, 0], device)
    nll_N = likelihood(sent(tokens_BS, device), counted_BT)
    score_B = torch.zeros(len(sentences), dtype=torch.float64, device=device)
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
