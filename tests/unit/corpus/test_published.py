"""The published cleaning rules: to the letter of whole-file ones, and beside the fixed ones.

The reference is written from the description of the rules, on the text of a whole file at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama_ds.corpus.cleaning import clean
from babyllama_ds.corpus.published import RULES, clean_as_published
from babyllama_ds.errors import DataError

FILE = Path("some", "file.train")


def lines_of(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def published(domain: str, text: str) -> str:
    return "".join(clean_as_published(domain, iter(lines_of(text)), FILE))


def fixed(domain: str, text: str) -> str:
    return "".join(clean(domain, iter(lines_of(text))))


# -- the reference -------------------------------------------------------------------------------


def whole_file(domain: str, text: str) -> str:
    """The published rule, as its code applies it: to everything that was read."""
    if domain in ("simple_wiki", "simple_wikipedia"):
        return text.replace("\n\n", "")
    if domain == "wikipedia":
        text = re.sub("= = = (.+?) = = =\n", lambda title: title[1], text)
        return "\n".join(line.strip() for line in text.splitlines())[1:].replace("\n\n", "")
    if domain == "qed":
        return "\n".join(one_line_of_qed(line) for line in text.splitlines())
    if domain in ("childes", "aochildes", "bnc_spoken", "cbt"):
        text = re.sub("[ \t\u00a0]+", " ", text)
        text = re.sub("[ \t\u00a0]([.,;!?])", lambda mark: mark[1], text)
        if domain == "bnc_spoken":
            return text.replace("\n\n", "")
        if domain == "cbt":
            return re.sub("([\\w\\d])[ \t\u00a0](['’]\\w)", lambda it: it[1] + it[2], text)
        return text
    if domain == "open_subtitles":
        return re.sub("^.*subtitle.*$\n", "", text, flags=re.MULTILINE | re.IGNORECASE)
    return text


def one_line_of_qed(line: str) -> str:
    if len(line) > 0:
        counted = re.sub("[.!?]", "", re.sub(r"\(.*?\)|[.!?]", "", line))
        capitals = len([each for each in counted if each.isupper()])
        if capitals / len(counted) >= 0.5:
            parts = re.split(r"([.!?]\s*)", line.replace("l", "I"))
            line = "".join(part.capitalize() for part in parts)
    return line.strip()


PIECES = [
    *("a", "B", "l", "'", "’s", "é", " ", "  ", "\t", "\u00a0", ".", ",", "?", "(", ")"),
    *("\n", "\n\n", "\n\n\n", "= = = ", " = = =", " = = =\n", "= = = T = = =\n"),
    *("subtitle", "SUBTITLES by x\n", "(x)", "\x0c", "\u2028", "\x1c", "AB CD.", "l AM."),
]


@settings(max_examples=400)
@given(domain=st.sampled_from(sorted(RULES)), pieces=st.lists(st.sampled_from(PIECES), max_size=14))
def test_equal_to_the_whole_file_rule(domain: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    lines = lines_of(text)
    assert "".join(lines) == text
    try:
        expected = whole_file(domain, text)
    except ZeroDivisionError:
        with pytest.raises(DataError, match="ZeroDivisionError"):
            list(clean_as_published(domain, iter(lines), FILE))
        return
    cleaned = list(clean_as_published(domain, iter(lines), FILE))
    assert "".join(cleaned) == expected
    assert all(line.endswith("\n") for line in cleaned[:-1])
    assert all(line.count("\n") <= 1 for line in cleaned)
    assert "" not in cleaned


# -- side by side --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "text", "as_published", "as_fixed"),
    [
        (
            "simple_wiki",
            "End of one.\n\nStart of two.\n",
            "End of one.Start of two.\n",
            "End of one.\nStart of two.\n",
        ),
        ("simple_wiki", "a\n\n\nb\n\n\n\nc", "a\nbc", "a\nb\nc\n"),
        ("simple_wikipedia", "a\n\nb\n", "ab\n", "a\nb\n"),
        (
            "wikipedia",
            "\n = = = Harbour town = = =\nIt lies by the sea. \n",
            "Harbour townIt lies by the sea.",
            "Harbour town\nIt lies by the sea.\n",
        ),
        ("wikipedia", "First.\n\nSecond.\n", "irst.Second.", "First.\nSecond.\n"),
        (
            "wikipedia",
            "x an = = = inner = = = sign\n",
            " an = = = inner = = = sign",
            "x an = = = inner = = = sign\n",
        ),
        ("bnc_spoken", "one  .\n\ntwo .\n", "one.two.\n", "one.\ntwo.\n"),
        ("qed", "WHAT lS THAT?\n so (ha) \n", "What is that?\nso (ha)", "What is that?\nso (ha)\n"),
        ("qed", "one\x0ctwo\n", "one\ntwo", "one\x0ctwo\n"),
        (
            "childes",
            "CHI:\twhere  is it ?\n\nx",
            "CHI: where is it?\n\nx",
            "CHI: where is it?\n\nx\n",
        ),
        ("aochildes", "a ,\n", "a,\n", "a,\n"),
        ("cbt", "John 's boat .\n", "John's boat.\n", "John's boat.\n"),
        ("open_subtitles", "a\nSubtitles by b\nc\n", "a\nc\n", "a\nc\n"),
        ("open_subtitles", "a\nSubtitles by b", "a\nSubtitles by b", "a\n"),
        ("gutenberg", "a  b .\n\nc", "a  b .\n\nc", "a  b .\n\nc\n"),
        ("children_stories", "a  b .\n\n\nc\n", "a  b .\n\n\nc\n", "a  b .\n\n\nc\n"),
        ("switchboard", "A:\ta  b .\n", "A:\ta  b .\n", "A:\ta  b .\n"),
        ("my_diary", "a  b .\n\nsubtitle", "a  b .\n\nsubtitle", "a  b .\n\nsubtitle\n"),
    ],
)
def test_published_beside_fixed(domain: str, text: str, as_published: str, as_fixed: str) -> None:
    assert whole_file(domain, text) == as_published
    assert published(domain, text) == as_published
    assert fixed(domain, text) == as_fixed


def test_every_domain_is_among_the_examples() -> None:
    (marker,) = [
        mark for mark in test_published_beside_fixed.pytestmark if mark.name == "parametrize"
    ]
    assert {case[0] for case in marker.args[1]} >= set(RULES)


@pytest.mark.parametrize("line", ["(LAUGHTER)", "...", "(a)(b)?!"])
def test_the_line_on_which_the_published_code_fails_is_named(line: str) -> None:
    text = f"Fine.\n\n{line}\n"
    with pytest.raises(ZeroDivisionError):
        whole_file("qed", text)
    with pytest.raises(DataError) as caught:
        published("qed", text)
    (problem,) = caught.value.problems
    assert problem.where == f"{FILE}:3"
    assert "ZeroDivisionError" in problem.got
    assert "babylm" in (problem.hint or "")
    assert fixed("qed", text) == text


def test_a_file_streams_through() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again .\n"

    for domain in sorted(set(RULES) - {"wikipedia"}):
        lines = clean_as_published(domain, endless(), FILE)
        assert [next(lines) for _ in range(3)][1] in ("again.\n", "again .\n")
    assert next(clean_as_published("wikipedia", endless(), FILE)) == "gain .\n"
