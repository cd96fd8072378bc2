"""Where documents end: the lines of a file enter, the same lines with marks between them leave.

A mark is the empty string, and ends the document that came before it; no line is empty, since
each ends with a line break. The end of a file ends its last document, with a mark or without.
Marks are set in the raw text, before cleaning, which takes blank lines and titles away; cleaning
lets them pass. No choice of documents changes the text: the lines, and what of them is held out,
stay the same.

    blank_lines   the first line of text after a blank one begins a document; so does a title
                  (`= = = Anarchism = = =`), which in BabyLM's files heads an article, a book or
                  a transcript, with or without a blank line before it. A blank line right after
                  a title belongs to its document
    lines         every line of text is a document
    files         every file is a document, which takes no mark
    rows          every row of a table is one; whoever reads tables sets the marks

A blank line (nothing but whitespace) is never a document: it stays at the end of the one before.

`sources` marks, `writing` encodes document by document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Literal

from babyllama_ds.corpus.streams import END_OF_DOCUMENT
from babyllama_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Documents = Literal["none", "blank_lines", "lines", "files", "rows"]

_TITLE = re.compile(r"\s*= = = .+ = = =\s*\Z")


def mark_documents(lines: Iterator[str], documents: Documents) -> Iterator[str]:
    """The raw `lines` of a file, with a mark between one document and the next."""
    if documents in ("none", "files"):
        return lines
    assert documents != "rows", "rows come with their marks"
    return _marked(lines, every_line=documents == "lines")


def _marked(lines: Iterator[str], *, every_line: bool) -> Iterator[str]:
    begun = ended = titled = False
    for line in lines:
        if line.isspace():
            ended = begun and not titled
        else:
            title = _TITLE.match(line) is not None
            if begun and (ended or every_line or title):
                yield END_OF_DOCUMENT
            begun, ended, titled = True, False, title
        yield line


def documents_of(lines: Iterable[str]) -> Iterator[Iterator[str]]:
    """The lines of each document, to be read one document after another; none is without lines."""
    rest = iter(lines)
    for first in rest:
        if first:
            yield chain([first], takewhile(bool, rest))  # which takes the mark, too


def after_lines(lines: Iterable[str], number: int) -> Iterator[str]:
    """What comes after the first `number` lines, marks included."""
    for line in lines:
        if number == 0:
            yield line
        elif line:
            number -= 1


def check_documents_found(texts: Iterable[tuple[str, Iterator[str]]], documents: str) -> None:
    """The training text has a boundary where blank lines were to give some.

    Reads until the first one. Raises `DataError` when no file is more than one document.
    """
    if "blank_lines" not in documents.split("/"):
        return
    if not any(_has_a_second(lines) for _, lines in texts):
        raise DataError.of(
            "corpus.documents",
            got="blank_lines, but no file of the training text has a blank line or a title "
            "(`= = = … = = =`) between two lines of text",
            expected="text in which one document is told from the next",
            hint="set corpus.documents=lines if each line is a document, files if each file is "
            "one, or none",
        )


def _has_a_second(lines: Iterator[str]) -> bool:
    found = documents_of(lines)
    for _ in next(found, iter(())):
        pass
    return next(found, None) is not None


# -- tokens at the ends ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DocumentTokens:
    """Ids of the special tokens at the ends of every document; none: no token there."""

    begin: int | None = None
    end: int | None = None


def document_tokens(
    tokenizer: PreTrainedTokenizerFast, asked: Literal["none", "begin", "end", "both"]
) -> DocumentTokens:
    """The tokenizer's own tokens for the beginning and the end of a text, as far as asked for.

    Raises `DataError` when it lacks one of them.
    """
    begin = _special(tokenizer, "bos_token", asked) if asked in ("begin", "both") else None
    end = _special(tokenizer, "eos_token", asked) if asked in ("end", "both") else None
    return DocumentTokens(begin=begin, end=end)


_ROLES = {"bos_token": "<s>", "eos_token": "</s>"}


def _special(tokenizer: PreTrainedTokenizerFast, role: str, asked: str) -> int:
    index: int | None = getattr(tokenizer, f"{role}_id")
    if index is None:
        has = ", ".join(f"{key} {token}" for key, token in tokenizer.special_tokens_map.items())
        raise DataError.of(
            "tokenizer.document_tokens",
            got=f"{asked}, with a tokenizer that has no {role} (as ours has `{_ROLES[role]}`); "
            f"it has {has or 'no special token at all'}",
            expected="a tokenizer with the tokens asked for",
            hint="set tokenizer.document_tokens to what it has, or none",
        )
    return index
