"""Streams: lines and document ends, and what cutting them leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama_ds.corpus.streams import (
    document,
    first_lines,
    num_documents,
    only_lines,
    part_of_documents,
    without_empty_documents,
)

TWO = ["a\n", "b\n", "", "c\n", ""]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("a", ["a\n", ""]),
        ("a\n", ["a\n", ""]),
        ("a\n\n", ["a\n", "\n", ""]),
        ("\n", ["\n", ""]),
        ("a\r\nb\rc", ["a\n", "b\n", "c\n", ""]),
        ("a\x0cb\u2028c\x85", ["a\x0cb\u2028c\x85\n", ""]),
    ],
)
def test_a_document_is_its_lines_and_an_end(text: str, pieces: list[str]) -> None:
    assert document(text) == pieces


def test_documents_are_counted_and_parted_whole() -> None:
    assert num_documents(TWO) == 2
    assert list(only_lines(TWO)) == ["a\n", "b\n", "c\n"]
    assert list(part_of_documents(TWO, 1, "train")) == ["a\n", "b\n", ""]
    assert list(part_of_documents(TWO, 1, "dev")) == ["c\n", ""]


@given(st.lists(st.sampled_from(["a\n", ""]), max_size=9))
def test_ends_of_nothing_go_and_lines_stay(stream: list[str]) -> None:
    left = list(without_empty_documents(stream))
    assert [piece for piece in left if piece] == [piece for piece in stream if piece]
    assert all(one or other for one, other in zip(["", *left], left, strict=False))


@pytest.mark.parametrize(
    ("count", "pieces"),
    [(1, ["a\n", ""]), (2, ["a\n", "b\n", ""]), (3, TWO), (9, TWO)],
)
def test_a_cut_ends_the_document_that_it_goes_through(count: int, pieces: list[str]) -> None:
    assert list(first_lines(TWO, count)) == pieces
