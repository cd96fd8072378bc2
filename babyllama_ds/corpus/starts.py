"""Where documents start in the token stream of a split, mapped into memory.

Enters: what `writing` wrote beside each shard. Leaves: for windows of the stream, at which of their
positions a document begins; `windows` asks.

Legend: N windows, L tokens in a window, M documents that begin inside the windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

ON_DISK = np.dtype("<u4")
"""A start counts from the first token of its shard."""


class DocumentStarts:
    """The starts of a split's documents, in the order of the stream; no two are the same."""

    def __init__(self, parts: Sequence[npt.NDArray[np.uint32]], bounds: Tokens) -> None:
        """`parts`: the starts of each shard; `bounds`: its first token, then the stream's end."""
        self._parts, self._bounds = parts, bounds
        self._counts = np.cumsum([0, *map(len, parts)])

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return int(self._counts[-1])

    def begins(self, starts_N: Tokens, length: int) -> npt.NDArray[np.bool_]:
        """Where the pieces of documents begin in the windows from `starts_N` on: [N, length].

        A window's first position begins a piece, whether its document begins there or earlier.
        """
        low_N, high_N = self._before(starts_N + 1), self._before(starts_N + length)
        counts_N = high_N - low_N
        rows_M = np.repeat(np.arange(len(starts_N)), counts_N)
        first_M = np.repeat(np.cumsum(counts_N) - counts_N, counts_N)  # of the row's, among M
        numbers_M = np.repeat(low_N, counts_N) + np.arange(len(rows_M)) - first_M
        begins_NL = np.zeros((len(starts_N), length), dtype=np.bool_)
        begins_NL[rows_M, self._at(numbers_M) - starts_N[rows_M]] = True
        begins_NL[:, 0] = True
        return begins_NL

    def _before(self, tokens_N: Tokens) -> Tokens:
        """How many documents start before each of these tokens of the stream."""
        shards_N = np.searchsorted(self._bounds[1:-1], tokens_N, side="right")
        counts_N = self._counts[shards_N]
        for shard in np.unique(shards_N):
            rows = shards_N == shard
            # In the type of the file: else NumPy would copy all of it at each call.
            local = (tokens_N[rows] - self._bounds[shard]).astype(ON_DISK)
            counts_N[rows] += np.searchsorted(self._parts[shard], local, side="left")
        return counts_N

    def _at(self, numbers_M: Tokens) -> Tokens:
        """The starts of documents by number."""
        shards_M = np.searchsorted(self._counts[1:], numbers_M, side="right")
        starts_M = self._bounds[shards_M]
        for shard in np.unique(shards_M):
            rows = shards_M == shard
            starts_M[rows] += self._parts[shard][numbers_M[rows] - self._counts[shard]]
        return starts_M
