"""Minimal pairs: two sentences that differ in one point of grammar, one of them wrong.

Enters: a task's name, a seed, a number. Leaves: distinct pairs, made by the grammar that also
writes the text. Every task is balanced: its variants take turns, so that no word is right more
often than wrong, and within a pair both sentences have the same number of words. Where a task is
about a subject and its verb, or a noun and its adjective, the two are held out from training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.grammar import (
    NEGATIVE,
    OBJECT,
    REFLEXIVE,
    article,
    be,
    conjugate,
    declare,
    form_of,
    join,
    sentence,
)
from babyllama_ds.corpus.nursery.held_out import Draw, held_out_action, held_out_description
from babyllama_ds.errors import DataError

_PATIENCE = 3_000
"""Draws without a new pair after which a task is taken to have no more."""


class Pair(NamedTuple):
    """A right and a wrong sentence."""

    good: str
    bad: str


Variant = Callable[[Draw], Pair | None]
"""Makes a pair of one kind, or none if the draw does not work out."""


class Task(NamedTuple):
    """One phenomenon."""

    name: str
    term: str
    """BLiMP's `linguistics_term`."""
    field: str
    """BLiMP's `field`."""
    variants: tuple[Variant, ...]
    """Taken in turn, so that the task is balanced."""


class Phrase(NamedTuple):
    """A noun phrase."""

    text: str
    noun: lex.Noun
    pronoun: str


def distinct_pairs(variant: Variant, seed: str) -> Iterator[Pair]:
    """All pairs of a variant, their right sentences different, in an order fixed by the seed.

    Ends when nothing new has come up for a long time.
    """
    draw = Draw(seed, training=False)
    seen: set[str] = set()
    failures = 0
    while failures < _PATIENCE:
        pair = variant(draw)
        failures += 1
        if pair is not None and pair.good not in seen:
            failures = 0
            seen.add(pair.good)
            yield pair


def too_few_pairs(task: Task, found: int, wanted: int) -> DataError:
    """The error for a task that cannot make as many pairs as asked."""
    return DataError.of(
        "corpus.pairs_per_task",
        got=f"{wanted}, but task {task.name} has only {found} distinct pairs",
        expected=f"at most {found}",
        hint=f"set corpus.pairs_per_task={found} or lower",
    )


# -- building blocks ----------------------------------------------------------------------------

_BOY, _GIRL, _BABY, _MAN, _WOMAN, _CHILD = lex.PEOPLE
_GENDERED = (_BOY, _GIRL, _MAN, _WOMAN)
_BASES = lex.FURNITURE
_ROWS = tuple(noun for noun in _BASES if noun.singular in ("tree", "chair", "bed"))
"""Furniture that stands in numbers."""
_HELD_QUALITIES = lex.MOODS + lex.ATTRIBUTES


@cache
def _held_out_verbs(noun: lex.Noun) -> tuple[lex.Verb, ...]:
    """What the noun can do and never does in training text."""
    verbs = lex.INTRANSITIVE + lex.TRANSITIVE
    return tuple(verb for verb in verbs if verb.takes_subject(noun) and held_out_action(noun, verb))


@cache
def _held_out_qualities(noun: lex.Noun) -> tuple[lex.Adjective, ...]:
    """What the noun can be and never is in training text."""
    return tuple(
        quality
        for quality in _HELD_QUALITIES
        if quality.describes(noun) and held_out_description(quality, noun)
    )


_TESTED = tuple(
    noun
    for noun in (*lex.COMMON, *lex.THINGS)
    if _held_out_verbs(noun) or _held_out_qualities(noun)
)


def _pair(good: str, bad: str, end: str = ".") -> Pair:
    return Pair(sentence(good, end), sentence(bad, end))


