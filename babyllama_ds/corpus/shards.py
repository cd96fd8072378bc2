"""Token shards: the corpus as one long stream of token ids per split, on disk.

Enters: a directory of little-endian `.bin` files and `shards.json`, as `writing` leaves it. Leaves:
`TokenShards`, which maps them into memory. `windows` reads it.

The stream is what encoding each cleaned file in one call and joining the results would give, as
published: no token between files, no special token anywhere. Where the boundaries of documents are
kept, each document is encoded by itself instead, with the special tokens that were asked for at its
ends, and beside a shard of tokens lie the places where its documents start (`starts`).

Legend: N windows, L tokens in a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from babyllama_ds.corpus.starts import ON_DISK, DocumentStarts
from babyllama_ds.errors import DataError
from babyllama_ds.files import read_json

INDEX_NAME = "shards.json"
STARTS_SUFFIX = ".starts"
"""Of the file, beside a shard, that says where its documents start."""


def on_disk(dtype: str) -> np.dtype[Any]:
    """The type, as shards have it on every machine: little-endian."""
    return np.dtype(dtype).newbyteorder("<")


@dataclass(frozen=True)
class DomainSpan:
    """The tokens `start` to `stop` of a split come from one file of this domain."""

    domain: str
    start: int
    stop: int


class TokenShards:
    """The token streams of a directory that `write_shards` made, mapped into memory."""

    def __init__(
        self,
        index: dict[str, Any],
        arrays: dict[str, list[npt.NDArray[Any]]],
        documents: Mapping[str, Sequence[npt.NDArray[np.uint32]]] = {},  # read only
    ) -> None:
        self.vocab_size: int = index["vocab_size"]
        self._splits: dict[str, dict[str, Any]] = index["splits"]
        self._arrays = arrays
        self._starts = {split: np.cumsum([0, *map(len, parts)]) for split, parts in arrays.items()}
        self._documents = {
            split: DocumentStarts(parts, self._starts[split]) for split, parts in documents.items()
        }

    @classmethod
    def open(cls, directory: Path) -> TokenShards:
        """Map the shards of `directory`. `DataError` when a file is missing or has another size;
        `RunError` when there is no `shards.json`.
        """
        path = directory / INDEX_NAME
        index = read_json(path)
        try:
            dtype = on_disk(index["dtype"])
            arrays = {
                split: [
                    _map(directory / part["name"], part["tokens"], dtype) for part in facts["files"]
                ]
                for split, facts in index["splits"].items()
            }
            documents = {
                split: [
                    _map((directory / part["name"]).with_suffix(STARTS_SUFFIX), number, ON_DISK)
                    for part, number in zip(facts["files"], facts["documents"], strict=True)
                ]
                for split, facts in index["splits"].items()
                if "documents" in facts
            }
            return cls(index, arrays, documents)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _damaged(path, f"JSON of another shape ({error!r})", "a shard index") from error

    @property
    def splits(self) -> tuple[str, ...]:
        """What there is: `train` and `dev`, or one of them."""
        return tuple(self._arrays)

    def num_tokens(self, split: str) -> int:
        """Tokens in a split."""
        return int(self._starts[split][-1])

    def count(self, split: str, token: int) -> int:
        """How often a token is in a split."""
        return sum(int(np.count_nonzero(part == token)) for part in self._arrays[split])

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of a split's cleaned text."""
        return int(self._splits[split]["bytes"])

    def num_words(self, split: str) -> int:
        """Words, by whitespace, of a split's cleaned text."""
        return int(self._splits[split]["words"])

    def domains(self, split: str) -> list[DomainSpan]:
        """Which tokens come from which domain: one span per file, in order, without gaps."""
        return [DomainSpan(**span) for span in self._splits[split]["domains"]]

    def documents(self, split: str) -> DocumentStarts | None:
        """Where a split's documents start; none: their boundaries are dropped."""
        return self._documents.get(split)

    def read(self, split: str, start: int, length: int) -> npt.NDArray[np.int64]:
        """`length` ids from token `start` on."""
        assert 0 <= start <= self.num_tokens(split) - length, "beyond the stream"
        out = np.empty(length, np.int64)
        bounds, parts = self._starts[split], self._arrays[split]
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        last = int(np.searchsorted(bounds, start + length, side="left"))
        for begin, part in zip(bounds[first:last], parts[first:last], strict=True):
            low, high = max(start, begin), min(start + length, begin + len(part))
            if low < high:
                out[low - start : high - start] = part[low - begin : high - begin]
        return out

    def gather(
        self, split: str, starts_N: npt.NDArray[np.int64], length: int
    ) -> npt.NDArray[np.int64]:
        """`length` ids from each start on, as an array of shape [N, length]."""
        bounds = self._starts[split]
        shards_N = np.searchsorted(bounds, starts_N, side="right") - 1
        ends_N = np.searchsorted(bounds, starts_N + length, side="left") - 1
        out_NL = np.empty((len(starts_N), length), np.int64)
        steps_L = np.arange(length)
        for shard in np.unique(shards_N):
            rows = (shards_N == shard) & (ends_N == shard)
            local_N1 = (starts_N[rows] - bounds[shard])[:, None]
            out_NL[rows] = self._arrays[split][shard][local_N1 + steps_L]
        for row in np.flatnonzero(shards_N != ends_N):  # windows across a border: few
            out_NL[row] = self.read(split, int(starts_N[row]), length)
        return out_NL


def _map(path: Path, num_tokens: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    expected = num_tokens * dtype.itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise _damaged(path, f"{size} bytes", f"{expected} bytes")
        if not expected:  # which cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r").view(np.ndarray)
    except OSError as error:
        got = error.strerror or str(error)
        raise _damaged(path, got, f"{expected} readable bytes") from error


def _damaged(path: Path, got: str, expected: str) -> DataError:
    hint = f"delete the folder {path.parent} and start again: it is made anew"
    return DataError.of(path, got=got, expected=expected, hint=hint)
