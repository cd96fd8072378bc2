"""BabyLlama's cleaning rules, one domain at a time, with their known bugs fixed.

Enters: a domain's name and its lines. Leaves: the cleaned lines, each ending with a line break.
`sources` applies it between reading and everything else.

The rules are those of the published code (`mrclean.py`, the same file in BabyLlama and
BabyLlama-2), which works on whole files; here they work line by line. Differences, all meant:

- *Blank lines* between documents (simple_wiki, wikipedia, bnc_spoken). Published: each pair of
  line breaks is deleted, which glues the last word of a document to the first of the next. Here
  the blank lines go and one line break stays.
- *Wikipedia titles.* Published: `= = = T = = =` loses its signs and its line break, so that the
  title fuses with the body. Here the title keeps a line of its own.
- *Wikipedia's first character.* Published: dropped, to remove the blank line that opens that one
  file; any other file loses a letter. Here leading blank lines go with the other blank ones.
- *QED lines with nothing but `(…)` or `.!?`.* Published: ZeroDivisionError. Here: not upper case.
- *A line* ends at a line break only. Published: `str.splitlines` in wikipedia and qed, which also
  breaks lines at form feeds, U+2028 and the like.
- *The last line* of a file gets its line break, so that the next file starts a new line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

Cleaning = Literal["babylm", "none"]
CLEANING_VERSION = 1
"""Part of every fingerprint of text: raise it whenever any output of this module changes."""

Rule = Callable[[str], str | None]
"""A line without its line break → the cleaned line, or none when it goes."""


def clean(domain: str, lines: Iterator[str], cleaning: Cleaning = "babylm") -> Iterator[str]:
    """`lines` cleaned by the rule of `domain`; unknown domains are unchanged.

    Lines may or may not end with a line break; all that leave do. `none` does just that. The marks
    between documents (`documents`) pass as they are.
    """
    rule = RULES.get(domain, _unchanged) if cleaning == "babylm" else _unchanged
    for line in lines:
        if not line:
            yield line
            continue
        cleaned = rule(line.removesuffix("\n"))
        if cleaned is not None:
            yield cleaned + "\n"


# -- rules ---------------------------------------------------------------------------------------


def _unchanged(line: str) -> str:
    """children_stories, gutenberg, switchboard."""
    return line


def _simple_wiki(line: str) -> str | None:
    """Blank lines go."""
    return line or None


def _wikipedia(line: str) -> str | None:
    """`= = = T = = =` → `T`; lines are stripped; blank lines go."""
    return _TITLE.sub(r"\1", line).strip() or None


def _qed(line: str) -> str:
    """Subtitles in capitals become sentences; every line is stripped.

    A line counts as capitals when at least half of its characters are upper case, `(…)` and
    `.!?` not counted. In such lines a small `l` is a misread `I`.
    """
    body = _QED_UNIMPORTANT.sub("", line)
    if body and sum(map(str.isupper, body)) >= 0.5 * len(body):
        sentences = _QED_PUNCTUATION.split(line.replace("l", "I"))
        line = "".join(sentence.capitalize() for sentence in sentences)
    return line.strip()


def _childes(line: str) -> str:
    """Runs of blanks become one space; none is left before `.,;!?`."""
    return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", _BLANKS.sub(" ", line))


def _bnc_spoken(line: str) -> str | None:
    """As childes; blank lines go."""
    return _childes(line) or None


def _cbt(line: str) -> str:
    """As childes; `John 's` → `John's`."""
    return _SPACE_BEFORE_APOSTROPHE.sub(r"\1\2", _childes(line))


def _open_subtitles(line: str) -> str | None:
    """Lines that speak of subtitles are credits: they go."""
    return None if _SUBTITLE.search(line) else line


_TITLE = re.compile(r"= = = (.+?) = = =\Z")
_QED_UNIMPORTANT = re.compile(r"\(.*?\)|[.!?]")
_QED_PUNCTUATION = re.compile(r"([.!?]\s*)")
# Published: `[ \t\u00A0]+` → one space. This finds the same runs, except the single spaces, which
# are nearly all of them and would be replaced by themselves.
_BLANKS = re.compile(r"[ \t\u00A0]{2,}|[\t\u00A0]")
_SPACE_BEFORE_PUNCTUATION = re.compile(r" ([.,;!?])")
_SPACE_BEFORE_APOSTROPHE = re.compile(r"(\w) (['’]\w)")
_SUBTITLE = re.compile("subtitle", re.IGNORECASE)

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
