"""Cross-entropy of a model on development windows, and what is derived from it.

Windows of token ids enter (a function of their indices), the summed negative log-likelihood and
its counts leave, for the whole text and for each of its domains, from one forward pass. Ranks share
the windows; the sums are global, in float64.

A window may lie across two files. A token belongs to the domain that it comes from itself, wherever
its context comes from: the position of the label decides.

Shapes: B windows, S positions, T = S - 1 labelled positions, N of them that count (all B · T, but
where documents are kept apart), D domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, ModelError
from babyllama_ds.evaluation.forward import OnBatch, Share, each_batch, likelihood_of
from babyllama_ds.memory import sent
from babyllama_ds.models.documents import Pieces

WindowsOf = Callable[[Sequence[int]], NDArray[Any]]
"""Window indices to their token ids [len(indices), S]."""
BeginsOf = Callable[[Sequence[int]], NDArray[np.bool_]]
"""Window indices to where in them the pieces of documents begin [len(indices), S]."""


@dataclass(frozen=True, kw_only=True)
class Domains:
    """Where each token of the windows comes from."""

    names: tuple[str, ...]
    """Each domain once."""
    numbers_of: WindowsOf
    """Window indices to the number of each token's domain, an index of `names`: [len, S]."""


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Sums over labelled positions."""

    nll_nats: float
    """Summed negative log-likelihood."""
    num_tokens: int
    """Labelled tokens."""
    num_bytes: int | None = None
    """Bytes of text that the labelled tokens stand for; none: byte lengths were not given."""

    @property
    def cross_entropy(self) -> float:
        """Nats per token."""
        return self.nll_nats / self.num_tokens


@dataclass(frozen=True, kw_only=True)
class DevScore(TextScore):
    """Sums over every labelled position: the first token of a window is context, not a label.

    Where documents are kept apart, so is the first token of each one's piece.
    """

    num_windows: int
    """Windows."""
    domains: Mapping[str, TextScore] = field(default_factory=dict)
    """The same by domain, of those that have a labelled token; they add up to the whole."""


def evaluate_cross_entropy(
    model: nn.Module,
    windows_of: WindowsOf,
    num_windows: int,
    *,
    device: torch.device | str,
    batch_windows: int,
    vocab_size: int,
    byte_lengths: NDArray[Any] | None = None,
    domains: Domains | None = None,
    begins_of: BeginsOf | None = None,
    share: Share | None = None,
    on_batch: OnBatch | None = None,
) -> DevScore:
    """The model's cross-entropy on windows 0 … num_windows - 1; the same on every rank.

    Called by every rank. Rank r scores windows r, r + R, r + 2R, … (or as `share` says): none is
    dropped or counted twice when ranks do not divide them. `byte_lengths[id]` is the number of
    bytes that a token stands for. With `domains` the whole is the sum of its parts. With
    `begins_of`, documents are kept apart: each token is predicted from those of its own document,
    and the first of a piece is not.

    Raises:
        DataError: there is no window to score, or no labelled token in any.
        ModelError: the likelihood is not finite.
    """
    if num_windows < 1:
        raise DataError.of(
            "development windows",
            got="none",
            expected="at least one window of held-out text",
            hint="give more development text or shorten `windows.length`",
        )
    share = share or Share.of_rank()
    mine = range(share.number, num_windows, share.count)
    batches = [mine[start : start + batch_windows] for start in range(0, len(mine), batch_windows)]
    local = _sum_batches(
        model,
        windows_of,
        batches,
        device,
        vocab_size,
        byte_lengths,
        domains,
        begins_of,
        on_batch,
    )
    sums = ranks.sum_floats(*(value if share.counts else 0.0 for value in local))
    if sum(sums[1::3]) < 1 and begins_of is not None:
        raise DataError.of(
            "development windows",
            got="documents of one token each, which leave none to predict",
            expected="documents of several tokens, for windows.attention=document",
            hint="set windows.attention=window, or corpus.documents to longer ones",
        )
    parts = [
        TextScore(
            nll_nats=_finite(nll),
            num_tokens=round(tokens),
            num_bytes=None if byte_lengths is None else round(num_bytes),
        )
        for nll, tokens, num_bytes in zip(sums[::3], sums[1::3], sums[2::3], strict=True)
    ]
    return DevScore(
        nll_nats=math.fsum(part.nll_nats for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        num_bytes=None if byte_lengths is None else sum(part.num_bytes or 0 for part in parts),
        num_windows=num_windows,
        domains={} if domains is None else _with_tokens(domains.names, parts),
    )


def perplexity(nll_nats: float, num_tokens: int) -> float | None:
    """exp(nats per token); none: more than a float holds, which is beyond 709 nats."""
    try:
        return math.exp(nll_nats / num_tokens)
    except OverflowError:
        return None


def bits_per_byte(nll_nats: float, num_bytes: int) -> float:
    """nll / (ln 2 * bytes): comparable between tokenizers, unlike nats per token."""
    return nll_nats / math.log(2) / num_bytes


def _sum_batches(
    model: nn.Module,
    windows_of: WindowsOf,
    batches: Sequence[range],
    device: torch.device | str,
    vocab_size: int,
    byte_lengths: NDArray[Any] | None,
    domains: Domains | None,
    begins_of: BeginsOf | None,
    on_batch: OnBatch | None,
) -> list[float]:
    """This rank's summed NLL in nats, labelled tokens and bytes, of one domain after the other.

    Without domains all text is one; without byte lengths there are 0 bytes. A collective.
    """
    num_domains = 1 if domains is None else len(domains.names)
    # Kept on the device, so that a batch does not wait for the one before.
    nll_D = torch.zeros(num_domains, dtype=torch.float64, device=device)
    counts_D2 = np.zeros((num_domains, 2), dtype=np.int64)
    with likelihood_of(model, vocab_size=vocab_size) as likelihood:

        def score(batch: range) -> None:
            nonlocal nll_D, counts_D2
            windows_BS = np.asarray(windows_of(batch)).astype(np.int64)
            labels_BT = windows_BS[:, 1:]
            counted_BT = np.ones(labels_BT.shape, dtype=np.bool_)
            pieces = None
            if begins_of is not None:
                begins_BS = begins_of(batch)
                counted_BT = ~begins_BS[:, 1:]
                pieces = Pieces.of(begins_BS, lambda tensor: sent(tensor, device))
            nll_N = likelihood(
                sent(torch.from_numpy(windows_BS), device), torch.from_numpy(counted_BT), pieces
            ).double()
            if domains is None:
                domain_N = np.zeros(int(counted_BT.sum()), dtype=np.int64)
                nll_D += nll_N.sum()
            else:
                domain_BT = np.asarray(domains.numbers_of(batch))[:, 1:]
                domain_N = domain_BT[counted_BT].astype(np.int64)
                nll_D.index_add_(0, sent(torch.from_numpy(domain_N), device), nll_N)
            counts_D2 += _counts(domain_N, labels_BT[counted_BT], num_domains, byte_lengths)

        each_batch(batches, score, on_batch)
    return ranks.on_every_rank(
        lambda: [
            float(value)
            for nll, counts in zip(nll_D.tolist(), counts_D2.tolist(), strict=True)
            for value in (nll, *counts)
        ]
    )


def _counts(
    domain_N: NDArray[np.int64],
    labels_N: NDArray[np.int64],
    num_domains: int,
    byte_lengths: NDArray[Any] | None,
) -> NDArray[np.int64]:
    """Tokens and bytes of each domain: [D, 2]."""
    tokens_D = np.bincount(domain_N, minlength=num_domains)
    bytes_D = np.zeros(num_domains, dtype=np.int64)
    if byte_lengths is not None:
        np.add.at(bytes_D, domain_N, byte_lengths[labels_N].astype(np.int64))
    return np.stack([tokens_D, bytes_D], axis=1)


def _with_tokens(names: Sequence[str], parts: Sequence[TextScore]) -> dict[str, TextScore]:
    scored = zip(names, parts, strict=True)
    return {name: part for name, part in scored if part.num_tokens}


def _finite(nll_nats: float) -> float:
    if not math.isfinite(nll_nats):
        raise ModelError.of(
            "development cross-entropy",
            got=f"a summed negative log-likelihood of {nll_nats}",
            expected="a finite number",
            hint="the model's weights or activations are not finite: look at its training losses",
        )
    return nll_nats