def _phrase(draw: Draw, noun: lex.Noun, *, plural: bool, adjective: float = 0.3) -> Phrase:
    """`the`, perhaps an adjective, noun."""
    gender = noun.gender or draw.even(("m", "f"))
    pronoun = "they" if plural else {"m": "he", "f": "she", "n": "it"}[gender]
    if noun.is_name:
        return Phrase(noun.singular, noun, pronoun)
    words = form_of(noun, plural=plural)
    fitting = [quality for quality in lex.ATTRIBUTES if quality.describes(noun)]
    if fitting and draw.chance(adjective):
        words = f"{draw.even(fitting).base} {words}"
    return Phrase(f"the {words}", noun, pronoun)


def _someone(draw: Draw, *, plural: bool = False, gender: str = "") -> Phrase:
    """A person: a name if singular, else a common noun, of known gender."""
    if not plural and draw.chance(0.6):
        names = [name for name in lex.NAMES if gender in ("", name.gender)]
        return _phrase(draw, draw.even(names), plural=False)
    nouns = [noun for noun in _GENDERED if gender in ("", noun.gender)]
    return _phrase(draw, draw.even(nouns), plural=plural)


def _doer(draw: Draw, verb: lex.Verb, *, plural: bool = False) -> Phrase:
    """Someone who can do it."""
    while True:
        one = _someone(draw, plural=plural)
        if verb.takes_subject(one.noun):
            return one


def _object(draw: Draw, verb: lex.Verb, *, plural: bool | None = None) -> Phrase | None:
    """Something that it can be done to."""
    nouns = [noun for noun in (*lex.THINGS, *lex.FOODS, *lex.ANIMALS) if verb.takes_object(noun)]
    if not nouns:
        return None
    many = draw.chance(0.5) if plural is None else plural
    return _phrase(draw, draw.even(nouns), plural=many)


def _place(draw: Draw) -> str:
    """`in the garden`, `near the table`, or nothing."""
    if draw.chance(0.4):
        return f"in the {draw.even(lex.PLACES).singular}"
    if draw.chance(0.6):
        if draw.chance(0.3):
            return f"near the {draw.even(_ROWS).plural}"
        return f"near the {draw.even(_BASES).singular}"
    return ""


def _third(*, plural: bool) -> str:
    return "they" if plural else "it"


class _Predicate(NamedTuple):
    """A verb phrase that agrees, to be put behind either number."""

    verb: lex.Verb
    form: str
    rest: str

    def text(self, *, plural: bool) -> str:
        return declare("", conjugate(self.verb, _third(plural=plural), self.form), self.rest)


_MOMENTS = (
    lex.FIND, lex.SEE, lex.TAKE, lex.THROW, lex.CATCH, lex.LOSE, lex.BREAK, lex.OPEN, lex.FALL,
    lex.HURT,
)  # fmt: skip
"""What is over as soon as it happens, and so is never going on."""
_NO_PERFECT = (lex.FALL, lex.DRAW, lex.SWIM, lex.SING, lex.FLY, lex.RIDE, lex.BITE, lex.SLEEP)
"""Verbs whose perfect is rare in the text."""


def _agreeing_forms(verb: lex.Verb) -> tuple[str, ...]:
    """The forms that show agreement and are in use."""
    going = () if verb in _MOMENTS else ("progressive", "past progressive")
    return ("present", *going, *(() if verb in _NO_PERFECT else ("perfect",)))


def _predicate(draw: Draw, noun: lex.Noun) -> _Predicate | None:
    """A predicate whose verb or adjective is held out with the noun."""
    verbs, qualities = _held_out_verbs(noun), _held_out_qualities(noun)
    if qualities and (not verbs or draw.chance(0.5)):
        tense = draw.even(("present", "past"))
        return _Predicate(lex.BE, tense, draw.even(qualities).base)
    if not verbs:
        return None
    verb = draw.even(verbs)
    rest = _place(draw) if verb in lex.INTRANSITIVE else None
    if rest is None:
        thing = _object(draw, verb)
        if thing is None:
            return None
        rest = thing.text
    return _Predicate(verb, draw.even(_agreeing_forms(verb)), rest)


