"""Questions about a scene, and answers that are true of it.

Like events, each asks about something that is there to be asked about and returns whether it did.
"""

from __future__ import annotations

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.grammar import (
    NEGATIVE,
    ask,
    be,
    conjugate,
    declare,
    form_of,
    join,
    tag,
)
from babyllama_ds.corpus.nursery.story import Entity, Happening, Story, kind_of

_PROGRESSIVE = ("progressive", "past progressive")


def where(story: Story) -> bool:
    """`Where is the ball? It is under the bed.`"""
    thing = story.thing(lambda it: it.known and (it.spot is not None or it.holder is not None))
    if thing is None:
        return False
    story.emit(join("where", story.be(thing), story.subject(thing)), "?")
    if thing.spot is not None:
        preposition, base = thing.spot
        story.emit(story.being(thing, preposition, base))
    elif thing.holder is not None:
        story.emit(story.clause(thing.holder, lex.HAVE, thing))
    return True


def is_it_there(story: Story) -> bool:
    """`Is the ball under the bed? No, it isn't. It is in the box.`"""
    thing = story.thing(lambda it: it.known and it.spot is not None)
    if thing is None or thing.spot is None:
        return False
    preposition, base = thing.spot
    other = story.base(lambda it: it is not base and it.is_a("top"))
    asked = base if other is None or story.draw.chance(0.5) else other
    word = preposition if asked is base else "on"
    is_ = story.be(thing)
    story.emit(join(is_, story.subject(thing), word, story.object(asked)), "?")
    if asked is base:
        story.emit(f"yes, {thing.pronoun} {is_}")
    else:
        story.emit(f"no, {thing.pronoun} {NEGATIVE[is_]}")
        story.mention(thing)
        story.emit(story.being(thing, preposition, base))
    return True


def who_has(story: Story) -> bool:
    """`Who has the ball? Anna does.`"""
    thing = story.thing(lambda it: it.holder is not None and it.known)
    if thing is None or thing.holder is None:
        return False
    finite = conjugate(lex.HAVE, "he", story.state)
    story.emit(join("who", finite.main, story.object(thing)), "?")
    support = conjugate(lex.HAVE, thing.holder.pronoun, story.state).support
    holder = story.describe(thing.holder)
    story.mention(thing.holder)
    story.emit(f"{holder} {support}")
    return True


def does_she_have(story: Story) -> bool:
    """`Does Anna have a ball? No, she doesn't. Tom has it.`"""
    thing = story.thing(lambda it: it.holder is not None and it.known)
    if thing is None or thing.holder is None:
        return False
    asked = story.actor(lambda one: one.is_a("person"))
    if asked is None:
        return False
    finite = conjugate(lex.HAVE, asked.pronoun, story.state)
    story.emit(ask(story.subject(asked), finite, story.object(thing)), "?")
    if asked is thing.holder:
        story.emit(f"yes, {asked.pronoun} {finite.operator}")
        story.mention(asked)
    else:
        story.emit(f"no, {asked.pronoun} {NEGATIVE[finite.operator]}")
        story.mention(thing)
        story.emit(story.clause(thing.holder, lex.HAVE, thing))
    return True


def who_did(story: Story) -> bool:
    """`Who is chasing the cat? The dog is.`"""
    event = _recent(story)
    if event is None or not event.parts or event.thing is event.subject:
        return False
    finite = conjugate(event.verb, "he", event.form)
    wh = "what" if event.subject.is_a("thing") else "who"
    story.emit(join(wh, finite.auxiliary, finite.main, story.realise(*event.parts)), "?")
    operator = conjugate(event.verb, event.subject.pronoun, event.form).operator
    name = story.describe(event.subject)
    story.mention(event.subject)
    story.emit(f"{name} {operator}")
    return True


