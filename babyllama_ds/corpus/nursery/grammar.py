"""English clauses: who agrees with what, and what moves where.

Enters: a verb, the pronoun that its subject would take (which fixes person and number), a form.
Leaves: statements, questions, tags, short answers and noun phrases, as text without capitals or
full stops; `sentence` adds those.
"""

from __future__ import annotations

from typing import NamedTuple

from babyllama_ds.corpus.nursery.lexicon import BE, DO, HAVE, Noun, Verb

OBJECT: dict[str, str] = {
    "I": "me", "you": "you", "he": "him", "she": "her", "it": "it", "we": "us", "they": "them",
}  # fmt: skip
POSSESSIVE: dict[str, str] = {
    "I": "my", "you": "your", "he": "his", "she": "her", "it": "its", "we": "our", "they": "their",
}  # fmt: skip
REFLEXIVE: dict[str, str] = {
    "I": "myself", "you": "yourself", "he": "himself", "she": "herself", "it": "itself",
    "we": "ourselves", "they": "themselves",
}  # fmt: skip
NEGATIVE: dict[str, str] = {
    "am": "am not", "is": "isn't", "are": "aren't", "was": "wasn't", "were": "weren't",
    "do": "don't", "does": "doesn't", "did": "didn't", "has": "hasn't", "have": "haven't",
    "can": "can't", "will": "won't",
}  # fmt: skip

_THIRD = ("he", "she", "it")
_VOWELS = "aeiou"


class Finite(NamedTuple):
    """A conjugated verb, its auxiliary apart."""

    auxiliary: str
    """Empty where a plain verb stands alone (runs)."""
    main: str
    """What follows the auxiliary, or the inflected verb itself."""
    support: str
    """The form of do that stands in for a missing auxiliary."""
    bare: str
    """What follows that form of do."""

    @property
    def operator(self) -> str:
        """The word that questions move and negation leans on."""
        return self.auxiliary or self.support

    @property
    def rest(self) -> str:
        """What stays behind the operator."""
        return self.main if self.auxiliary else self.bare


def be(pronoun: str, *, past: bool = False) -> str:
    """The form of be that agrees with the pronoun."""
    if pronoun in _THIRD:
        return "was" if past else "is"
    if pronoun == "I":
        return "was" if past else "am"
    return "were" if past else "are"


def conjugate(verb: Verb, pronoun: str, form: str) -> Finite:
    """The verb as its subject and the form ask; be is its own auxiliary."""
    third = pronoun in _THIRD
    if form == "progressive" or form == "past progressive":
        return Finite(be(pronoun, past=form != "progressive"), verb.gerund, "", "")
    if form == "perfect":
        return Finite(HAVE.third if third else HAVE.base, verb.participle, "", "")
    if form == "can" or form == "will":
        return Finite(form, verb.base, "", "")
    if form == "want":
        return Finite("", f"{'wants' if third else 'want'} to {verb.base}",
                      DO.third if third else DO.base, f"want to {verb.base}")  # fmt: skip
    if form == "wanted":
        return Finite("", f"wanted to {verb.base}", DO.past, f"want to {verb.base}")
    if verb is BE:
        return Finite(be(pronoun, past=form == "past"), "", "", "")
    if form == "past":
        return Finite("", verb.past, DO.past, verb.base)
    main, support = (verb.third, DO.third) if third else (verb.base, DO.base)
    return Finite("", main, support, verb.base)


def join(*words: str) -> str:
    """The words that are there, a space between."""
    return " ".join(word for word in words if word)


def declare(subject: str, verb: Finite, rest: str = "", *, negative: bool = False) -> str:
    """A statement: `Anna doesn't like soup`."""
    if negative:
        return join(subject, NEGATIVE[verb.operator], verb.rest, rest)
    return join(subject, verb.auxiliary, verb.main, rest)


def with_adverb(subject: str, verb: Finite, adverb: str, rest: str = "") -> str:
    """A statement with an adverb at its place: `Anna never runs`, `Anna has never run`."""
    if verb.auxiliary:
        return join(subject, verb.auxiliary, adverb, verb.main, rest)
    return join(subject, adverb, verb.main, rest)


def ask(subject: str, verb: Finite, rest: str = "", *, wh: str = "") -> str:
    """A question with inversion: `does Anna like soup`, `what does Anna like`."""
    return join(wh, verb.operator, subject, verb.rest, rest)


def tag(verb: Finite, pronoun: str, *, negative: bool) -> str:
    """What turns a statement into a question: `doesn't she`; `negative` is the tag's own."""
    operator = verb.operator
    if negative:
        operator = "aren't" if operator == "am" else NEGATIVE[operator]
    return f"{operator} {pronoun}"


def article(phrase: str) -> str:
    """`a` or `an` before the phrase."""
    return f"an {phrase}" if phrase[0] in _VOWELS else f"a {phrase}"


def form_of(noun: Noun, *, plural: bool) -> str:
    """The noun in singular or plural."""
    return noun.plural if plural else noun.singular


def possessive(phrase: str) -> str:
    """`Anna's`, `the girls'`."""
    return f"{phrase}'" if phrase.endswith("s") else f"{phrase}'s"


def sentence(words: str, end: str = ".") -> str:
    """A capital first, the mark last."""
    return f"{words[0].upper()}{words[1:]}{end}"


def quoted(words: str, speaker: str, *, end: str = ".") -> str:
    """Direct speech: `"I want the ball," said Anna.`"""
    comma = "," if end == "." else end
    return f'"{words[0].upper()}{words[1:]}{comma}" said {speaker}.'