def _agreement(subject: str, predicate: _Predicate, *, plural: bool) -> Pair:
    return _pair(
        join(subject, predicate.text(plural=plural)),
        join(subject, predicate.text(plural=not plural)),
    )


# -- reflexives ---------------------------------------------------------------------------------

_SELF_VERBS = ((lex.WASH, ""), (lex.SEE, ""), (lex.LOOK, "at"), (lex.HURT, ""), (lex.DRAW, ""))


def _itself(draw: Draw, subject: Phrase, *, past: bool) -> tuple[str, str] | None:
    """What the subject does to itself, before and after the reflexive."""
    verb, link = draw.even(_SELF_VERBS)
    if not verb.takes_subject(subject.noun):
        return None
    form = "past" if past else draw.even(("past", "will", *_agreeing_forms(verb)))
    tail = "in the water" if verb is lex.SEE else _place(draw)
    return declare("", conjugate(verb, subject.pronoun, form), link), tail


def _distracted(draw: Draw, subject: Phrase, other: Phrase) -> str:
    """The subject with another person between it and its verb."""
    if subject.noun.is_name:
        verb = draw.even((lex.HUG, lex.HELP, lex.CHASE, lex.SEE))
        if not verb.takes_subject(subject.noun):
            verb = lex.HUG
        return f"{subject.text} {verb.past} {other.text} and"
    if draw.chance(0.5):
        return f"{subject.text} {draw.even(('near', 'behind'))} {other.text}"
    verb = draw.even((lex.HUG, lex.HELP, lex.SEE))
    return f"{subject.text} who {verb.past} {other.text}"


def _gender(gender: str) -> Variant:
    def make(draw: Draw) -> Pair | None:
        subject = _someone(draw, gender=gender)
        other = _someone(draw, gender="m" if gender == "f" else "f")
        distracted = draw.chance(0.5)
        action = _itself(draw, subject, past=distracted and subject.noun.is_name)
        if action is None:
            return None
        before, after = action
        text = _distracted(draw, subject, other) if distracted else subject.text
        right, wrong = REFLEXIVE[subject.pronoun], REFLEXIVE[other.pronoun]
        return _pair(join(text, before, right, after), join(text, before, wrong, after))

    return make


def _reflexive_number(*, plural: bool) -> Variant:
    def make(draw: Draw) -> Pair | None:
        subject = _someone(draw, plural=plural)
        other = _someone(draw, plural=not plural)
        distracted = draw.chance(0.5)
        action = _itself(draw, subject, past=distracted and subject.noun.is_name)
        if action is None:
            return None
        before, after = action
        text = _distracted(draw, subject, other) if distracted else subject.text
        one = {"m": "himself", "f": "herself"}[subject.noun.gender]
        right, wrong = ("themselves", one) if plural else (one, "themselves")
        return _pair(join(text, before, right, after), join(text, before, wrong, after))

    return make


# -- agreement ----------------------------------------------------------------------------------

_DETERMINERS = {
    False: ("this", "that", "a"),
    True: ("these", "those", "two", "three", "four", "many"),
}


def _determiner(*, plural: bool) -> Variant:
    def make(draw: Draw) -> Pair | None:
        verb = draw.even((lex.TAKE, lex.WANT, lex.FIND, lex.HOLD, lex.HAVE, lex.LIKE))
        nouns = [noun for noun in (*lex.THINGS, *lex.FOODS) if verb.takes_object(noun)]
        noun = draw.even(nouns)
        subject = _doer(draw, verb, plural=draw.chance(0.5))
        fitting = _held_out_qualities(noun)
        adjective = draw.even(fitting).base if fitting and draw.chance(0.6) else ""
        word = draw.even(_DETERMINERS[plural])
        form = draw.even(("past", "present"))
        start = declare(subject.text, conjugate(verb, subject.pronoun, form))
        tail = _place(draw) if verb is lex.FIND else ""
        if word == "a" and (adjective or noun.singular)[0] in "aeiou":
            word = "an"
        right, wrong = (form_of(noun, plural=many) for many in (plural, not plural))
        return _pair(
            join(start, word, adjective, right, tail), join(start, word, adjective, wrong, tail)
        )

    return make


