"""Word combinations that training text never shows, and draws that respect them.

A subject and a verb (dog, run), or an adjective and a noun (red, cup), are held out by a fixed
rule of their lemmas. Held-out text and minimal pairs may use them: a model that gets them right
has learnt the words and the grammar, not the pair.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import TypeVar
from zlib import crc32

from babyllama_ds.corpus.nursery.lexicon import Adjective, Noun, Verb

T = TypeVar("T")


@cache
def is_held_out(first: str, second: str) -> bool:
    """Whether two lemmas are kept apart in training: CRC-32 of `first second` is 0 modulo 10."""
    return crc32(f"{first} {second}".lower().encode()) % 10 == 0


@cache
def held_out_action(subject: Noun, verb: Verb) -> bool:
    """Whether training text never lets this noun do this."""
    return not verb.common and is_held_out(subject.singular, verb.base)


@cache
def held_out_description(adjective: Adjective, noun: Noun) -> bool:
    """Whether training text never calls this noun so."""
    return is_held_out(adjective.base, noun.singular)


@cache
def _zipf(length: int) -> tuple[float, ...]:
    """Cumulative weights 1 / (rank + 2): additions and divisions only, the same everywhere."""
    return tuple(accumulate(1 / (rank + 2) for rank in range(1, length + 1)))


class Draw:
    """Random choices of one scene or task, a pure function of `seed`.

    With `training` set, combinations that are held out are not allowed.
    """

    def __init__(self, seed: str, *, training: bool) -> None:
        self._random = random.Random(seed).random
        self.training = training

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def number(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def even(self, items: Sequence[T]) -> T:
        """One item, all equally likely."""
        return items[int(self._random() * len(items))]

    def pick(self, items: Sequence[T]) -> T:
        """One item, early ones likelier (Zipf's law)."""
        weights = _zipf(len(items))
        return items[bisect(weights, self._random() * weights[-1])]

    def weighted(self, items: Sequence[T], cumulative: Sequence[float]) -> T:
        """One item by cumulative weights."""
        return items[bisect(cumulative, self._random() * cumulative[-1])]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """The items in random order."""
        rest = list(items)
        for last in range(len(rest) - 1, 0, -1):
            other = int(self._random() * (last + 1))
            rest[last], rest[other] = rest[other], rest[last]
        return rest

    def may_do(self, subject: Noun, verb: Verb) -> bool:
        """Whether the subject can do it, and may be seen doing it here."""
        return verb.takes_subject(subject) and not (
            self.training and held_out_action(subject, verb)
        )

    def may_say(self, subject: Noun, verb: Verb) -> bool:
        """Whether the two may stand together here, true or not."""
        return not (self.training and held_out_action(subject, verb))

    def may_be(self, noun: Noun, adjective: Adjective) -> bool:
        """Whether the noun can be so, and may be called so here."""
        return adjective.describes(noun) and not (
            self.training and held_out_description(adjective, noun)
        )
