"""BabyLlama's cleaning rules to the letter, bugs included (`cleaning: published`).

Enters: a domain's name and the lines of one file. Leaves: the cleaned lines. `cleaning` has the
same rules with the bugs fixed, and lists what is different.

The published code (`mrclean.py`) works on whole files. Here a file streams through, and what
leaves is the same to the character: no rule looks further than the end of a line, but for two that
delete line breaks, which join lines. In memory is the longest line that comes of it, at worst the
whole file (simple_wiki or bnc_spoken with a blank line after every line become one line).

Like a published file, the last line may lack its line break: then the first word of the next file
follows the last word of this one. There are no documents: the rules erase where they end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from babyllama_ds.errors import DataError

Rule = Callable[[Iterable[str], Path], Iterator[str]]
"""The lines of a file → pieces of its cleaned text, no line break but at a piece's end."""


def clean_as_published(domain: str, lines: Iterable[str], path: Path) -> Iterator[str]:
    """The file's lines as the published rule of `domain` leaves them; unknown ones are unchanged.

    Raises `DataError` where the published code fails: a qed line with nothing but `(…)` or `.!?`.
    """
    rule = RULES.get(domain, _unchanged)
    return _lines(rule(lines, path))


# -- rules ---------------------------------------------------------------------------------------


def _unchanged(lines: Iterable[str], path: Path) -> Iterator[str]:  # noqa: ARG001
    """children_stories, gutenberg, switchboard."""
    yield from lines


def _simple_wiki(lines: Iterable[str], path: Path) -> Iterator[str]:  # noqa: ARG001
    """Line breaks go, two by two."""
    return _without_pairs(lines)


def _wikipedia(lines: Iterable[str], path: Path) -> Iterator[str]:  # noqa: ARG001
    """`= = = T = = =` → `T`, its line break gone; lines are stripped; the file's first character
    goes; then line breaks go, two by two."""
    untitled = (_TITLE.sub(r"\1", line) for line in lines)
    return _without_pairs(_without_first(_joined(map(str.strip, _split(_lines(untitled))))))


def _qed(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Lines in capitals, which is half of what counts of them, become sentences; all are
    stripped."""
    return _joined(_sentences(lines, path))


def _childes(lines: Iterable[str], path: Path) -> Iterator[str]:  # noqa: ARG001
    """Runs of blanks become one space; none is left before `.,;!?`."""
    for line in lines:
        yield _SPACE_BEFORE_PUNCTUATION.sub(r"\1", _BLANKS.sub(" ", line))


def _bnc_spoken(lines: Iterable[str], path: Path) -> Iterator[str]:
    """As childes; then line breaks go, two by two."""
    return _without_pairs(_childes(lines, path))


def _cbt(lines: Iterable[str], path: Path) -> Iterator[str]:
    """As childes; `John 's` → `John's`."""
    return (_SPACE_BEFORE_APOSTROPHE.sub(r"\1\2", line) for line in _childes(lines, path))


def _open_subtitles(lines: Iterable[str], path: Path) -> Iterator[str]:  # noqa: ARG001
    """Lines that speak of subtitles go, but for a last one without a line break."""
    return (line for line in lines if not (line.endswith("\n") and _SUBTITLE.search(line)))


_TITLE = re.compile(r"= = = (.+?) = = =\n")
_BLANKS = re.compile(r"[ \t\u00A0]+")
_SPACE_BEFORE_PUNCTUATION = re.compile(r" ([.,;!?])")
_SPACE_BEFORE_APOSTROPHE = re.compile(r"(\w) (['’]\w)")
_SUBTITLE = re.compile("subtitle", re.IGNORECASE)
_QED_UNIMPORTANT = re.compile(r"\(.*?\)|[.!?]")
_QED_PUNCTUATION = re.compile(r"([.!?]\s*)")

RULES: dict[str, Rule] = {
    "aochildes": _childes,
    "bnc_spoken": _bnc_spoken,
    "cbt": _cbt,
    "childes": _childes,
    "children_stories": _unchanged,
    "gutenberg": _unchanged,
    "open_subtitles": _open_subtitles,
    "qed": _qed,
    "simple_wiki": _simple_wiki,
    "simple_wikipedia": _simple_wiki,
    "switchboard": _unchanged,
    "wikipedia": _wikipedia,
}
"""The BabyLM domains of 2023 and 2024, by file stem."""


def _sentences(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, whole in enumerate(lines, start=1):
        for line in whole.splitlines():
            body = _QED_UNIMPORTANT.sub("", line)
            if line and not body:
                raise _divides_by_zero(path, number, line)
            if line and sum(map(str.isupper, body)) / len(body) >= 0.5:
                parts = _QED_PUNCTUATION.split(line.replace("l", "I"))
                line = "".join(part.capitalize() for part in parts)
            yield line.strip()


def _divides_by_zero(path: Path, number: int, line: str) -> DataError:
    return DataError.of(
        f"{path}:{number}",
        got=f"{line[:60]!r}, a line on which the published rule of qed fails (ZeroDivisionError: "
        "it takes the share of capitals of what stands outside (…) and .!?, which is nothing)",
        expected="text outside (…) in every line that is not empty",
        hint="corpus.cleaning: babylm has this bug fixed; or delete the line",
    )


# -- pieces of text ------------------------------------------------------------------------------


def _split(lines: Iterable[str]) -> Iterator[str]:
    """The lines by `str.splitlines`, which also ends them at form feeds, U+2028 and the like."""
    for line in lines:
        yield from line.splitlines()


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """`"\\n".join(lines)`."""
    first = True
    for line in lines:
        yield line if first else "\n"
        if not first:
            yield line
        first = False


def _without_first(pieces: Iterable[str]) -> Iterator[str]:
    """All but the first character."""
    begun = False
    for piece in pieces:
        yield piece if begun else piece[1:]
        begun = begun or bool(piece)


def _without_pairs(pieces: Iterable[str]) -> Iterator[str]:
    """Each two line breaks that follow one another go: of a run, one stays if it is odd."""
    owed = False
    for piece in pieces:
        text = piece.removesuffix("\n")
        if text:
            if owed:
                yield "\n"
            yield text
            owed = False
        owed ^= piece.endswith("\n")
    if owed:
        yield "\n"


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines that the pieces make up, the last with its line break if it has one."""
    line: list[str] = []
    for piece in pieces:
        line.append(piece)
        if piece.endswith("\n"):
            yield "".join(line)
            line = []
    if last := "".join(line):
        yield last