def _subject_verb(*, plural: bool) -> Variant:
    def make(draw: Draw) -> Pair | None:
        noun = draw.even(_TESTED)
        predicate = _predicate(draw, noun)
        if predicate is None:
            return None
        subject = _phrase(draw, noun, plural=plural)
        if predicate.rest and predicate.rest in subject.text.split():
            return None  # the new bowls were new
        return _agreement(subject.text, predicate, plural=plural)

    return make


def _across_pp(*, plural: bool) -> Variant:
    def make(draw: Draw) -> Pair | None:
        noun = draw.even(_TESTED)
        predicate = _predicate(draw, noun)
        if predicate is None:
            return None
        subject = _phrase(draw, noun, plural=plural, adjective=0.2)
        pool = (*(_BASES if plural else _ROWS), *lex.ANIMALS, *lex.PEOPLE)
        attractor = draw.even([other for other in pool if other is not noun])
        between = _phrase(draw, attractor, plural=not plural, adjective=0.2)
        link = draw.even(("near", "behind"))
        return _agreement(f"{subject.text} {link} {between.text}", predicate, plural=plural)

    return make


_RELATIVE_VERBS = (lex.SEE, lex.CHASE, lex.HUG, lex.FIND, lex.TAKE, lex.HELP, lex.HOLD)


def _across_relative(*, plural: bool) -> Variant:
    def make(draw: Draw) -> Pair | None:
        noun = draw.even(_TESTED)
        predicate = _predicate(draw, noun)
        verb = draw.even(_RELATIVE_VERBS)
        if predicate is None:
            return None
        subject = _phrase(draw, noun, plural=plural, adjective=0.2)
        people = "person" in noun.kinds
        if draw.chance(0.5) and verb.takes_object(noun):
            agent = _doer(draw, verb, plural=not plural)
            relative = f"that {agent.text} {verb.past}"
        else:
            thing = _object(draw, verb, plural=not plural)
            if thing is None or thing.noun is noun or not verb.takes_subject(noun):
                return None
            link = draw.even(("who", "that")) if people else "that"
            relative = f"{link} {verb.past} {thing.text}"
        return _agreement(f"{subject.text} {relative}", predicate, plural=plural)

    return make


def _existential(*, plural: bool) -> Variant:
    def make(draw: Draw) -> Pair | None:
        noun = draw.even((*lex.THINGS, *lex.FOODS, *lex.ANIMALS))
        qualities = _held_out_qualities(noun) or tuple(
            quality for quality in lex.ATTRIBUTES if quality.describes(noun)
        )
        words = form_of(noun, plural=plural)
        if qualities and draw.chance(0.6):
            words = f"{draw.even(qualities).base} {words}"
        count = draw.even(("two", "three", "four", "some", "many"))
        phrase = f"{count} {words}" if plural else article(words)
        place = _place(draw)
        if not place:
            return None
        past = draw.chance(0.5)
        right, wrong = (be(_third(plural=many), past=past) for many in (plural, not plural))
        if draw.chance(0.25) and plural:
            right, wrong = NEGATIVE[right], NEGATIVE[wrong]
            phrase = f"any {words}"
        return _pair(f"there {right} {phrase} {place}", f"there {wrong} {phrase} {place}")

    return make


# -- verb forms ---------------------------------------------------------------------------------

_IRREGULAR = (lex.EAT, lex.TAKE, lex.SEE, lex.THROW, lex.BREAK, lex.HIDE, lex.DRINK)


def _past_object(draw: Draw, verb: lex.Verb) -> str:
    if verb is lex.DRINK:
        return f"the {draw.even(('milk', 'water', 'juice'))}"
    thing = _object(draw, verb)
    assert thing is not None
    return thing.text


