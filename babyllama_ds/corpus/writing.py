"""Writing token shards: text enters, encoded in blocks; what `shards` maps into memory leaves.

Enters: the cleaned lines of each split and a tokenizer. Leaves: a directory of little-endian
`.bin` files and `shards.json`.

The text is encoded in blocks (`blocks`), many at a time, so that all cores work and a corpus larger
than memory passes through; or document by document, where their boundaries are kept. Text that
looks like a special token (`<s>`) is encoded as the text it is.

A shard is the tokens of so many blocks, so where it begins depends on the text alone. Beside it
lies what proves it whole, and of which text it is: whoever finds a directory that was begun reads
the text again, which is quick, and encodes what is missing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import count, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from babyllama_ds.corpus.blocks import (
    Batch,
    Block,
    Encoder,
    Tokens,
    blocks_of_documents,
    blocks_of_file,
)
from babyllama_ds.corpus.documents import DocumentTokens
from babyllama_ds.corpus.shards import INDEX_NAME, STARTS_SUFFIX, on_disk
from babyllama_ds.corpus.starts import ON_DISK
from babyllama_ds.corpus.tokenizer import vocabulary_size
from babyllama_ds.errors import RunError
from babyllama_ds.files import (
    cannot_write,
    hash_json,
    read_json,
    sha256_file,
    write_atomic,
    write_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

BATCH_BLOCKS = 128
"""Blocks encoded together, so about 2 MiB of text."""
SHARD_BLOCKS = 8 * BATCH_BLOCKS
"""Blocks in a shard, so about 16 MiB of text: what a kill costs, and what is in memory."""

Texts = Iterable[tuple[str, Iterator[str]]]
"""(domain, lines) of each file of a split; an empty line marks the end of a document."""
Check = Callable[[], None]


def write_shards(
    directory: Path,
    texts_by_split: Mapping[str, Texts],
    tokenizer: PreTrainedTokenizerFast,
    *,
    documents: DocumentTokens | None = None,
    check: Check = lambda: None,
) -> None:
    """Encode every split into `directory`, which is made when it is missing.

    `documents` keeps the boundaries of documents and says which tokens stand at their ends; none
    drops the boundaries.

    Shards that an earlier call with the same tokenizer left there are kept if they are whole and
    of the same text, and the others named in the log and made anew: the result is the same.

    `shards.json` gives for each split its tokens, the UTF-8 bytes and the words (by whitespace) of
    the cleaned text, its files, its domains and, where kept, its documents. `check` is called
    between batches of blocks and may raise to stop. Raises `RunError` when the disk refuses.
    """
    size = vocabulary_size(tokenizer)
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    encoder = Encoder(tokenizer, documents)
    splits = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if found := list(directory.glob("*.bin")):
            log.info("tokens: going on with what is there, %d shards", len(found))
        for split, texts in texts_by_split.items():
            writer = _SplitWriter(directory, split, dtype, encoder, check)
            splits[split] = _summary(writer.write(texts), with_documents=documents is not None)
    except OSError as error:
        raise cannot_write(directory, error) from error
    write_json(directory / INDEX_NAME, {"dtype": dtype, "vocab_size": size, "splits": splits})


@dataclass
class _Text:
    """What the text of a shard comes to."""

    documents: DocumentTokens | None
    bytes: int = 0
    words: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def add(self, blocks: Iterable[Block]) -> _Text:
        for block in blocks:
            text = block.text
            content = text.encode()
            self._digest.update(f"{block.domain}/{len(content)}/".encode())
            self._digest.update(content)
            if self.documents is not None:
                pieces = [(len(text), begins, ends) for text, begins, ends in block.pieces]
                self._digest.update(f"{self.documents}/{pieces}/".encode())
            self.bytes += len(content)
            self.words += len(text.split())  # blocks are cut at whitespace
        return self

    def sha256(self) -> str:
        """Of the text, its domains, and how it is cut into blocks, none of which crosses files;
        and of its documents and their tokens, where boundaries are kept."""
        digest: str = self._digest.hexdigest()
        return digest


@dataclass(frozen=True)
class _Span:
    """Tokens that one file has in a shard."""

    domain: str
    begins_file: bool
    tokens: int


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """What lies beside a shard's tokens, as JSON."""

    name: str
    sha256: str
    text_sha256: str
    tokens: int
    bytes: int
    words: int
    spans: list[_Span]
    documents: int | None = None
    """Documents that start here; none: boundaries are dropped, and nothing is said of them."""
    starts_sha256: str | None = None
    """Of the file of their starts."""

    @classmethod
    def read(cls, path: Path) -> _Shard | None:
        """None where it is not what was written, or not there."""
        try:
            value = read_json(path)
            proof = value.pop("proof")
            if proof != hash_json(value):
                return None
            return cls(**{**value, "spans": [_Span(**span) for span in value["spans"]]})
        except (RunError, KeyError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        value = {key: each for key, each in asdict(self).items() if each is not None}
        write_json(path, {**value, "proof": hash_json(value)})

    def holds(self, path: Path) -> bool:
        """Whether the tokens at `path`, and the starts of documents beside them, are these."""
        if sha256_file(path) != self.sha256:
            return False
        starts = path.with_suffix(STARTS_SUFFIX)
        return self.starts_sha256 is None or (
            starts.exists() and sha256_file(starts) == self.starts_sha256
        )


class _SplitWriter:
    """Writes one split's shards, but for those that stand."""

    def __init__(
        self, directory: Path, split: str, dtype: str, encoder: Encoder, check: Check
    ) -> None:
        self._directory, self._split = directory, split
        self._dtype, self._encoder, self._check = on_disk(dtype), encoder, check
        self._shards: dict[int, _Shard] = {}

    def write(self, texts: Texts) -> list[_Shard]:
        """All shards of the split, in order."""
        batches = self._batches(self._blocks(texts))
        with closing(self._encoder.encode(batches)) as encoded:
            for shard, group in groupby(encoded, key=lambda pair: pair[0].shard):
                self._shards[shard] = self._write(shard, group)
        self._remove_others()
        return [self._shards[shard] for shard in range(len(self._shards))]

    def _blocks(self, texts: Texts) -> Iterator[Block]:
        for domain, lines in texts:
            if self._encoder.documents is None:
                yield from blocks_of_file(domain, lines, self._encoder)
            else:
                yield from blocks_of_documents(domain, lines, self._encoder)

    def _text(self) -> _Text:
        return _Text(self._encoder.documents)

    def _batches(self, blocks: Iterator[Block]) -> Iterator[Batch]:
        """The text of the shards that do not stand."""
        for shard in count():
            of_shard = islice(blocks, SHARD_BLOCKS)
            if (found := self._whole(shard)) is not None:
                read = list(of_shard)
                if read and found.text_sha256 == self._text().add(read).sha256():
                    self._shards[shard] = found
                    self._check()
                    continue
                if read:
                    self._say_anew(shard, "was made of other text")
                of_shard = islice(read, None)
            begun = False
            while batch := list(islice(of_shard, BATCH_BLOCKS)):
                begun = True
                yield Batch(shard, batch)
            if not begun:
                return

    def _whole(self, shard: int) -> _Shard | None:
        """The shard that lies there, if its checksum holds."""
        path = self._path(shard)
        if not path.exists():
            return None
        found = _Shard.read(path.with_suffix(".json"))
        if found is None:
            self._say_anew(shard, "is unfinished or damaged (nothing proves it)")
        elif not found.holds(path):
            self._say_anew(shard, "is damaged (its checksum does not hold)")
        else:
            return found
        return None

    def _write(self, shard: int, group: Iterator[tuple[Batch, list[Tokens]]]) -> _Shard:
        text, parts, starts, spans = self._text(), [], [], []
        num_tokens = 0
        for batch, tokens in group:
            text.add(batch.blocks)
            for block, of_block in zip(batch.blocks, tokens, strict=True):
                parts.append(np.array(of_block.ids, dtype=self._dtype))
                starts.append(np.array(of_block.starts, dtype=ON_DISK) + ON_DISK.type(num_tokens))
                spans.append(_Span(block.domain, block.begins_file, len(of_block.ids)))
                num_tokens += len(of_block.ids)
            self._check()
        content = np.concatenate(parts).tobytes()
        path = self._path(shard)
        documents = self._write_starts(path, np.concatenate(starts))
        made = _Shard(
            name=path.name,
            sha256=hashlib.sha256(content).hexdigest(),
            text_sha256=text.sha256(),
            tokens=len(content) // self._dtype.itemsize,
            bytes=text.bytes,
            words=text.words,
            spans=_joined(spans),
            **documents,
        )
        write_atomic(path, content)
        made.write(path.with_suffix(".json"))
        return made

    def _write_starts(self, shard: Path, starts: npt.NDArray[np.uint32]) -> dict[str, Any]:
        """What a shard says of its documents; nothing where boundaries are dropped."""
        if self._encoder.documents is None:
            return {}
        content = starts.astype(ON_DISK).tobytes()
        write_atomic(shard.with_suffix(STARTS_SUFFIX), content)
        return {"documents": len(starts), "starts_sha256": hashlib.sha256(content).hexdigest()}

    def _remove_others(self) -> None:
        """What is left here of a longer text."""
        ours = {self._path(shard).stem for shard in self._shards}
        for path in self._directory.glob(f"{self._split}-[0-9]*"):
            if path.stem not in ours:
                path.unlink()

    def _say_anew(self, shard: int, what: str) -> None:
        log.warning("%s %s: its text is encoded anew", self._path(shard), what)

    def _path(self, shard: int) -> Path:
        return self._directory / f"{self._split}-{shard:05d}.bin"


def _joined(spans: Iterable[_Span]) -> list[_Span]:
    """Those that follow one another in a file as one."""
    joined: list[_Span] = []
    for span in spans:
        if span.begins_file or not joined:
            joined.append(span)
        else:
            joined[-1] = replace(joined[-1], tokens=joined[-1].tokens + span.tokens)
    return joined


def _summary(shards: list[_Shard], *, with_documents: bool) -> dict[str, Any]:
    """A split, as the index has it."""
    domains, start = [], 0
    for span in _joined(span for shard in shards for span in shard.spans):
        domains.append({"domain": span.domain, "start": start, "stop": start + span.tokens})
        start += span.tokens
    summary = {
        "tokens": start,
        "bytes": sum(shard.bytes for shard in shards),
        "words": sum(shard.words for shard in shards),
        "files": [{"name": shard.name, "tokens": shard.tokens} for shard in shards],
        "domains": domains,
    }
    return summary | (
        {"documents": [shard.documents for shard in shards]} if with_documents else {}
    )
