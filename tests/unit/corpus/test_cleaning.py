"""Cleaning: golden examples per domain, written by hand from the published rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from babyllama_ds.corpus.cleaning import clean


def cleaned(domain: str, text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(clean(domain, iter(lines)))


SPACES = "CHI:\twhere  is\u00a0\u00a0it ?\nMOT: there , look !\n  two . \n"
SPACES_CLEANED = "CHI: where is it?\nMOT: there, look!\n two. \n"


@pytest.mark.parametrize(
    ("domain", "text", "expected"),
    [
        # A blank line between documents becomes one line break; published: no break at all.
        ("simple_wiki", "End of one.\n\nStart of two.\n", "End of one.\nStart of two.\n"),
        ("simple_wiki", "\n\n\na\n\n\n\nb", "a\nb\n"),
        ("simple_wiki", "= = = Tree = = =\nA  tree .\n", "= = = Tree = = =\nA  tree .\n"),
        ("simple_wikipedia", "a\n\nb\n", "a\nb\n"),
        # A title keeps its own line; published: "Harbour townIt lies by the sea."
        (
            "wikipedia",
            "= = = Harbour town = = =\n  It lies by the sea. \n",
            "Harbour town\nIt lies by the sea.\n",
        ),
        # Published: the first character of the file is lost.
        ("wikipedia", "First.\n \nSecond.\n", "First.\nSecond.\n"),
        ("wikipedia", " \n = = = A = = =\nx\n", "A\nx\n"),
        ("wikipedia", "= = = Last = = =", "Last\n"),
        ("wikipedia", "an = = = inner = = = sign\n", "an = = = inner = = = sign\n"),
        # Capitals become sentences, and a small l among them is an I.
        ("qed", "WHAT lS THAT? IT lS A BOAT.\n", "What is that? It is a boat.\n"),
        ("qed", "  We saw a boat. (LAUGHTER)  \n", "We saw a boat. (LAUGHTER)\n"),
        ("qed", "(MUSIC) HELLO THERE\n", "(music) hello there\n"),
        ("qed", "ABcd\n", "Abcd\n"),  # exactly half
        ("qed", "ABcde\n", "ABcde\n"),
        # Published: ZeroDivisionError.
        ("qed", "(APPLAUSE)\n...\n\nOK\n", "(APPLAUSE)\n...\n\nOk\n"),
        ("bnc_spoken", SPACES, SPACES_CLEANED),
        ("bnc_spoken", "Right .\n\nWell , yes .\n", "Right.\nWell, yes.\n"),
        ("childes", SPACES, SPACES_CLEANED),
        ("aochildes", SPACES, SPACES_CLEANED),
        ("childes", "a\n\nb\n", "a\n\nb\n"),
        ("childes", "a\u00a0b\tc\u00a0\n", "a b c \n"),  # single ones too
        ("cbt", "the fox 's den , and the dog ’s\n", "the fox's den, and the dog’s\n"),
        ("cbt", "he said 'no' . 'Why ?'\n", "he said'no'. 'Why?'\n"),
        ("cbt", "the dogs ' bowls ’ rims\n", "the dogs ' bowls ’ rims\n"),  # no word behind
        ("open_subtitles", "Hello.\nSubtitles by us\nSUBTITLED 1\nBye.\n", "Hello.\nBye.\n"),
        ("open_subtitles", "Hello.\nsubtitle", "Hello.\n"),
        ("children_stories", "a  b .\n\nc", "a  b .\n\nc\n"),
        ("gutenberg", "a  b .\n\nc\n", "a  b .\n\nc\n"),
        ("switchboard", "A:\ta  b .\n", "A:\ta  b .\n"),
        ("my_diary", "a  b .\n\n= = = T = = =\nsubtitle", "a  b .\n\n= = = T = = =\nsubtitle\n"),
    ],
)
def test_golden(domain: str, text: str, expected: str) -> None:
    assert cleaned(domain, text) == expected


def test_none_only_ends_the_last_line() -> None:
    lines = ["a  b .\n", "\n", "subtitle"]
    assert list(clean("open_subtitles", iter(lines), "none")) == ["a  b .\n", "\n", "subtitle\n"]


def test_characters_that_only_look_like_line_breaks_stay_inside_their_line() -> None:
    line = "one\x0ctwo\u2028three\x85four\n"
    for domain in ("wikipedia", "qed", "simple_wiki", "childes", "gutenberg"):
        assert list(clean(domain, iter([line]))) == [line], domain


def test_nothing_is_read_ahead() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again .\n"

    assert next(clean("childes", endless())) == "again.\n"
