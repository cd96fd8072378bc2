"""Windows: training examples of token ids, each a pure function of (seed, epoch, index).

Enters: `TokenShards`. Leaves: batches of windows for `training` and the development windows for
`evaluation`. A window is named by (epoch, index); which windows make up batch k of an epoch does
not depend on ranks, micro-batches or what was asked for before.

Randomness is a hash of counters, SplitMix64's output function (Steele, Lea and Flood, 2014): no
state to keep, and, unlike a generator's stream, not subject to NumPy's version.

Where attention stays within documents, a window also has its boundaries: at which of its positions
the piece of a document begins.

A cache of teachers knows a window by its number: with offsets that repeat, the same number is the
same tokens, for every seed.

Legend: N windows, L tokens in a window.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from babyllama_ds.corpus.shards import DomainSpan, TokenShards
from babyllama_ds.corpus.starts import DocumentStarts
from babyllama_ds.errors import DataError
from babyllama_ds.spec.corpus import Offsets, Phases

Indices = npt.NDArray[np.int64]

PUBLISHED_SEED = 42
"""Of all trainings of BabyLlama and BabyLlama-2: the default of Hugging Face's trainer."""


class TrainWindows:
    """The training windows of one stage.

    With T tokens, `fixed` gives T // length windows, window i at token i · length; `random` gives
    T // length − 1 (published), window i at token i · length + offset, the offset drawn from
    [0, length) for each (epoch, i). With K phases the offset is (epoch mod K) · length // K for
    every window, and there are as many as the last phase has room for. Raises `DataError` when
    that leaves no window.

    In the `published` order the seed is 42, whichever is given, and epoch e visits windows in
    torch's random permutation of seed 42 + e: what Accelerate's `SeedableRandomSampler` gave
    BabyLlama-2's trainings, from Trainer's seed. Their offsets came from Python's generator, which
    other code drew from in between: these stay our own, of seed 42.
    """

    def __init__(
        self,
        tokens: TokenShards,
        *,
        length: int,
        offsets: Offsets,
        seed: int,
        within_documents: bool = False,
        order: Literal["seeded", "published"] = "seeded",
    ) -> None:
        phases = offsets.phases if isinstance(offsets, Phases) else 1
        self.length = length
        self.num_phases = None if offsets == "random" else phases
        self._tokens = tokens
        self._seed = seed if order == "seeded" else PUBLISHED_SEED
        self._order = _order if order == "seeded" else _published_order
        self._documents = _kept(tokens, "train") if within_documents else None
        spare = length if offsets == "random" else self._offset(phases - 1)  # for the offset
        self.num_windows = (tokens.num_tokens("train") - spare) // length
        if self.num_windows < 1:
            raise _too_short("train", tokens, length, needed=length + spare)

    @property
    def within_documents(self) -> bool:
        """Whether a position belongs to its document, not to its window."""
        return self._documents is not None

    @property
    def num_distinct(self) -> int | None:
        """Windows that differ, over all epochs; none: each epoch has its own."""
        return None if self.num_phases is None else self.num_phases * self.num_windows

    def order(self, epoch: int) -> Indices:
        """The permutation of all window indices in which an epoch visits them; read-only."""
        return self._order(self._seed, epoch, self.num_windows)

    def batch(self, epoch: int, k: int, batch_windows: int) -> Indices:
        """Indices of the windows of global batch `k`; the last of an epoch may be shorter."""
        return self.order(epoch)[k * batch_windows : (k + 1) * batch_windows]

    def starts(self, epoch: int, indices: Indices) -> Indices:
        """The first token of each window."""
        indices = np.asarray(indices, np.int64)
        starts = indices * self.length
        if self.num_phases is not None:
            return starts + self._offset(epoch % self.num_phases)
        draws = _draw(self._seed, _OFFSETS, epoch, indices)
        # The remainder favours small offsets by less than length / 2^64.
        return starts + (draws % np.uint64(self.length)).astype(np.int64)

    def numbers(self, epoch: int, indices: Indices) -> Indices:
        """What these windows are called among all that differ, from 0: phase · num_windows + i."""
        phase = epoch if self.num_phases is None else epoch % self.num_phases
        return phase * self.num_windows + np.asarray(indices, np.int64)

    def numbered(self, numbers: Indices) -> npt.NDArray[np.int64]:
        """The token ids of windows by number, of one phase or several: [N, L]."""
        return self._tokens.gather("train", self._numbered_starts(numbers), self.length)

    def numbered_begins(self, numbers: Indices) -> npt.NDArray[np.bool_] | None:
        """As `begins`, of windows by number."""
        if self._documents is None:
            return None
        return self._documents.begins(self._numbered_starts(numbers), self.length)

    def _numbered_starts(self, numbers: Indices) -> Indices:
        assert self.num_phases is not None, "windows that never repeat have no use of a number"
        phases, indices = np.divmod(numbers, self.num_windows)
        starts: Indices = indices * self.length + phases * self.length // self.num_phases
        return starts

    def windows(self, epoch: int, indices: Indices) -> npt.NDArray[np.int64]:
        """The token ids of each window: [N, L]."""
        return self._tokens.gather("train", self.starts(epoch, indices), self.length)

    def begins(self, epoch: int, indices: Indices) -> npt.NDArray[np.bool_] | None:
        """Where in each window the piece of a document begins: [N, L]; none: windows are whole."""
        if self._documents is None:
            return None
        return self._documents.begins(self.starts(epoch, indices), self.length)

    def _offset(self, phase: int) -> int:
        return phase * self.length // (self.num_phases or 1)