def _simple_past(draw: Draw) -> Pair | None:
    verb = draw.even(_IRREGULAR)
    subject = _doer(draw, verb, plural=draw.chance(0.4)).text
    thing, place = _past_object(draw, verb), _place(draw)
    return _pair(
        join(subject, verb.past, thing, place), join(subject, verb.participle, thing, place)
    )


def _participle(draw: Draw) -> Pair | None:
    verb = draw.even(_IRREGULAR)
    place = _place(draw)
    if verb is not lex.DRINK and draw.chance(0.4):
        thing = _object(draw, verb)
        assert thing is not None
        were = be(thing.pronoun, past=True)
        start, end = f"{thing.text} {were}", f"by {_doer(draw, verb, plural=draw.chance(0.4)).text}"
    else:
        one = _doer(draw, verb, plural=draw.chance(0.4))
        have = conjugate(verb, one.pronoun, "perfect").auxiliary
        start, end = f"{one.text} {have}", _past_object(draw, verb)
    return _pair(join(start, verb.participle, end, place), join(start, verb.past, end, place))


def _do_support(draw: Draw) -> Pair | None:
    """`Anna doesn't want the ball`, not `doesn't wants`."""
    verb, subject, rest = _plain(draw)
    form = draw.even(("present", "past"))
    finite = conjugate(verb, subject.pronoun, form)
    no = NEGATIVE[finite.support]
    return _pair(
        join(subject.text, no, finite.bare, rest), join(subject.text, no, finite.main, rest)
    )


def _never(draw: Draw) -> Pair | None:
    """`Anna never wants the ball`, not `never want`."""
    verb, subject, rest = _plain(draw)
    finite = conjugate(verb, subject.pronoun, draw.even(("present", "past")))
    word = draw.even(("never", "always"))
    return _pair(
        join(subject.text, word, finite.main, rest), join(subject.text, word, finite.bare, rest)
    )


_PLAIN = (lex.EAT, lex.SEE, lex.FIND, lex.TAKE, lex.WEAR, lex.DRINK, lex.CHASE, lex.WASH, lex.MAKE)
_ALONE = (lex.RUN, lex.SLEEP, lex.PLAY, lex.JUMP, lex.WALK, lex.LAUGH, lex.SWIM, lex.SING)


def _plain(draw: Draw) -> tuple[lex.Verb, Phrase, str]:
    """A verb, a singular subject, and the rest of a clause."""
    if draw.chance(0.4):
        verb = draw.even(_ALONE)
        return verb, _doer(draw, verb), _place(draw)
    verb = draw.even(_PLAIN)
    return verb, _doer(draw, verb), _past_object(draw, verb)


# -- questions and gaps -------------------------------------------------------------------------

_STRICT = (lex.FIND, lex.HOLD, lex.THROW, lex.TAKE, lex.WEAR, lex.CHASE, lex.CARRY)
"""Verbs that cannot do without their object."""


_GOING_NOW, _GOING_THEN = "progressive", "past progressive"


def _asked(draw: Draw, forms: tuple[str, ...]) -> tuple[Phrase, lex.Verb, str]:
    """Someone, what they do, and in which of the forms."""
    usable = [
        (verb, form)
        for verb in _STRICT
        for form in forms
        if form not in _GOING or verb not in _MOMENTS
    ]
    verb, form = draw.even(usable)
    return _doer(draw, verb, plural=draw.chance(0.4)), verb, form


_GOING = (_GOING_NOW, _GOING_THEN)
_THEN = ("past", _GOING_THEN)


def _wh(verb: lex.Verb) -> str:
    return "who" if verb is lex.CHASE else "what"


def _main_question(draw: Draw) -> Pair | None:
    """`What is Anna holding?`, not `What Anna is holding?`"""
    one, verb, form = _asked(draw, (*_GOING, "can", "will"))
    finite, place = conjugate(verb, one.pronoun, form), _place(draw)
    wh = _wh(verb)
    return _pair(
        join(wh, finite.auxiliary, one.text, finite.main, place),
        join(wh, one.text, finite.auxiliary, finite.main, place),
        "?",
    )