def what_did(story: Story) -> bool:
    """`What is Anna holding? She is holding the cup.`"""
    event = _recent(story)
    if event is None or event.thing is None or event.thing is event.subject:
        return False
    living = event.thing.is_a("person") or event.thing.is_a("animal")
    finite = conjugate(event.verb, event.subject.pronoun, event.form)
    subject = story.subject(event.subject)
    wh = "who" if living else "what"
    story.emit(ask(subject, finite, story.realise(*event.others), wh=wh), "?")
    if story.draw.chance(0.5):
        name = story.describe(event.thing)
        story.mention(event.thing)
        story.emit(name)
    else:
        story.emit(story.clause(event.subject, event.verb, *event.parts, form=event.form))
    return True


def what_doing(story: Story) -> bool:
    """`What is the dog doing? He is sleeping on the bed.`"""
    event = _recent(story)
    if event is None or event.form not in _PROGRESSIVE:
        return False
    finite = conjugate(lex.DO, event.subject.pronoun, event.form)
    story.emit(ask(story.subject(event.subject), finite, wh="what"), "?")
    story.emit(story.clause(event.subject, event.verb, *event.parts, form=event.form))
    return True


def did_they(story: Story) -> bool:
    """`Did Tom break the cup? No, he didn't. Anna did.`"""
    event = _recent(story)
    if event is None or event.thing is event.subject:
        return False
    other = story.actor(
        lambda one: (
            one is not event.subject
            and one not in event.subject.members
            and one not in event.parts
            and story.may_do(one, event.verb)
        )
    )
    asked = event.subject if other is None or story.draw.chance(0.5) else other
    finite = conjugate(event.verb, asked.pronoun, event.form)
    story.emit(ask(story.subject(asked), finite, story.realise(*event.parts)), "?")
    if asked is event.subject:
        story.emit(f"yes, {asked.pronoun} {finite.operator}")
        story.mention(asked)
        return True
    story.emit(f"no, {asked.pronoun} {NEGATIVE[finite.operator]}")
    operator = conjugate(event.verb, event.subject.pronoun, event.form).operator
    name = story.describe(event.subject)
    story.mention(event.subject)
    story.emit(f"{name} {operator}")
    return True


def is_it_so(story: Story) -> bool:
    """`Is the ball red? No, it isn't. It is blue.`"""
    thing = story.thing(lambda it: it.known and it.adjective is not None and not story.has_twin(it))
    if thing is None or thing.adjective is None:
        return False
    colours = [colour for colour in lex.COLOURS if story.draw.may_be(thing.noun, colour)]
    asked = thing.adjective
    if asked in colours and story.draw.chance(0.5):
        asked = story.draw.pick(colours)
    is_ = story.be(thing)
    story.emit(join(is_, story.subject(thing, plain=True), asked.base), "?")
    if asked is thing.adjective:
        story.emit(f"yes, {thing.pronoun} {is_}")
        story.mention(thing)
    else:
        story.emit(f"no, {thing.pronoun} {NEGATIVE[is_]}")
        story.mention(thing)
        story.emit(story.being(thing, thing.adjective.base))
    return True


def how_is(story: Story) -> bool:
    """`Is Anna happy? No, she isn't. She is tired.`"""
    one = story.actor(lambda one: one.mood is not None and one.known)
    if one is None or one.mood is None:
        return False
    asked = story.draw.even(
        [mood for mood in lex.MOODS if story.draw.may_be(one.noun, mood)] or [one.mood]
    )
    is_ = story.be(one)
    story.emit(join(is_, story.subject(one), asked.base), "?")
    story.mention(one)
    if asked is one.mood:
        story.emit(f"yes, {one.pronoun} {is_}")
        return True
    story.emit(f"no, {one.pronoun} {NEGATIVE[is_]}")
    story.mention(one)
    story.emit(story.being(one, one.mood.base))
    return True


