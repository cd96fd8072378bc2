"""Token shards: the corpus as one long stream of token ids per split, on disk.

Enters: the cleaned lines of each split and a tokenizer. Leaves: a directory of little-endian
`.bin` files and `shards.json`, and `TokenShards`, which maps them into memory. `windows` reads it.

The stream is what encoding each cleaned file in one call and joining the results would give, as
published: no token between files, no special token anywhere. But the text is encoded in blocks,
many at a time, so that all cores work and a corpus larger than memory passes through. Text that
looks like a special token (`<s>`) is encoded as the text it is.

Legend: N windows, L tokens in a window.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from babyllama_ds.corpus.tokenizer import vocabulary_size
from babyllama_ds.errors import DataError
from babyllama_ds.files import cannot_write, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INDEX_NAME = "shards.json"
SHARD_TOKENS = 1 << 28
"""Tokens in a shard file, at most (512 MiB of uint16)."""
BLOCK_CHARS = 1 << 14
"""Characters encoded in one go, about; much longer ones leave the processor's caches."""
BATCH_BLOCKS = 128
"""Blocks encoded together, so about 2 MiB of text."""

Texts = Iterable[tuple[str, Iterator[str]]]
"""(domain, lines) of each file of a split."""


@dataclass(frozen=True)
class DomainSpan:
    """The tokens `start` to `stop` of a split come from one file of this domain."""

    domain: str
    start: int
    stop: int


# -- writing -------------------------------------------------------------------------------------


