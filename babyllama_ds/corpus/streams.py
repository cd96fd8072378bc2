"""What every source of text gives: texts by domain, each a stream of lines and document ends.

Enters: nothing. Leaves: the types and the small steps that `sources`, `hub` and `mixing` share.

A stream yields lines, none empty, each ending in a line break, and the empty string where a
document ends. Whoever has no use of documents skips what is empty (`only_lines`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

Split = Literal["train", "dev"]

END_OF_DOCUMENT = ""

Texts = Iterator[tuple[str, Iterator[str]]]
"""(domain, lines and document ends) of each text of a split."""


class Sources(Protocol):
    """Text that was found and checked, and can be read as often as needed."""

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the cleaned text of both splits; paths do not."""

    def texts(self, split: Split) -> Texts:
        """The texts of a split in order, each opened when its first line is asked for."""

    def domains(self) -> set[str] | None:
        """The domains of both splits; none: known only when all is read."""

    def contents(self) -> dict[str, str]:
        """What identifies each piece of the text (a hash), and what it is called."""

    def size(self) -> str:
        """How much there is, for the log."""


def only_lines(stream: Iterable[str]) -> Iterator[str]:
    """The lines without the document ends."""
    return filter(None, stream)


def document(text: str) -> list[str]:
    """The lines of one document and its end; an empty text is no document.

    Lines end as in text files: at a line feed, a carriage return or both.
    """
    if not text:
        return []
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    return [*lines, END_OF_DOCUMENT]


def without_empty_documents(stream: Iterable[str]) -> Iterator[str]:
    """The stream without the ends of documents that cleaning left nothing of."""
    begun = False
    for piece in stream:
        if piece or begun:
            yield piece
        begun = bool(piece)


def train_lines(num_lines: int, tail: float) -> int:
    """How many of a file's lines are train when its last `tail` is dev (BabyLlama-2's cut)."""
    return round((1 - tail) * num_lines)


def num_documents(stream: Iterable[str]) -> int:
    """The documents of a stream."""
    return sum(1 for piece in stream if not piece)


def part_of_documents(stream: Iterable[str], cut: int, split: Split) -> Iterator[str]:
    """The first `cut` documents (train) or the others (dev)."""
    ended = 0
    for piece in stream:
        if ended < cut:
            if split == "train":
                yield piece
        elif split == "train":
            return
        else:
            yield piece
        ended += not piece


def first_lines(stream: Iterable[str], count: int) -> Iterator[str]:
    """The first `count` lines; where more follow, the document they are cut from ends there."""
    left, ended = count, True
    for piece in stream:
        if piece and not left:
            if not ended:
                yield END_OF_DOCUMENT
            return
        left -= bool(piece)
        ended = not piece
        yield piece