class DevWindows:
    """The development windows: fixed, one after another, the same for every model.

    The last tokens, too few for a window, are left out (published: N // length windows). `limit`
    keeps that many, evenly spaced. Raises `DataError` when there is no window.
    """

    def __init__(
        self,
        tokens: TokenShards,
        length: int,
        limit: int | None = None,
        *,
        within_documents: bool = False,
    ) -> None:
        self.length = length
        self._documents = _kept(tokens, "dev") if within_documents else None
        available = tokens.num_tokens("dev") // length
        if available < 1:
            raise _too_short("dev", tokens, length, needed=length)
        self.num_windows = available if limit is None else min(limit, available)
        # Integer spacing: strictly increasing, since available >= num_windows.
        chosen = np.arange(self.num_windows, dtype=np.int64) * available // self.num_windows
        self._starts = chosen * length
        self._tokens = tokens

    def windows(self, indices: Indices) -> npt.NDArray[np.int64]:
        """The token ids of the windows `indices`, each in [0, num_windows): [N, L]."""
        return self._tokens.gather("dev", self._starts[indices], self.length)

    @property
    def within_documents(self) -> bool:
        """Whether a position belongs to its document, not to its window."""
        return self._documents is not None

    def begins(self, indices: Indices) -> npt.NDArray[np.bool_] | None:
        """Where in each window the piece of a document begins: [N, L]; none: windows are whole."""
        if self._documents is None:
            return None
        return self._documents.begins(self._starts[indices], self.length)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of the development text, each once, in the order in which they begin."""
        return tuple(dict.fromkeys(span.domain for span in self._spans))

    def domain_numbers(self, indices: Indices) -> npt.NDArray[np.int64]:
        """Which of `domains` each token of the windows `indices` comes from: [N, L]."""
        positions_NL = self._starts[indices][:, None] + np.arange(self.length)
        # The first span that ends behind a position holds it: spans leave no gaps.
        spans_NL = np.searchsorted(self._span_stops, positions_NL, side="right")
        return self._span_domains[spans_NL]

    @cached_property
    def _spans(self) -> list[DomainSpan]:
        return self._tokens.domains("dev")

    @cached_property
    def _span_stops(self) -> Indices:
        return np.array([span.stop for span in self._spans], np.int64)

    @cached_property
    def _span_domains(self) -> Indices:
        return np.array([self.domains.index(span.domain) for span in self._spans], np.int64)


def _kept(tokens: TokenShards, split: str) -> DocumentStarts:
    documents = tokens.documents(split)
    assert documents is not None, "the spec refuses documents without boundaries"
    return documents


_MORE_TEXT = {
    "train": "give more text",
    "dev": "give more development text (of `split: {kind: tail}`, a larger fraction)",
}


def _too_short(split: str, tokens: TokenShards, length: int, *, needed: int) -> DataError:
    lower = ["set windows.length lower"] if tokens.num_tokens(split) else []
    return DataError.of(
        f"corpus ({split})",
        got=f"{tokens.num_tokens(split)} tokens, not enough for one window",
        expected=f"at least {needed} tokens for windows.length {length}"
        + (", which windows.offsets shift" if needed > length else ""),
        hint=", or ".join([_MORE_TEXT[split], *lower]),
    )


# -- randomness ----------------------------------------------------------------------------------

_ORDER, _OFFSETS = 1, 2  # what a draw is for
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's increment


@lru_cache(maxsize=4)  # an epoch's order is asked for at each of its steps
def _order(seed: int, epoch: int, num_windows: int) -> Indices:
    draws = _draw(seed, _ORDER, epoch, np.arange(num_windows))
    order = np.argsort(draws, kind="stable")  # ties: 64 bits make them rare, stability harmless
    order.flags.writeable = False
    return order


@lru_cache(maxsize=4)
def _published_order(seed: int, epoch: int, num_windows: int) -> Indices:
    generator = torch.Generator().manual_seed(seed + epoch)
    order: Indices = torch.randperm(num_windows, generator=generator).numpy()
    order.flags.writeable = False
    return order


def _draw(seed: int, purpose: int, epoch: int, indices: Indices) -> npt.NDArray[np.uint64]:
    """64 uniform bits for each index: element `index` of a SplitMix64 stream.

    The stream's key is mixed from seed, purpose and epoch one after another, so that
    (seed, epoch + 1) and (seed + 1, epoch) have nothing in common.
    """
    key = np.uint64(0)
    for part in (seed, purpose, epoch):
        key = _mix(np.array([(int(key) + part + 1) * _GOLDEN & _MASK], np.uint64))[0]
    counters = indices.astype(np.uint64) + np.uint64(1)
    return _mix(np.array([key]) + counters * np.uint64(_GOLDEN))


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function: a bijection of 64-bit words (arithmetic modulo 2^64)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
