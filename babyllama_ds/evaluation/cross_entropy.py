"""Cross-entropy of a model on development windows, and what is derived from it.

Windows of token ids enter (a function of their indices), the summed negative log-likelihood and
its counts leave. Ranks share the windows; the sums are global, in float64.

Shapes: B windows, S positions, T = S - 1 labelled positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, ModelError
from babyllama_ds.evaluation.forward import OnBatch, likelihood_of
from babyllama_ds.models.documents import Pieces

WindowsOf = Callable[[Sequence[int]], NDArray[Any]]
"""Window indices to their token ids [len(indices), S]."""
BeginsOf = Callable[[Sequence[int]], NDArray[np.bool_]]
"""Window indices to where in them the pieces of documents begin [len(indices), S]."""


@dataclass(frozen=True, kw_only=True)
class DevScore:
    """Sums over every labelled position: the first token of a window is context, not a label.

    Where documents are kept apart, so is the first token of each one's piece.
    """

    nll_nats: float
    """Summed negative log-likelihood."""
    num_tokens: int
    """Labelled tokens: windows * (S - 1), less the boundaries of documents kept apart."""
    num_windows: int
    """Windows."""
    num_bytes: int | None = None
    """Bytes of text that the labelled tokens stand for; none: byte lengths were not given."""

    @property
    def cross_entropy(self) -> float:
        """Nats per token."""
        return self.nll_nats / self.num_tokens


def evaluate_cross_entropy(
    model: nn.Module,
    windows_of: WindowsOf,
    num_windows: int,
    *,
    device: torch.device | str,
    batch_windows: int,
    vocab_size: int,
    byte_lengths: NDArray[Any] | None = None,
    begins_of: BeginsOf | None = None,
    on_batch: OnBatch | None = None,
) -> DevScore:
    """The model's cross-entropy on windows 0 … num_windows - 1; the same on every rank.

    Called by every rank. Rank r scores windows r, r + R, r + 2R, …: none is dropped or counted
    twice when ranks do not divide them. `byte_lengths[id]` is the number of bytes that a token
    stands for. With `begins_of`, documents are kept apart: each token is predicted from those of
    its own document, and the first of a piece is not.

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
    mine = range(ranks.rank(), num_windows, ranks.world_size())
    batches = [mine[start : start + batch_windows] for start in range(0, len(mine), batch_windows)]
    nll, tokens, num_bytes = ranks.sum_floats(
        *ranks.on_every_rank(
            lambda: _sum_batches(
                model, windows_of, batches, device, vocab_size, byte_lengths, begins_of, on_batch
            )
        )
    )
    if tokens < 1 and begins_of is not None:
        raise DataError.of(
            "development windows",
            got="documents of one token each, which leave none to predict",
            expected="documents of several tokens, for windows.attention=document",
            hint="set windows.attention=window, or corpus.documents to longer ones",
        )
    if not math.isfinite(nll):
        raise ModelError.of(
            "development cross-entropy",
            got=f"a summed negative log-likelihood of {nll}",
            expected="a finite number",
            hint="the model's weights or activations are not finite: look at its training losses",
        )
    return DevScore(
        nll_nats=nll,
        num_tokens=round(tokens),
        num_windows=num_windows,
        num_bytes=None if byte_lengths is None else round(num_bytes),
    )


def perplexity(nll_nats: float, num_tokens: int) -> float:
    """exp(nats per token)."""
    return math.exp(nll_nats / num_tokens)


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
    begins_of: BeginsOf | None,
    on_batch: OnBatch | None,
) -> tuple[float, float, float]:
    """This rank's summed NLL in nats, labelled tokens, and bytes (0 without byte lengths)."""
    # Kept on the device, so that a batch does not wait for the one before.
    nll = torch.zeros((), dtype=torch.float64, device=device)
    tokens = num_bytes = 0
    with likelihood_of(model, vocab_size=vocab_size) as likelihood:
        for done, batch in enumerate(batches, start=1):
            windows_BS = np.asarray(windows_of(batch)).astype(np.int64)
            labels_BT = windows_BS[:, 1:]
            counted_BT = np.ones(labels_BT.shape, dtype=np.bool_)
            pieces = None
            if begins_of is not None:
                begins_BS = begins_of(batch)
                counted_BT = ~begins_BS[:, 1:]
                pieces = Pieces.of(begins_BS, lambda tensor: tensor.to(device))
            nll_N = likelihood(
                torch.from_numpy(windows_BS).to(device),
                torch.from_numpy(counted_BT).to(device),
                pieces,
            )
            nll += nll_N.double().sum()
            tokens += int(counted_BT.sum())
            if byte_lengths is not None:
                num_bytes += int(byte_lengths[labels_BT[counted_BT]].sum(dtype=np.int64))
            if on_batch is not None:
                on_batch(done, len(batches))
    return nll.item(), float(tokens), float(num_bytes)
