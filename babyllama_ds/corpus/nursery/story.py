"""The state of one scene, and how its participants are referred to.

Enters: draws and a tense. Leaves: clauses in which every entity is named so that a listener knows
who is meant: indefinite when new, a pronoun when it was just mentioned and no rival could be
meant, reflexive when it is the clause's own subject, a name or a definite phrase otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from babyllama_ds.corpus.nursery.grammar import (
    OBJECT,
    POSSESSIVE,
    REFLEXIVE,
    article,
    be,
    conjugate,
    declare,
    form_of,
    join,
    possessive,
    quoted,
    sentence,
    with_adverb,
)
from babyllama_ds.corpus.nursery.held_out import Draw
from babyllama_ds.corpus.nursery.lexicon import BE, PEOPLE, Adjective, Noun, Verb

Style = Literal["now", "book", "past"]
"""How a scene is told: as it happens (Anna is running), as in a picture book (Anna runs), or
after it happened."""


class Spot(NamedTuple):
    """Where something is: `under the bed`."""

    preposition: str
    base: Entity


@dataclass(eq=False, slots=True)
class Entity:
    """Someone or something in a scene, or a group of its kind."""

    noun: Noun
    pronoun: str
    """`he`, `she`, `it` or `they`: fixes agreement and reference."""
    count: str = ""
    """Before the plural when first mentioned: two, three, some."""
    adjective: Adjective | None = None
    """What tells it from others of its kind."""
    mood: Adjective | None = None
    """How a person or animal feels, or the passing state of a thing (dirty, empty)."""
    owner: Entity | None = None
    holder: Entity | None = None
    spot: Spot | None = None
    known: bool = False
    """Whether it was mentioned before."""
    gone: bool = False
    """Eaten, or flown away."""
    members: tuple[Entity, ...] = ()
    """The two that act together (Anna and Tom)."""

    @property
    def plural(self) -> bool:
        """Whether it is a group."""
        return self.pronoun == "they"

    def is_a(self, kind: str) -> bool:
        """Whether its noun is of the kind."""
        return kind in self.noun.kinds


def hiding_places(base: Entity) -> tuple[str, ...]:
    """Where something is out of sight."""
    if base.is_a("container"):
        return ("in", "behind")
    return ("under", "behind") if base.is_a("top") else ("behind",)


class Happening(NamedTuple):
    """Something told, kept so that it can be asked about."""

    subject: Entity
    verb: Verb
    parts: tuple[str | Entity, ...]
    form: str

    @property
    def thing(self) -> Entity | None:
        """The direct object: the second entity of `gave Tom the ball`, else the first part."""
        both = all(isinstance(part, Entity) for part in self.parts)
        part = self.parts[-1 if both else 0] if self.parts else None
        return part if isinstance(part, Entity) else None

    @property
    def others(self) -> tuple[str | Entity, ...]:
        """The parts besides the direct object."""
        thing = self.thing
        return tuple(part for part in self.parts if part is not thing)


class Story:
    """One scene while it is told."""

    def __init__(self, draw: Draw, place: Noun, topics: Sequence[Noun], style: Style) -> None:
        self.draw = draw
        self.topics = topics
        """Things of the kind that the scene is about, present or not."""
        self.place = place
        self.style = style
        self.past = style == "past"
        self.actors: list[Entity] = []
        """People and animals."""
        self.things: list[Entity] = []
        self.furniture: list[Entity] = []
        self.offstage: Entity | None = None
        """An animal that may come along."""
        self._pair: Entity | None = None
        self.happenings: list[Happening] = []
        self.described: list[Happening] = []
        """What someone was already described by (the girl who took the ball)."""
        self.sentences: list[str] = []
        self.named: list[Noun] = []
        """What was said to be missing, or to be someone's, besides the things that are here."""
        self.told: list[tuple[Entity, Spot | None]] = []
        """Who was told to be where; no spot: told by the way (the cat near the tree)."""
        self._focus: list[Entity] = []
        self._now: list[Entity] = []
        self._subject: Entity | None = None

    # -- who is there ---------------------------------------------------------------------------

    def may_do(self, entity: Entity, verb: Verb) -> bool:
        """Whether the entity (every member of a pair) can do it and may be seen doing it."""
        nouns = [member.noun for member in entity.members] or [entity.noun]
        return all(self.draw.may_do(noun, verb) for noun in nouns)

    def actor(self, test: Callable[[Entity], bool]) -> Entity | None:
        """A person or animal that passes the test; those already known are likelier."""
        return self._one_of([entity for entity in self.actors if test(entity)])

    def thing(self, test: Callable[[Entity], bool]) -> Entity | None:
        """A thing that passes the test."""
        return self._one_of([entity for entity in self.things if not entity.gone and test(entity)])

    def base(self, test: Callable[[Entity], bool]) -> Entity | None:
        """A piece of furniture or a container that passes the test."""
        return self._one_of([entity for entity in self.furniture if test(entity)])

    def pair(self) -> Entity | None:
        """The first two single people, as one subject; the same entity every time."""
        people = [one for one in self.actors if one.is_a("person") and not one.plural]
        if self._pair is None and len(people) > 1:
            self._pair = Entity(people[0].noun, "they", members=(people[0], people[1]))
        return self._pair

    def _one_of(self, found: Sequence[Entity]) -> Entity | None:
        if not found:
            return None
        if self.draw.chance(0.65):
            found = [entity for entity in found if entity.known] or found
        recent = [entity for entity in found if entity in self._focus]
        if recent and self.draw.chance(0.35):
            return recent[0]
        return self.draw.even(found)

    # -- tense ----------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The form of what lasts."""
        return "past" if self.past else "present"

    def done(self) -> str:
        """A form for what is over once it is told."""
        if self.past:
            return "past"
        if self.style == "book":
            return "present" if self.draw.chance(0.9) else "perfect"
        return "past" if self.draw.chance(0.6) else "perfect"

    def going(self) -> str:
        """A form for what goes on."""
        if self.past:
            return "past" if self.draw.chance(0.5) else "past progressive"
        if self.style == "book":
            return "present" if self.draw.chance(0.75) else "progressive"
        return "progressive"

    # -- reference ------------------------------------------------------------------------------

    def is_clear(self, entity: Entity) -> bool:
        """Whether a pronoun could only mean this entity."""
        mentioned = self._focus + self._now
        return entity in mentioned and not any(
            other.pronoun == entity.pronoun and other is not entity for other in mentioned
        )

    def mention(self, entity: Entity) -> None:
        """Note that the sentence in the making has it."""
        entity.known = True
        self._now.append(entity)

    def subject(self, entity: Entity, *, plain: bool = False) -> str:
        """The entity as a clause's subject; `plain`: without its adjective."""
        if self.is_clear(entity) and (entity in self._now or self.draw.chance(0.75)):
            text = entity.pronoun
        else:
            self._subject = None
            text = self.describe(entity, plain=plain)
        self._subject = entity
        self.mention(entity)
        return text

    def object(self, entity: Entity, *, pronoun: bool = True) -> str:
        """The entity after a verb or a preposition."""
        if entity is self._subject:
            return REFLEXIVE[entity.pronoun]
        if entity.is_a("furniture") or entity.is_a("container"):
            return f"the {form_of(entity.noun, plural=entity.plural)}"
        again = entity in self._now
        if pronoun and self.is_clear(entity) and (again or self.draw.chance(0.65)):
            text = OBJECT[entity.pronoun]
        else:
            text = self.describe(entity)
        self.mention(entity)
        return text

    def describe(self, entity: Entity, *, plain: bool = False) -> str:
        """The entity by a name, a possessive, an indefinite or a definite phrase."""
        if entity.members:
            first, second = entity.members
            name = self.describe(first)
            self._subject = first
            return f"{name} and {self.describe(second)}"
        if entity.noun.is_name:
            return entity.noun.singular
        twin = self.has_twin(entity)
        owned = (
            entity.owner is not None
            and entity.owner.known
            and (entity.is_a("kin") or not entity.known or self.draw.chance(0.5))
        )
        with_adjective = twin or self.draw.chance(0.2 if entity.known else 0.6)
        noun = self.noun_phrase(entity, adjective=with_adjective and not plain)
        if owned and entity.owner is not None:
            return f"{self._possessor(entity.owner)} {noun}"
        if not entity.known:
            entity.known = True
            return indefinite(entity, noun)
        return f"{self._determiner(entity)} {noun}"

    def _determiner(self, entity: Entity) -> str:
        """`the`; as it happens, sometimes a pointing word."""
        if self.style == "now" and not entity.noun.is_mass and self.draw.chance(0.1):
            if entity.plural:
                return "these" if self.draw.chance(0.5) else "those"
            return "this" if self.draw.chance(0.5) else "that"
        return "the"

    def noun_phrase(self, entity: Entity, *, adjective: bool) -> str:
        """Adjective and noun, without a determiner."""
        noun = form_of(entity.noun, plural=entity.plural)
        if adjective and entity.adjective is not None:
            return f"{entity.adjective.base} {noun}"
        return noun

    def has_twin(self, entity: Entity) -> bool:
        """Whether another of the same noun is around."""
        everyone = self.things if entity in self.things else self.actors
        return any(other.noun is entity.noun and other is not entity for other in everyone)

    def _possessor(self, owner: Entity) -> str:
        likely = owner in self._now or self.draw.chance(0.7)
        if owner is self._subject or (likely and self.is_clear(owner)):
            return POSSESSIVE[owner.pronoun]
        owner_name = self.describe(owner)
        self.mention(owner)
        return possessive(owner_name)

    # -- telling --------------------------------------------------------------------------------

    def bind(self, entity: Entity) -> None:
        """Let possessives of this entity be pronouns until the sentence ends: `his ball`."""
        self._subject = entity

    def realise(self, *parts: str | Entity) -> str:
        """Words as they are, entities as objects (`gave Tom the ball`, never `gave Tom it`)."""
        words: list[str] = []
        after: str | Entity = ""
        for part in parts:
            if isinstance(part, str):
                words.append(part)
            else:
                words.append(self.object(part, pronoun=isinstance(after, str)))
            after = part
        return join(*words)

    def clause(
        self,
        subject: Entity,
        verb: Verb,
        *parts: str | Entity,
        form: str = "",
        negative: bool = False,
        adverb: str = "",
    ) -> str:
        """A statement, not yet a sentence; `form` is the scene's state form if none is given."""
        text = self.subject(subject)
        finite = conjugate(verb, subject.pronoun, form or self.state)
        rest = self.realise(*parts)
        if adverb:
            return with_adverb(text, finite, adverb, rest)
        return declare(text, finite, rest, negative=negative)

    def being(self, subject: Entity, *parts: str | Entity, negative: bool = False) -> str:
        """`the dog is hungry`, not yet a sentence."""
        text = self.subject(subject, plain=True)
        finite = conjugate(BE, subject.pronoun, self.state)
        return declare(text, finite, self.realise(*parts), negative=negative)

    def emit(self, words: str, end: str = ".") -> None:
        """Add a sentence; what it mentioned is now in focus."""
        self._append(sentence(words, end))
        if self._now:
            self._focus, self._now = self._now, []
        self._subject = None

    def quote(self, speaker: Entity, words: str, end: str = ".") -> None:
        """Add direct speech; nothing in it is in focus, its speaker is."""
        self._now, self._subject = [], None
        self._append(quoted(words, self.describe(speaker), end=end))
        self._focus = [speaker]
        speaker.known = True

    def _append(self, text: str) -> None:
        self.sentences.append(text)

    def tell(self, subject: Entity, verb: Verb, *parts: str | Entity, form: str) -> None:
        """A sentence about something that happens, which can be asked about later."""
        then = form == self.state and len(self.sentences) > 3 and self.draw.chance(0.15)
        self.emit(join("then" if then else "", self.clause(subject, verb, *parts, form=form)))
        self.remember(subject, verb, *parts, form=form)

    def has_done(self, subject: Entity, verb: Verb) -> bool:
        """Whether it was told that the subject did this."""
        return any(event.subject is subject and event.verb is verb for event in self.happenings)

    def remember(self, subject: Entity, verb: Verb, *parts: str | Entity, form: str) -> None:
        """Keep what happened, to be asked about in the form in which it was told."""
        self.happenings.append(Happening(subject, verb, parts, form))

    def be(self, entity: Entity) -> str:
        """The form of be that agrees, in the scene's tense."""
        return be(entity.pronoun, past=self.past)


def indefinite(entity: Entity, noun: str) -> str:
    """`a dog`, `two dogs`, `some milk`."""
    if entity.plural:
        return f"{entity.count or 'some'} {noun}"
    return f"some {noun}" if entity.noun.is_mass else article(noun)


def kind_of(one: Entity) -> Noun:
    """The common noun for a name: Anna is a girl."""
    if not one.noun.is_name:
        return one.noun
    boy, girl, _, man, woman, _ = PEOPLE
    if one.is_a("adult"):
        return man if one.pronoun == "he" else woman
    return boy if one.pronoun == "he" else girl