def _knower(draw: Draw, besides: Phrase, tense: str) -> str | None:
    """`Mommy knows`."""
    one = _someone(draw, plural=draw.chance(0.3))
    if one.noun is besides.noun:
        return None
    verb = draw.even((lex.KNOW, lex.SEE))
    return declare(one.text, conjugate(verb, one.pronoun, tense))


def _embedded_question(draw: Draw) -> Pair | None:
    """`Mommy knows what Anna is holding`, not `what is Anna holding`."""
    tense = draw.even(("present", "past"))
    forms = (_GOING_NOW, "can", "will") if tense == "present" else (_GOING_THEN,)
    one, verb, form = _asked(draw, forms)
    start = _knower(draw, one, tense)
    if start is None:
        return None
    finite, place = conjugate(verb, one.pronoun, form), _place(draw)
    start = f"{start} {_wh(verb)}"
    return _pair(
        join(start, one.text, finite.auxiliary, finite.main, place),
        join(start, finite.auxiliary, one.text, finite.main, place),
    )


def _which_auxiliary(first: str) -> Variant:
    """`Is the boy who can swim happy?`, not `Can the boy who swim is happy?`, or reversed."""

    def make(draw: Draw) -> Pair | None:
        noun = draw.even((*_GENDERED, _CHILD))
        plural = draw.chance(0.4)
        head = _phrase(draw, noun, plural=plural, adjective=0.2).text
        skill = draw.even((lex.SWIM, lex.SING, lex.JUMP, lex.RUN, lex.WALK))
        if not skill.takes_subject(noun):
            return None
        mood, are = draw.even(lex.MOODS).base, be(_third(plural=plural))
        place = _place(draw)
        if first == "be":
            good = join(are, head, "who can", skill.base, place, mood)
            bad = join("can", head, "who", skill.base, place, are, mood)
        else:
            good = join("can", head, "who", are, mood, skill.base, place)
            bad = join(are, head, "who", mood, "can", skill.base, place)
        return _pair(good, bad, "?")

    return make


def _gap(word: str) -> Variant:
    """`Mommy knows what Anna found` and `... that Anna found the ball`, not the other way."""

    def make(draw: Draw) -> Pair | None:
        tense = draw.even(("present", "past"))
        one, verb, form = _asked(draw, ("past", _GOING_NOW) if tense == "present" else _THEN)
        start = _knower(draw, one, tense)
        thing = _object(draw, verb)
        if start is None or thing is None:
            return None
        between = f" {draw.even(('near', 'behind'))} {_someone(draw).text}"
        subject = one.text
        if not one.noun.is_name and draw.chance(0.5):
            subject += between
        clause = declare(subject, conjugate(verb, one.pronoun, form))
        place = _place(draw)
        wh = _wh(verb)
        if word == "that":
            rest = join(clause, thing.text, place)
            return _pair(f"{start} that {rest}", f"{start} {wh} {rest}")
        rest = join(clause, place)
        return _pair(f"{start} {wh} {rest}", f"{start} that {rest}")

    return make


# -- negative polarity --------------------------------------------------------------------------


def _any(draw: Draw, verb: lex.Verb) -> str:
    nouns = [noun for noun in (*lex.FOODS, *lex.THINGS, *lex.MASS) if verb.takes_object(noun)]
    noun = draw.even(nouns)
    return f"any {noun.plural or noun.singular}"


