"""The rule, and draws that respect it."""

from __future__ import annotations

from zlib import crc32

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.held_out import Draw, is_held_out


def test_a_tenth_of_the_combinations_is_held_out() -> None:
    subjects = [*lex.NAMES, *lex.COMMON]
    verbs = [*lex.INTRANSITIVE, *lex.TRANSITIVE]
    out = [is_held_out(noun.singular, verb.base) for noun in subjects for verb in verbs]
    assert 0.07 < sum(out) / len(out) < 0.13
    for subject, verb in (("Anna", "cry"), ("Anna", "run"), ("dog", "run"), ("cat", "run")):
        expected = crc32(f"{subject.lower()} {verb}".encode()) % 10 == 0
        assert is_held_out(subject, verb) is expected
    assert is_held_out("Anna", "cry")


def test_only_training_refuses_them() -> None:
    anna = lex.NAMES[0]
    assert not Draw("x", training=True).may_do(anna, lex.CRY)
    assert Draw("x", training=False).may_do(anna, lex.CRY)
    assert Draw("x", training=True).may_do(anna, lex.WANT)


def test_nobody_does_what_makes_no_sense() -> None:
    cup = next(noun for noun in lex.THINGS if noun.singular == "cup")
    cow = next(noun for noun in lex.ANIMALS if noun.singular == "cow")
    draw = Draw("x", training=False)
    assert not draw.may_do(cup, lex.EAT)
    assert not draw.may_do(cow, lex.FLY)
    assert not lex.EAT.takes_object(cup)
    assert not draw.may_be(cup, lex.HUNGRY)


def test_draws_are_skewed_and_repeatable() -> None:
    first, second = (Draw("seed", training=True) for _ in range(2))
    drawn = [first.pick("abcdef") for _ in range(2000)]
    assert drawn == [second.pick("abcdef") for _ in range(2000)]
    counts = [drawn.count(letter) for letter in "abcdef"]
    # Weights 1/3 ... 1/8 sum to 1.2179.
    assert abs(counts[0] / 2000 - 0.2737) < 0.04
    assert abs(counts[5] / 2000 - 0.1026) < 0.03
    assert sorted(first.shuffled("abcdef")) == list("abcdef")
