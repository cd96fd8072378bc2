"""Clauses against forms written out by hand."""

from __future__ import annotations

import pytest

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.grammar import (
    article,
    ask,
    conjugate,
    declare,
    possessive,
    quoted,
    sentence,
    tag,
    with_adverb,
)


@pytest.mark.parametrize(
    ("pronoun", "form", "negative", "expected"),
    [
        ("she", "present", False, "X eats it"),
        ("they", "present", False, "X eat it"),
        ("he", "present", True, "X doesn't eat it"),
        ("they", "present", True, "X don't eat it"),
        ("it", "past", False, "X ate it"),
        ("it", "past", True, "X didn't eat it"),
        ("I", "progressive", False, "X am eating it"),
        ("they", "progressive", True, "X aren't eating it"),
        ("she", "past progressive", False, "X was eating it"),
        ("we", "past progressive", True, "X weren't eating it"),
        ("he", "perfect", False, "X has eaten it"),
        ("you", "perfect", True, "X haven't eaten it"),
        ("he", "can", True, "X can't eat it"),
        ("they", "will", True, "X won't eat it"),
        ("she", "want", False, "X wants to eat it"),
        ("they", "want", True, "X don't want to eat it"),
        ("she", "wanted", True, "X didn't want to eat it"),
    ],
)
def test_statements(pronoun: str, form: str, negative: bool, expected: str) -> None:
    assert declare("X", conjugate(lex.EAT, pronoun, form), "it", negative=negative) == expected


@pytest.mark.parametrize(
    ("pronoun", "form", "wh", "expected"),
    [
        ("she", "present", "", "does X see it"),
        ("they", "present", "what", "what do X see it"),
        ("she", "past", "", "did X see it"),
        ("she", "perfect", "", "has X seen it"),
        ("they", "past progressive", "", "were X seeing it"),
        ("he", "can", "where", "where can X see it"),
    ],
)
def test_questions_invert(pronoun: str, form: str, wh: str, expected: str) -> None:
    assert ask("X", conjugate(lex.SEE, pronoun, form), "it", wh=wh) == expected


def test_be_is_its_own_auxiliary() -> None:
    assert ask("the dogs", conjugate(lex.BE, "they", "past"), "wet") == "were the dogs wet"
    assert declare("I", conjugate(lex.BE, "I", "present"), "wet", negative=True) == "I am not wet"


def test_tags_use_the_operator_of_the_clause() -> None:
    assert tag(conjugate(lex.LIKE, "she", "present"), "she", negative=True) == "doesn't she"
    assert tag(conjugate(lex.BE, "I", "present"), "I", negative=True) == "aren't I"
    assert tag(conjugate(lex.RUN, "they", "can"), "they", negative=False) == "can they"


def test_adverbs_follow_the_auxiliary() -> None:
    assert with_adverb("Tom", conjugate(lex.RUN, "he", "perfect"), "never") == "Tom has never run"
    assert with_adverb("Tom", conjugate(lex.RUN, "he", "present"), "never") == "Tom never runs"


def test_small_words() -> None:
    assert [article("old hat"), article("red egg")] == ["an old hat", "a red egg"]
    assert [possessive("Max"), possessive("the boys"), possessive("the men")] == [
        "Max's",
        "the boys'",
        "the men's",
    ]
    assert sentence("is it red", "?") == "Is it red?"
    assert quoted("where is it", "Tom", end="?") == '"Where is it?" said Tom.'
    assert quoted("thank you", "Tom") == '"Thank you," said Tom.'