def _scope_of_relative(draw: Draw) -> Pair | None:
    """`The boy who is sad isn't eating any soup`: the negation must not hide in the relative."""
    noun = draw.even((*_GENDERED, _CHILD))
    plural = draw.chance(0.4)
    head = _phrase(draw, noun, plural=plural).text
    link = draw.even(("who", "who", "that"))
    are = be(_third(plural=plural), past=draw.chance(0.4))
    if draw.chance(0.6):
        verb = draw.even((lex.EAT, lex.DRINK, lex.WEAR, lex.MAKE, lex.HOLD))
        inner, outer, yes = draw.even(lex.MOODS).base, f"{verb.gerund} {_any(draw, verb)}", are
    else:
        verb = draw.even((lex.FIND, lex.SEE, lex.TAKE, lex.MAKE))
        skill = draw.even((lex.SWIM, lex.SING, lex.JUMP))
        if not skill.takes_subject(noun):
            return None
        inner, outer, yes = skill.base, f"{verb.base} {_any(draw, verb)}", "can"
    no = NEGATIVE[yes]
    return _pair(join(head, link, yes, inner, no, outer), join(head, link, no, inner, yes, outer))


def _scope_of_clause(draw: Draw) -> Pair | None:
    """`Anna can't find any socks, but Tom can`, not the other way round."""
    verb = draw.even((lex.FIND, lex.SEE, lex.TAKE, lex.MAKE, lex.EAT))
    one, other = _someone(draw, plural=draw.chance(0.3)), _someone(draw, plural=draw.chance(0.3))
    if one.noun is other.noun:
        return None
    yes = draw.even(("can", "will"))
    no, rest = NEGATIVE[yes], f"{verb.base} {_any(draw, verb)}"
    return _pair(
        f"{one.text} {no} {rest}, but {other.text} {yes}",
        f"{one.text} {yes} {rest}, but {other.text} {no}",
    )


def _everybody(draw: Draw) -> Pair | None:
    """`Nobody wants any soup, but everybody wants some cake`, not the other way round."""
    verb, form = draw.even(((lex.WANT, "present"), (lex.WANT, "past"), (lex.HAVE, "present"),
                            (lex.HAVE, "past"), (lex.EAT, "past"), (lex.FIND, "past")))  # fmt: skip
    main = conjugate(verb, "it", form).main
    first, second = _any(draw, verb), _any(draw, verb).removeprefix("any ")
    if first.endswith(second):
        return None
    good = f"nobody {main} {first}, but everybody {main} some {second}"
    bad = f"everybody {main} {first}, but nobody {main} some {second}"
    if draw.chance(0.5):
        good = f"everybody {main} some {second}, but nobody {main} {first}"
        bad = f"nobody {main} some {second}, but everybody {main} {first}"
    return _pair(good, bad)


# -- pronouns and meaning -----------------------------------------------------------------------

_CASE_VERBS = (lex.SEE, lex.CHASE, lex.HUG, lex.HELP)
_OPENINGS = ("then", "one day")
_CASES = ("he", "she", "they")


def _subject_case(draw: Draw) -> Pair | None:
    """`Then he saw Anna`, not `Then him saw Anna`; also in an embedded clause."""
    pronoun = draw.even(_CASES)
    verb = draw.even(_CASE_VERBS)
    other = _someone(draw, plural=draw.chance(0.3))
    rest = join(verb.past, other.text, _place(draw))
    start: str | None = draw.even(_OPENINGS)
    if draw.chance(0.7):
        start = _knower(draw, other, draw.even(("present", "past")))
    if start is None:
        return None
    that = start if start in _OPENINGS else f"{start} that"
    return _pair(join(that, pronoun, rest), join(that, OBJECT[pronoun], rest))


def _object_case(draw: Draw) -> Pair | None:
    """`Anna saw him`, not `Anna saw he`."""
    pronoun = draw.even(_CASES)
    one = _someone(draw, plural=draw.chance(0.3))
    if draw.chance(0.3):
        thing = _object(draw, lex.THROW)
        assert thing is not None
        start, tail = f"{one.text} {lex.GIVE.past} {thing.text} to", ""
        if thing.pronoun == pronoun:
            return None
    else:
        verb = draw.even(_CASE_VERBS)
        going = () if verb in _MOMENTS else _GOING
        form = draw.even(("past", "will", *going))
        start, tail = declare(one.text, conjugate(verb, one.pronoun, form)), _place(draw)
    return _pair(join(start, OBJECT[pronoun], tail), join(start, pronoun, tail))


