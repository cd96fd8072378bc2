"""Blocks of text: the cleaned lines of a file and a tokenizer enter; pieces that can be encoded by
themselves leave, and the tokens of each. `writing` writes them.

Where the boundaries of documents are dropped a block is one piece of its file; where they are kept,
it is documents, and parts of long ones, each encoded by itself with the special tokens that were
asked for at its ends. Joined, the tokens of all blocks are those of encoding each file, or each
document, in one call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from babyllama_ds.corpus.documents import DocumentTokens, documents_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCK_CHARS = 1 << 14
"""Characters encoded in one go, about; much longer ones leave the processor's caches."""


class Piece(NamedTuple):
    """Text that is encoded in one call."""

    text: str
    begins: bool
    """Whether a file or, where boundaries are kept, a document begins here."""
    ends: bool
    """Whether a document ends here."""


@dataclass(frozen=True)
class Block:
    """About `BLOCK_CHARS` of a file: one piece or, where boundaries are kept, many."""

    pieces: tuple[Piece, ...]
    domain: str
    begins_file: bool

    @property
    def text(self) -> str:
        """Of all pieces."""
        return "".join(piece.text for piece in self.pieces)


class Tokens(NamedTuple):
    """What a block comes to."""

    ids: list[int]
    starts: list[int]
    """Where among them documents start."""


@dataclass(frozen=True)
class Batch:
    """Blocks of one shard, to be encoded together."""

    shard: int
    blocks: list[Block]


def blocks_of_file(domain: str, lines: Iterator[str], encoder: Encoder) -> Iterator[Block]:
    """Blocks of one piece; marks of documents, being empty, vanish in the text."""
    begins_file = True
    for text in cut_into_blocks(lines, encoder.may_cut, BLOCK_CHARS):
        yield Block((Piece(text, begins_file, ends=False),), domain, begins_file)
        begins_file = False


def blocks_of_documents(domain: str, lines: Iterator[str], encoder: Encoder) -> Iterator[Block]:
    """Blocks of whole documents, and of parts of long ones."""
    pieces: list[Piece] = []
    size, begins_file = 0, True
    for piece in _pieces_of_documents(lines, encoder):
        pieces.append(piece)
        size += len(piece.text)
        if size >= BLOCK_CHARS:
            yield Block(tuple(pieces), domain, begins_file)
            pieces, size, begins_file = [], 0, False
    if pieces:
        yield Block(tuple(pieces), domain, begins_file)


def _pieces_of_documents(lines: Iterator[str], encoder: Encoder) -> Iterator[Piece]:
    for document in documents_of(lines):
        texts = cut_into_blocks(document, encoder.may_cut, BLOCK_CHARS)
        text, begins = next(texts, None), True
        while text is not None:
            following = next(texts, None)
            yield Piece(text, begins, ends=following is None)
            text, begins = following, False


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


class Encoder:
    """Encodes blocks of text as if each were in its place in its file.

    A tokenizer may treat the start of a text specially (ours puts a space before it). So pieces
    that continue a file or document are encoded behind an anchor, whose tokens are then dropped.
    """

    _ANCHOR = "a"

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, documents: DocumentTokens | None = None
    ) -> None:
        from tokenizers import Tokenizer

        self.documents = documents
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

    def encode(self, batches: Iterator[Batch]) -> Generator[tuple[Batch, list[Tokens]], None, None]:
        """Each batch with the tokens of its blocks, in order.

        While a batch is encoded (outside Python's lock), the next one is read and the one before
        is written.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            batch, running = next(batches, None), None
            while batch or running:
                done, running = running, pool.submit(self._encode_batch, batch) if batch else None
                if done:
                    yield done.result()
                batch = next(batches, None)

    def _encode_batch(self, batch: Batch) -> tuple[Batch, list[Tokens]]:
        texts = [
            piece.text if piece.begins else self._ANCHOR + piece.text
            for block in batch.blocks
            for piece in block.pieces
        ]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        return batch, [
            self._tokens(block.pieces, islice(encodings, len(block.pieces)))
            for block in batch.blocks
        ]

    def _tokens(self, pieces: Sequence[Piece], encodings: Iterable[Any]) -> Tokens:
        tokens, num_anchor = Tokens([], []), len(self._anchor_ids)
        for piece, encoding in zip(pieces, encodings, strict=True):
            ids = encoding.ids[0 if piece.begins else num_anchor :]
            if self.documents is None:
                return Tokens(ids, [])  # the one piece of the block
            if piece.begins and piece.ends and not ids:
                continue  # a document without a token is none
            if piece.begins:
                tokens.starts.append(len(tokens.ids))
                tokens.ids.extend(_given(self.documents.begin))
            tokens.ids.extend(ids)
            if piece.ends:
                tokens.ids.extend(_given(self.documents.end))
        return tokens

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def _given(index: int | None) -> tuple[int, ...]:
    return () if index is None else (index,)
