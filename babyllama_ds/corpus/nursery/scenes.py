"""Scenes: a small cast, a place, a few things, and 5 to 12 sentences that hang together.

Enters: a seed and whether held-out combinations are allowed. Leaves: one scene as one line of
text. A theme decides who is there and what is likely to happen; the rest follows from the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from babyllama_ds.corpus.nursery import events, questions, remarks
from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.grammar import join
from babyllama_ds.corpus.nursery.held_out import Draw
from babyllama_ds.corpus.nursery.story import Entity, Spot, Story, Style, indefinite, kind_of

Move = Callable[[Story], bool]

MIN_SENTENCES, MAX_SENTENCES = 5, 12
_TRIES = 200


@dataclass(frozen=True)
class Theme:
    """What a kind of scene is made of."""

    weight: float
    children: tuple[int, int]
    adults: tuple[int, int]
    animals: tuple[int, int]
    things: tuple[lex.Noun, ...]
    num_things: tuple[int, int]
    indoors: float
    """Probability that it happens inside."""
    room: str
    """Where inside; empty: any room."""
    events: tuple[tuple[Move, float], ...]

    @cached_property
    def moves(self) -> tuple[tuple[Move, ...], tuple[float, ...]]:
        """Everything that can happen or be said, with cumulative weights."""
        talk = sum(weight for _, weight in _TALK)
        action = sum(weight for _, weight in self.events)
        scaled = [(move, _TALK_SHARE * weight / talk) for move, weight in _TALK]
        scaled += [(move, (1 - _TALK_SHARE) * weight / action) for move, weight in self.events]
        return tuple(move for move, _ in scaled), tuple(accumulate(weight for _, weight in scaled))


def tell_scene(seed: str, *, training: bool) -> str:
    """The scene of this seed: sentences separated by single spaces, no line break.

    With `training` set, no held-out combination occurs in it.
    """
    draw = Draw(seed, training=training)
    theme = draw.weighted(THEMES, _THEME_WEIGHTS)
    story = set_up(draw, theme)
    length = draw.number(MIN_SENTENCES + 1, MAX_SENTENCES - 1)
    open_scene(story)
    moves, weights = theme.moves
    used: list[Move] = []
    for _ in range(_TRIES):
        if len(story.sentences) >= length:
            break
        move = draw.weighted(moves, weights)
        if used.count(move) < _REPEATS.get(move, 1) and move(story):
            used.append(move)
    if draw.chance(0.2):
        close_scene(story)
    return " ".join(story.sentences[:MAX_SENTENCES])


# -- setting up ---------------------------------------------------------------------------------


def set_up(draw: Draw, theme: Theme) -> Story:
    """Cast, place, furniture and things of a scene, nothing told yet."""
    indoors = draw.chance(theme.indoors)
    places = [place for place in lex.PLACES if ("indoors" in place.kinds) == indoors]
    if indoors and theme.room:
        places = [place for place in places if place.singular == theme.room]
    story = Story(draw, draw.pick(places), theme.things, draw.weighted(_STYLES, _STYLE_WEIGHTS))
    _add_people(story, draw.number(*theme.children), "child")
    _add_people(story, draw.number(*theme.adults), "adult")
    for _ in range(draw.number(*theme.animals)):
        story.actors.append(_animal(story))
    if not indoors and draw.chance(0.5):
        story.offstage = _animal(story)
    _add_furniture(story, indoors)
    _add_things(story, theme)
    for one in story.actors:
        mood = draw.pick(lex.MOODS)
        if draw.chance(0.4) and draw.may_be(one.noun, mood):
            one.mood = mood
    return story


def _add_people(story: Story, number: int, kind: str) -> None:
    draw = story.draw
    for _ in range(number):
        taken = {one.noun for one in story.actors}
        if draw.chance(0.6):
            pool = [noun for noun in lex.NAMES if kind in noun.kinds and noun not in taken]
        else:
            pool = [
                noun
                for noun in lex.PEOPLE
                if (kind in noun.kinds or (kind == "child" and "infant" in noun.kinds))
                and noun not in taken
            ]
        owner = next((one for one in story.actors if one.noun.is_name), None)
        if kind == "child" and owner is not None and owner.is_a("child") and draw.chance(0.15):
            noun = draw.pick(lex.KIN)
            story.actors.append(Entity(noun, _pronoun(draw, noun), owner=owner, known=True))
            continue
        noun = draw.pick(pool)
        if not noun.is_name and draw.chance(0.45):
            story.actors.append(Entity(noun, "they", count=_count(draw)))
        else:
            story.actors.append(Entity(noun, _pronoun(draw, noun), known=noun.is_name))


def _pronoun(draw: Draw, noun: lex.Noun) -> str:
    gender = noun.gender or draw.even(("m", "f"))
    return {"m": "he", "f": "she", "n": "it"}[gender]


def _count(draw: Draw) -> str:
    return draw.pick(("two", "some", "three", "many", "four"))


def _animal(story: Story) -> Entity:
    draw = story.draw
    taken = {one.noun for one in story.actors}
    indoors = "indoors" in story.place.kinds
    fitting = [noun for noun in lex.ANIMALS if not indoors or noun.kinds & {"pet", "house"}]
    noun = draw.pick([noun for noun in fitting if noun not in taken])
    plural = draw.chance(0.4)
    one = Entity(noun, "they" if plural else _pronoun(draw, noun))
    one.count = _count(draw) if plural else ""
    one.adjective = _adjective(draw, noun)
    return one


def _adjective(draw: Draw, noun: lex.Noun, *, other_than: lex.Adjective | None = None) -> (
    lex.Adjective | None
):  # fmt: skip
    fitting = [
        quality
        for quality in lex.ATTRIBUTES
        if quality is not other_than and draw.may_be(noun, quality)
    ]
    return draw.pick(draw.shuffled(fitting)[:4]) if fitting else None


def _add_furniture(story: Story, indoors: bool) -> None:
    draw = story.draw
    table, bed, tree, chair, door = lex.FURNITURE
    around: tuple[lex.Noun, ...] = (tree, table, chair, door)
    if indoors:
        around = (bed, chair, door) if story.place.singular == "bedroom" else (table, chair, door)
    nouns = [draw.pick(around), draw.even(around)]
    if draw.chance(0.5):
        nouns.append(draw.even(lex.CONTAINERS))
    for noun in dict.fromkeys(nouns):
        plural = ("climbable" in noun.kinds or noun.singular in ("chair", "bed")) and draw.chance(
            0.3
        )
        story.furniture.append(Entity(noun, "they" if plural else "it", known=True))


def _add_things(story: Story, theme: Theme) -> None:
    draw = story.draw
    people = [one for one in story.actors if one.is_a("person")]
    owners = [one for one in people if not one.plural]
    for _ in range(draw.number(*theme.num_things)):
        taken = {it.noun for it in story.things}
        noun = draw.pick([noun for noun in theme.things if noun not in taken])
        thing = _thing(story, noun)
        story.things.append(thing)
        if owners and draw.chance(0.35):
            thing.owner = draw.even(owners)
        if people and draw.chance(0.3):
            thing.holder = thing.owner or draw.even(people)
        else:
            thing.spot = _spot(story)
        if thing.adjective is not None and draw.chance(0.2):
            _add_twin(story, thing)


def _thing(story: Story, noun: lex.Noun) -> Entity:
    draw = story.draw
    plural = bool(noun.plural) and draw.chance(0.35)
    thing = Entity(noun, "they" if plural else "it")
    thing.count = _count(draw) if plural else ""
    thing.adjective = _adjective(draw, noun)
    return thing


def _add_twin(story: Story, thing: Entity) -> None:
    """Another of the same noun that only its adjective tells apart."""
    adjective = _adjective(story.draw, thing.noun, other_than=thing.adjective)
    if adjective is None or not thing.noun.plural:
        return
    twin = Entity(thing.noun, "it", adjective=adjective, spot=_spot(story))
    story.things.append(twin)


def _spot(story: Story) -> Spot | None:
    draw = story.draw
    base = draw.even(story.furniture)
    if base.is_a("container"):
        preposition = draw.pick(("in", "near"))
    elif base.is_a("top"):
        preposition = draw.pick(("on", "under", "near"))
    else:
        preposition = draw.pick(("under", "near") if base.is_a("tall") else ("near", "behind"))
    return Spot(preposition, base)


# -- opening ------------------------------------------------------------------------------------


def open_scene(story: Story) -> None:
    """The first one to three sentences: who is there, where, with what."""
    draw = story.draw
    here = f"in the {story.place.singular}"
    first = story.actors[0]
    pair = story.pair()
    if pair is not None and draw.chance(0.4):
        story.emit(join(_once(story), story.being(pair, here)))
    elif story.past and draw.chance(0.4):
        tail = f"to the {story.place.singular}"
        story.emit(join("one day", story.clause(first, lex.GO, tail, form="past")))
    elif first.noun.is_name:
        _open_with_name(story, first, here)
    else:
        noun = story.noun_phrase(first, adjective=draw.chance(0.5))
        story.mention(first)
        story.emit(f"there {story.be(first)} {indefinite(first, noun)} {here}")
    if draw.chance(0.5):
        _bring_in(story, here)


def _once(story: Story) -> str:
    return "one day" if story.past and story.draw.chance(0.3) else ""


def _open_with_name(story: Story, first: Entity, here: str) -> None:
    draw = story.draw
    if not story.past and draw.chance(0.25):
        story.mention(first)
        story.emit(f"where is {first.noun.singular}", "?")
    elif not story.past and draw.chance(0.25):
        noun = kind_of(first).singular
        little = draw.may_be(kind_of(first), lex.LITTLE) and first.is_a("child")
        story.mention(first)
        story.emit(f"this is {first.noun.singular}")
        story.mention(first)
        story.emit(join(first.pronoun, "is a", "little" if little else "", noun))
        return
    story.emit(story.being(first, here))


def _bring_in(story: Story, here: str) -> None:
    """Introduce an animal, or something that someone has."""
    draw = story.draw
    too = ", too" if here in story.sentences[-1] else ""
    animal = story.actor(lambda one: one.is_a("animal") and not one.known)
    if animal is not None:
        noun = story.noun_phrase(animal, adjective=draw.chance(0.7))
        story.mention(animal)
        if story.past or draw.chance(0.6):
            story.emit(f"there {story.be(animal)} {indefinite(animal, noun)} {here}{too}")
        else:
            story.emit(f"look, there {story.be(animal)} {indefinite(animal, noun)}", "!")
        return
    thing = story.thing(lambda it: it.holder is not None)
    if thing is not None and thing.holder is not None:
        noun = story.noun_phrase(thing, adjective=draw.chance(0.6))
        story.emit(story.clause(thing.holder, lex.HAVE, indefinite(thing, noun)))
        thing.known = True


def close_scene(story: Story) -> None:
    """A last sentence: everybody is happy, or goes to bed."""
    draw = story.draw
    if draw.chance(0.3):
        word = draw.even(("everybody", "nobody"))
        mood = "happy" if word == "everybody" else "sad"
        story.emit(f"now {word} {'was' if story.past else 'is'} {mood}")
        return
    one = story.pair() or story.actors[0]
    if not story.past and one.noun.is_name and not one.members:
        story.emit(f"goodnight, {one.noun.singular}", "!")
    elif story.style != "now":
        where = "to bed" if "indoors" in story.place.kinds else "home"
        story.emit(join("then", story.clause(one, lex.GO, where, form=story.state)))


# -- themes -------------------------------------------------------------------------------------

_TOYS = tuple(noun for noun in lex.THINGS if "toy" in noun.kinds)
_CLOTHES = tuple(noun for noun in lex.THINGS if "clothing" in noun.kinds)
_DISHES = tuple(noun for noun in lex.THINGS if "dish" in noun.kinds)

_PLAYING = Theme(
    weight=3.0,
    children=(2, 2),
    adults=(0, 1),
    animals=(0, 1),
    things=_TOYS,
    num_things=(2, 3),
    indoors=0.4,
    room="",
    events=(
        (events.take, 2), (events.give, 2), (events.want, 2), (events.play, 2), (events.throw, 3),
        (events.roll, 1), (events.push, 2), (events.put, 2), (events.break_it, 1), (events.hug, 1),
        (events.do_both, 2), (events.fall, 1), (events.admire, 1.5), (events.together, 1),
        (events.move, 1), (events.hold, 1),
    ),
)  # fmt: skip
_EATING = Theme(
    weight=2.0,
    children=(1, 2),
    adults=(1, 1),
    animals=(0, 1),
    things=lex.FOODS[:4] + lex.MASS + _DISHES + lex.FOODS[4:],
    num_things=(3, 4),
    indoors=0.8,
    room="kitchen",
    events=(
        (events.eat, 4), (events.drink, 3), (events.give, 2), (events.want, 2), (events.cook, 2),
        (events.put, 1), (events.take, 2), (events.wash, 1), (events.break_it, 1),
        (events.help_out, 1), (events.roll, 0.5), (events.hold, 0.5),
    ),
)  # fmt: skip
_ANIMALS = Theme(
    weight=2.5,
    children=(0, 1),
    adults=(0, 1),
    animals=(2, 2),
    things=lex.FOODS + _TOYS[:2],
    num_things=(1, 2),
    indoors=0.1,
    room="",
    events=(
        (events.chase, 4), (events.move, 5), (events.climb, 1), (events.eat, 2), (events.ride, 2),
        (events.notice, 2), (events.admire, 3), (events.hug, 1), (events.do_both, 2),
        (events.bite, 1), (events.take, 1),
    ),
)  # fmt: skip
_DRESSING = Theme(
    weight=1.5,
    children=(2, 2),
    adults=(0, 1),
    animals=(0, 1),
    things=(*_CLOTHES, *(noun for noun in lex.THINGS if noun.singular == "blanket")),
    num_things=(2, 3),
    indoors=0.7,
    room="bedroom",
    events=(
        (events.wear, 3), (events.lose, 3), (events.wash, 3), (events.do_both, 2), (events.bite, 1),
        (events.take, 2), (events.give, 1), (events.want, 1), (events.put, 2), (events.admire, 3),
        (events.help_out, 1), (events.hold, 0.5),
    ),
)  # fmt: skip
_QUIET = Theme(
    weight=1.5,
    children=(1, 2),
    adults=(1, 1),
    animals=(0, 1),
    things=tuple(
        noun for noun in lex.THINGS if noun.singular in ("book", "doll", "flower", "blanket", "hat")
    ),
    num_things=(2, 3),
    indoors=0.6,
    room="",
    events=(
        (events.read, 3), (events.sketch, 3), (events.admire, 1.5), (events.open_up, 2),
        (events.lose, 1), (events.hug, 2), (events.do_both, 2), (events.move, 2), (events.take, 1),
        (events.give, 1), (events.put, 1), (events.help_out, 1), (events.together, 1),
        (events.hold, 0.5),
    ),
)  # fmt: skip
_OUTING = Theme(
    weight=2.0,
    children=(1, 2),
    adults=(0, 1),
    animals=(1, 1),
    things=(*_TOYS, *lex.FOODS, *_CLOTHES),
    num_things=(2, 3),
    indoors=0.0,
    room="",
    events=(
        (events.move, 4), (events.together, 2), (events.notice, 3), (events.fall, 2),
        (events.climb, 2), (events.chase, 2), (events.throw, 1), (events.ride, 1),
        (events.admire, 3), (events.take, 1), (events.eat, 1), (events.push, 1), (events.lose, 1),
        (events.help_out, 1), (events.hold, 1),
    ),
)  # fmt: skip

THEMES = (_PLAYING, _EATING, _ANIMALS, _DRESSING, _QUIET, _OUTING)
_THEME_WEIGHTS = tuple(accumulate(theme.weight for theme in THEMES))

_TALK: tuple[tuple[Move, float], ...] = (
    (questions.where, 2), (questions.is_it_there, 1), (questions.who_has, 1),
    (questions.does_she_have, 1), (questions.who_did, 1.5), (questions.what_did, 2),
    (questions.what_doing, 1.5), (questions.did_they, 2), (questions.is_it_so, 1),
    (questions.how_is, 1), (questions.which, 1.5), (questions.whose, 1), (questions.how_many, 0.6),
    (questions.why_sad, 1), (questions.tagged, 1.5), (questions.ask_you, 1), (remarks.mood, 1.5),
    (remarks.attribute, 1.5), (remarks.there_is, 2), (remarks.near, 6), (remarks.who_did_it, 5),
    (remarks.what_was_done, 3), (remarks.who_has_it, 2.5), (remarks.compare, 1.5),
    (remarks.point, 1), (remarks.each, 2.5), (remarks.owns, 1), (remarks.knows, 5),
    (remarks.thinks, 0.8), (remarks.likes, 1), (remarks.not_any, 3), (remarks.there_is_none, 1),
    (remarks.never, 1.2), (remarks.ever, 0.8), (remarks.nobody, 1.2), (remarks.can_and_cannot, 2),
    (remarks.one_who_is_not, 2.5), (remarks.one_who_cannot, 0.5), (remarks.fact, 1),
    (remarks.because, 1), (remarks.meanwhile, 1.5), (remarks.when, 1), (remarks.plan, 1),
    (remarks.habit, 2.5), (questions.able, 1), (questions.is_the_one, 3), (remarks.passive, 2),
    (remarks.request, 1),
)  # fmt: skip

_STYLES: tuple[Style, ...] = ("now", "book", "past")
_STYLE_WEIGHTS = (0.4, 0.65, 1.0)

_REPEATS: dict[Move, int] = {
    events.move: 3, events.take: 2, events.throw: 2, events.eat: 2, remarks.near: 2,
    remarks.knows: 2, remarks.who_did_it: 2, remarks.there_is: 2, questions.what_did: 2,
    questions.did_they: 2,
}  # fmt: skip
"""How often a move may be made in one scene, where it is not once."""

_TALK_SHARE = 0.6
"""Probability that a move is talk rather than an event."""