_ROLES = (lex.THROW, lex.PUSH, lex.WEAR, lex.READ, lex.TAKE, lex.FIND, lex.HOLD, lex.CARRY,
          lex.EAT, lex.WASH, lex.BREAK, lex.BITE)  # fmt: skip


def _role_swap(draw: Draw) -> Pair | None:
    """`The boy threw the ball`, not `The ball threw the boy`."""
    verb = draw.even(_ROLES)
    thing = _object(draw, verb)
    pool = [noun for noun in lex.COMMON if verb.takes_subject(noun)]
    if thing is None or "animal" in thing.noun.kinds:
        return None
    one = _phrase(draw, draw.even(pool), plural=draw.chance(0.4))
    place = _place(draw)
    form = draw.even(("past", "will", "past"))
    main = declare("", conjugate(verb, one.pronoun, form))
    return _pair(join(one.text, main, thing.text, place), join(thing.text, main, one.text, place))


_TWO_VERBS = tuple(
    (first, second)
    for first in (lex.EAT, lex.WEAR, lex.READ, lex.PUSH)
    for second in (lex.EAT, lex.WEAR, lex.READ, lex.PUSH)
    if first is not second
)  # fmt: skip


def _object_swap(draw: Draw) -> Pair | None:
    """`Tom ate the apple and wore the hat`, not `Tom ate the hat and wore the apple`."""
    first, second = draw.even(_TWO_VERBS)
    thing, other = _object(draw, first), _object(draw, second)
    one = _doer(draw, first, plural=draw.chance(0.3))
    two = _doer(draw, second, plural=draw.chance(0.3))
    if thing is None or other is None or one.noun is two.noun:
        return None
    if second.takes_object(thing.noun) or first.takes_object(other.noun):
        return None
    form = draw.even(("progressive", "past progressive"))
    start = declare(one.text, conjugate(first, one.pronoun, form))
    link = f"and {declare(two.text, conjugate(second, two.pronoun, form))}"
    return _pair(
        join(start, thing.text, link, other.text), join(start, other.text, link, thing.text)
    )


# -- the tasks ----------------------------------------------------------------------------------

TASKS = (
    Task("anaphor_gender_agreement", "anaphor_agreement", "morphology",
         (_gender("f"), _gender("m"))),
    Task("anaphor_number_agreement", "anaphor_agreement", "morphology",
         (_reflexive_number(plural=False), _reflexive_number(plural=True))),
    Task("determiner_noun_agreement", "determiner_noun_agreement", "morphology",
         (_determiner(plural=False), _determiner(plural=True))),
    Task("subject_verb_agreement", "subject_verb_agreement", "morphology",
         (_subject_verb(plural=False), _subject_verb(plural=True))),
    Task("agreement_across_pp", "subject_verb_agreement", "morphology",
         (_across_pp(plural=False), _across_pp(plural=True))),
    Task("agreement_across_relative_clause", "subject_verb_agreement", "morphology",
         (_across_relative(plural=False), _across_relative(plural=True))),
    Task("existential_there_agreement", "subject_verb_agreement", "morphology",
         (_existential(plural=False), _existential(plural=True))),
    Task("irregular_past_forms", "irregular_forms", "morphology", (_simple_past, _participle)),
    Task("negation_do_support", "verb_form", "morphology", (_do_support, _never)),
    Task("npi_licensing", "npi_licensing", "semantics",
         (_scope_of_relative, _scope_of_clause, _everybody)),
    Task("question_inversion", "subject_aux_inversion", "syntax",
         (_main_question, _embedded_question, _which_auxiliary("be"), _which_auxiliary("can"))),
    Task("wh_gap", "filler_gap_dependency", "syntax", (_gap("that"), _gap("what"))),
    Task("pronoun_case", "pronoun_case", "morphology", (_subject_case, _object_case)),
    Task("selectional_animacy", "selectional_restriction", "semantics",
         (_role_swap, _object_swap)),
)  # fmt: skip
"""Every phenomenon that is tested."""