def which(story: Story) -> bool:
    """`Which ball does Anna have? She has the red one.`"""
    thing = story.thing(
        lambda it: it.holder is not None and it.adjective is not None and story.has_twin(it)
    )
    if thing is None or thing.holder is None or thing.adjective is None:
        return False
    noun = form_of(thing.noun, plural=thing.plural)
    holder = thing.holder
    finite = conjugate(lex.HAVE, holder.pronoun, story.state)
    story.emit(ask(story.subject(holder), finite, wh=f"which {noun}"), "?")
    one = "ones" if thing.plural else "one"
    story.emit(story.clause(holder, lex.HAVE, f"the {thing.adjective.base} {one}"))
    return True


def whose(story: Story) -> bool:
    """`Whose hat is this? It is Anna's hat.`"""
    thing = story.thing(lambda it: it.owner is not None and it.owner.known)
    if thing is None or thing.owner is None or story.past:
        return False
    noun = story.noun_phrase(thing, adjective=story.draw.chance(0.3))
    if thing.plural:
        story.emit(f"whose {noun} are these", "?")
    else:
        story.emit(f"whose {noun} is this", "?")
    owner = story.describe(thing.owner)
    mark = "'" if owner.endswith("s") else "'s"
    plain = form_of(thing.noun, plural=thing.plural)
    story.mention(thing)
    story.mention(thing.owner)
    story.emit(f"{thing.pronoun} {be(thing.pronoun)} {owner}{mark} {plain}")
    thing.known = True
    return True


def how_many(story: Story) -> bool:
    """`How many ducks are there? There are two ducks.`"""
    group = story.actor(lambda one: one.count in _NUMBERS) or story.thing(
        lambda it: it.count in _NUMBERS
    )
    if group is None:
        return False
    noun = group.noun.plural
    are = story.be(group)
    story.emit(f"how many {noun} {are} there", "?")
    story.mention(group)
    story.emit(f"there {are} {group.count}" + (f" {noun}" if story.draw.chance(0.4) else ""))
    return True


def why_sad(story: Story) -> bool:
    """`Why is Anna hungry? Because she wants a cookie.`"""
    event = _recent(story)
    if event is None or event.verb not in (lex.LOSE, lex.BREAK):
        return False
    one = event.subject
    if one.mood is not lex.SAD:
        return False
    story.emit(join("why", story.be(one), story.subject(one), "sad"), "?")
    story.emit(join("because", story.clause(one, event.verb, *event.parts, form=event.form)))
    return True


def tagged(story: Story) -> bool:
    """`The dog is hungry, isn't he?`"""
    choices: list[tuple[Entity, lex.Verb, tuple[str | Entity, ...], str]] = [
        (one, lex.BE, (one.mood.base,), story.state)
        for one in story.actors
        if one.mood is not None and one.known
    ]
    choices += [
        (it.holder, lex.HAVE, (it,), story.state)
        for it in story.things
        if it.holder is not None and not it.gone and it.known
    ]
    choices += [
        (event.subject, event.verb, event.parts, event.form) for event in story.happenings[-2:]
    ]
    if not choices:
        return False
    subject, verb, parts, form = story.draw.even(choices)
    finite = conjugate(verb, subject.pronoun, form)
    statement = declare(story.subject(subject), finite, story.realise(*parts))
    story.emit(f"{statement}, {tag(finite, subject.pronoun, negative=True)}", "?")
    if story.draw.chance(0.5):
        story.emit(f"yes, {subject.pronoun} {finite.operator}")
        story.mention(subject)
    return True


def ask_you(story: Story) -> bool:
    """`Do you see the duck, Tom?` `Can you find the red ball?`"""
    if story.past:
        return False
    listener = next((one for one in story.actors if one.noun.is_name and one.is_a("child")), None)
    call = f", {listener.noun.singular}" if listener is not None and story.draw.chance(0.5) else ""
    if story.draw.chance(0.5):
        thing = story.thing(lambda it: it.holder is None and it.is_a("portable") and it.known)
        if thing is None:
            return False
        verb = story.draw.even(("find", "see", "hold", "carry"))
        phrase = story.describe(thing)
        story.mention(thing)
        story.emit(f"can you {verb} {phrase}{call}", "?")
        return True
    animal = story.actor(lambda one: one.is_a("animal"))
    if animal is None:
        return False
    verb = story.draw.even(("see", "like")) if animal.known else "see"
    phrase = story.describe(animal)
    story.mention(animal)
    story.emit(f"do you {verb} {phrase}{call}", "?")
    return True