def write_shards(
    directory: Path,
    texts_by_split: Mapping[str, Texts],
    tokenizer: PreTrainedTokenizerFast,
    *,
    check: Callable[[], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Encode every split into `directory`, which is made when it is missing.

    `shards.json` gives for each split its tokens, the UTF-8 bytes and the words (by whitespace) of
    the cleaned text, its files and its domains. `check` is called between batches of blocks and
    may raise to stop. Raises `RunError` when the disk refuses.
    """
    size = vocabulary_size(tokenizer)
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    encoder = _Encoder(tokenizer)
    splits = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for split, texts in texts_by_split.items():
            with _SplitWriter(directory, split, dtype, shard_tokens) as writer:
                for block, ids in encoder.encode(_blocks_of_split(texts, encoder)):
                    writer.add(block, ids)
                    if check is not None:
                        check()
            splits[split] = writer.facts()
    except OSError as error:
        raise cannot_write(directory, error) from error
    write_json(directory / INDEX_NAME, {"dtype": dtype, "vocab_size": size, "splits": splits})


@dataclass(frozen=True)
class _Block:
    text: str
    domain: str
    begins_file: bool


def _blocks_of_split(texts: Texts, encoder: _Encoder) -> Iterator[_Block]:
    for domain, lines in texts:
        begins_file = True
        for text in cut_into_blocks(lines, encoder.may_cut, BLOCK_CHARS):
            yield _Block(text, domain, begins_file)
            begins_file = False


def cut_into_blocks(
    lines: Iterable[str], may_cut: Callable[[str, str], bool], block_chars: int
) -> Iterator[str]:
    """Pieces of the joined `lines` of about `block_chars` characters, cut where `may_cut` agrees.

    Cuts are only tried before a space or line break that follows another character: words, and
    runs of whitespace, stay whole. Text without such a place is kept together, however long.
    """
    pending: list[str] = []
    size, enough = 0, 2 * block_chars
    for line in lines:
        pending.append(line)
        size += len(line)
        if size < enough:
            continue
        text, start = "".join(pending), 0
        while (cut := _find_cut(text, start + block_chars, may_cut)) is not None:
            yield text[start:cut]
            start = cut
        pending, size = [text[start:]], len(text) - start
        # Without a cut, the next attempt waits for twice the text: the work stays linear.
        enough = max(2 * block_chars, 2 * size)
    if size:
        yield "".join(pending)


_CONTEXT_CHARS = 64
_PLACE_TO_CUT = re.compile(r"(?<=\S)[ \n]")


def _find_cut(text: str, start: int, may_cut: Callable[[str, str], bool]) -> int | None:
    for place in _PLACE_TO_CUT.finditer(text, start, max(start, len(text) - _CONTEXT_CHARS)):
        cut = place.start()
        left = text[max(0, cut - _CONTEXT_CHARS) : cut]
        if may_cut(left, text[cut : cut + _CONTEXT_CHARS]):
            return cut
    return None


class _Encoder:
    """Encodes blocks of text as if each were in its place in its file.

    A tokenizer may treat the start of a text specially (ours puts a space before it). So blocks
    that continue a file are encoded behind an anchor, whose tokens are then dropped.
    """

    _ANCHOR = "a"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        # A copy: the settings below are not the caller's.
        self._backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._anchor_ids = self._ids(self._ANCHOR)

    def may_cut(self, left: str, right: str) -> bool:
        """Whether the tokens of `left + right` are those of `left`, then those of `right`.

        True of byte-level BPE before any whitespace; asked of the tokenizer itself, since some
        join punctuation with the line break that follows it.
        """
        anchored, num_anchor = self._ids(self._ANCHOR + right), len(self._anchor_ids)
        return (
            anchored[:num_anchor] == self._anchor_ids
            and self._ids(left + right) == self._ids(left) + anchored[num_anchor:]
        )

    def encode(self, blocks: Iterator[_Block]) -> Iterator[tuple[_Block, list[int]]]:
        """Each block with its token ids, in order.

        While a batch is encoded (outside Python's lock), the next one is read and the one before
        is written.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            batch, running = list(islice(blocks, BATCH_BLOCKS)), None
            while batch or running:
                done, running = running, pool.submit(self._encode_batch, batch) if batch else None
                if done:
                    yield from done.result()
                batch = list(islice(blocks, BATCH_BLOCKS))

    def _encode_batch(self, batch: list[_Block]) -> list[tuple[_Block, list[int]]]:
        texts = [block.text if block.begins_file else self._ANCHOR + block.text for block in batch]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        num_anchor = len(self._anchor_ids)
        return [
            (block, encoding.ids[0 if block.begins_file else num_anchor :])
            for block, encoding in zip(batch, encodings, strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


class _SplitWriter:
    """Writes one split's ids into shard files and keeps count."""

    def __init__(self, directory: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._directory, self._split, self._shard_tokens = directory, split, shard_tokens
        self._dtype = _on_disk(dtype)
        self._files: list[dict[str, Any]] = []
        self._domains: list[dict[str, Any]] = []
        self._tokens = self._bytes = self._words = 0
        self._stack = ExitStack()
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, block: _Block, ids: list[int]) -> None:
        if block.begins_file:
            span = {"domain": block.domain, "start": self._tokens, "stop": self._tokens}
            self._domains.append(span)
        self._write(np.array(ids, dtype=self._dtype))
        self._domains[-1]["stop"] = self._tokens
        self._bytes += len(block.text.encode())
        self._words += len(block.text.split())  # blocks are cut at whitespace

    def facts(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "bytes": self._bytes,
            "words": self._words,
            "files": self._files,
            "domains": self._domains,
        }

    def _write(self, ids: npt.NDArray[Any]) -> None:
        while len(ids):
            if self._stream is None or self._files[-1]["tokens"] == self._shard_tokens:
                self._open_next()
            assert self._stream is not None
            now = ids[: self._shard_tokens - self._files[-1]["tokens"]]
            self._stream.write(now.tobytes())
            self._files[-1]["tokens"] += len(now)
            self._tokens += len(now)
            ids = ids[len(now) :]

    def _open_next(self) -> None:
        self._stack.close()
        name = f"{self._split}-{len(self._files):05d}.bin"
        self._stream = self._stack.enter_context((self._directory / name).open("wb"))
        self._files.append({"name": name, "tokens": 0})


def _on_disk(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


# -- reading -------------------------------------------------------------------------------------


class TokenShards:
    """The token streams of a directory that `write_shards` made, mapped into memory."""

    def __init__(self, index: dict[str, Any], arrays: dict[str, list[npt.NDArray[Any]]]) -> None:
        self.vocab_size: int = index["vocab_size"]
        self._splits: dict[str, dict[str, Any]] = index["splits"]
        self._arrays = arrays
        self._starts = {split: np.cumsum([0, *map(len, parts)]) for split, parts in arrays.items()}

    @classmethod
    def open(cls, directory: Path) -> TokenShards:
        """Map the shards of `directory`. `DataError` when a file is missing or has another size;
        `RunError` when there is no `shards.json`.
        """
        path = directory / INDEX_NAME
        index = read_json(path)
        try:
            dtype = _on_disk(index["dtype"])
            arrays = {
                split: [
                    _map(directory / part["name"], part["tokens"], dtype) for part in facts["files"]
                ]
                for split, facts in index["splits"].items()
            }
            return cls(index, arrays)
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"JSON of another shape ({error!r})", "a shard index") from error

    def num_tokens(self, split: str) -> int:
        """Tokens in a split."""
        return int(self._starts[split][-1])

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of a split's cleaned text."""
        return int(self._splits[split]["bytes"])

    def num_words(self, split: str) -> int:
        """Words, by whitespace, of a split's cleaned text."""
        return int(self._splits[split]["words"])

    def domains(self, split: str) -> list[DomainSpan]:
        """Which tokens come from which domain: one span per file, in order, without gaps."""
        return [DomainSpan(**span) for span in self._splits[split]["domains"]]

    def read(self, split: str, start: int, length: int) -> npt.NDArray[np.int64]:
        """`length` ids from token `start` on."""
        assert 0 <= start <= self.num_tokens(split) - length, "beyond the stream"
        out = np.empty(length, np.int64)
        for begin, part in zip(self._starts[split], self._arrays[split], strict=False):
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
        return np.memmap(path, dtype, mode="r").view(np.ndarray)
    except OSError as error:
        got = error.strerror or str(error)
        raise _damaged(path, got, f"{expected} readable bytes") from error


def _damaged(path: Path, got: str, expected: str) -> DataError:
    hint = f"delete the folder {path.parent} and start again: it is made anew"
    return DataError.of(path, got=got, expected=expected, hint=hint)