def able(story: Story) -> bool:
    """`Can the boys see the duck? Yes, they can.` `Will Tom eat the cake? No, he won't.`"""
    thing = story.thing(lambda it: it.known)
    if thing is None or story.past:
        return False
    verbs = [
        verb
        for verb in lex.TRANSITIVE
        if verb.takes_object(thing.noun) and verb not in (lex.LOSE, lex.BREAK)
    ]
    verb = story.draw.even(verbs)
    one = story.actor(lambda one: one.is_a("person") and story.may_do(one, verb))
    if one is None:
        return False
    finite = conjugate(verb, one.pronoun, story.draw.even(("can", "will")))
    story.emit(ask(story.subject(one), finite, story.object(thing)), "?")
    if story.draw.chance(0.5):
        story.emit(f"yes, {one.pronoun} {finite.operator}")
    else:
        story.emit(f"no, {one.pronoun} {NEGATIVE[finite.operator]}")
    story.mention(one)
    return True


def is_the_one(story: Story) -> bool:
    """`Is the girl who has the ball happy? Yes, she is.`"""
    thing = story.thing(lambda it: it.holder is not None and it.known)
    if thing is None or thing.holder is None:
        return False
    one, mood = thing.holder, thing.holder.mood
    if mood is None or one.members or one.is_a("kin") or not one.is_a("person"):
        return False
    noun = kind_of(one)
    asked = story.draw.even((mood, story.draw.pick(lex.MOODS)))
    if not story.draw.may_be(noun, asked):
        return False
    if asked is mood and not story.past and story.draw.chance(0.5):
        return _can_the_one(story, one, noun)
    has = conjugate(lex.HAVE, one.pronoun, story.state)
    verbs = [verb for verb in (lex.HOLD, lex.WEAR) if verb.takes_object(thing.noun)]
    if verbs and story.draw.may_do(noun, verbs[-1]) and story.draw.chance(0.5):
        has = conjugate(verbs[-1], one.pronoun, "past progressive" if story.past else "progressive")
    head, is_ = form_of(noun, plural=one.plural), story.be(one)
    story.mention(one)
    story.emit(f"{is_} the {declare(f'{head} who', has, story.object(thing))} {asked.base}", "?")
    story.mention(one)
    if asked is mood:
        story.emit(f"yes, {one.pronoun} {is_}")
    else:
        story.emit(f"no, {one.pronoun} {NEGATIVE[is_]}")
    return True


def _can_the_one(story: Story, one: Entity, noun: lex.Noun) -> bool:
    """`Can the boy who is tired swim? No, he can't.`"""
    skills = (lex.SWIM, lex.SING, lex.JUMP, lex.RUN, lex.WALK)
    possible = [verb for verb in skills if story.draw.may_do(noun, verb)]
    if not possible or one.mood is None:
        return False
    verb, head = story.draw.even(possible), form_of(noun, plural=one.plural)
    story.mention(one)
    is_ = be(one.pronoun)
    story.emit(join("can the", head, "who", is_, one.mood.base, verb.base), "?")
    story.mention(one)
    can = story.draw.chance(0.6)
    story.emit(f"yes, {one.pronoun} can" if can else f"no, {one.pronoun} can't")
    return True


def _recent(story: Story) -> Happening | None:
    """One of the last things that happened; what goes on must have been told last."""
    recent = [
        event
        for number, event in enumerate(reversed(story.happenings[-4:]))
        if number == 0 or event.form not in _PROGRESSIVE
    ]
    return story.draw.even(recent) if recent else None


_NUMBERS = ("two", "three", "four")
