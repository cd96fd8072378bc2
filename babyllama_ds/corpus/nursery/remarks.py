"""Remarks about a scene and about the world: how things are, what someone knows, what is not so.

Like events, each says something that is true of the scene and returns whether it did.
"""

from __future__ import annotations

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.events import feel
from babyllama_ds.corpus.nursery.grammar import (
    NEGATIVE,
    REFLEXIVE,
    article,
    ask,
    be,
    conjugate,
    declare,
    form_of,
    join,
)
from babyllama_ds.corpus.nursery.story import Entity, Happening, Spot, Story, indefinite, kind_of

_SKILLS = (lex.SWIM, lex.FLY, lex.CLIMB, lex.SING, lex.JUMP)
_ANY_VERBS = (lex.FIND, lex.SEE, lex.EAT, lex.TAKE, lex.MAKE, lex.DRINK, lex.WEAR, lex.READ)


# -- how things are -----------------------------------------------------------------------------


def mood(story: Story) -> bool:
    """`Anna is hungry.`"""
    one = story.actor(lambda one: one.mood is None)
    quality = story.draw.pick(lex.MOODS)
    if one is None:
        return False
    if one.is_a("person") and story.draw.chance(0.3) and story.draw.may_be(one.noun, quality):
        me = "we" if one.plural else "I"
        one.mood = quality
        story.quote(one, join(me, be(me), quality.base))
        return True
    return feel(story, one, quality)


def attribute(story: Story) -> bool:
    """`The ball is red.` `The ball is red and the cup is blue.`"""
    thing = _described(story, None)
    if thing is None or thing.adjective is None:
        return False
    words = story.being(thing, thing.adjective.base)
    other = _described(story, thing)
    if other is not None and other.adjective is not None and story.draw.chance(0.4):
        link = "and" if other.adjective is thing.adjective else "but"
        words = join(f"{words}, {link}", story.being(other, other.adjective.base))
    story.emit(words)
    return True


def _described(story: Story, besides: Entity | None) -> Entity | None:
    return story.thing(
        lambda it: (
            it is not besides and it.known and it.adjective is not None and not story.has_twin(it)
        )
    )


def there_is(story: Story) -> bool:
    """`There are two apples on the table.`"""
    thing = story.thing(lambda it: it.spot is not None and (it, it.spot) not in story.told)
    if thing is None or thing.spot is None:
        return False
    story.told.append((thing, thing.spot))
    noun = story.noun_phrase(thing, adjective=story.draw.chance(0.6))
    story.mention(thing)
    preposition, base = thing.spot
    phrase = story.realise(preposition, base)
    story.emit(f"there {story.be(thing)} {indefinite(thing, noun)} {phrase}")
    return True


def near(story: Story) -> bool:
    """`The cats near the tree are hungry.` `The cup on the table is empty.`"""
    options = [
        (it, it.spot.preposition, it.spot.base)
        for it in story.things
        if it.spot is not None and not it.gone
    ]
    living = [one for one in story.actors if not one.noun.is_name and not one.is_a("kin")]
    others = [*story.furniture, *(one for one in story.actors if one.known)]
    options += [
        (one, story.draw.even(("near", "behind")), other)
        for one in living
        for other in others
        if one.noun is not other.noun
    ]
    options = [option for option in options if (option[0], None) not in story.told]
    if not options:
        return False
    one, preposition, base = story.draw.even(options)
    predicate = _predicate(story, one, one.noun)
    if predicate is None:
        return False
    head = form_of(one.noun, plural=one.plural)
    story.told.append((one, None))
    determiner = "the" if one.known or not one.plural else one.count or "some"
    phrase = story.realise(preposition, base)
    story.mention(one)
    story.emit(f"{determiner} {head} {phrase} {predicate}")
    return True


def _predicate(
    story: Story, one: Entity, noun: lex.Noun, besides: Happening | None = None
) -> str | None:
    """A verb phrase that is true of the entity, and that its noun may stand with."""
    options: list[tuple[lex.Verb, str, str]] = []
    if one.mood is not None and story.draw.may_be(noun, one.mood):
        options.append((lex.BE, one.mood.base, story.state))
    if one.adjective is not None and not story.has_twin(one):
        options.append((lex.BE, one.adjective.base, story.state))
    for event in story.happenings[-3:]:
        alone = event.subject is one and all(
            isinstance(part, str) or part is one for part in event.parts
        )
        if alone and event is not besides and story.draw.may_do(noun, event.verb):
            words = (REFLEXIVE[one.pronoun] if part is one else str(part) for part in event.parts)
            options.append((event.verb, join(*words), event.form))
    if one.is_a("person") and story.draw.chance(0.5):
        liked = story.draw.pick(lex.FOODS + lex.ANIMALS)
        options.append((lex.LIKE, liked.plural, story.state))
        wanted = [topic for topic in story.topics if topic.plural]
        options.append((lex.WANT, article(story.draw.pick(wanted).singular), story.state))
    if not options:
        return None
    verb, rest, form = story.draw.even(options)
    return declare("", conjugate(verb, one.pronoun, form), rest)


def who_did_it(story: Story) -> bool:
    """`The girl who took the ball is happy.`"""
    happened = [
        event
        for event in story.happenings[-6:]
        if not event.subject.members
        and not event.subject.is_a("kin")
        and event.parts
        and event not in story.described
        and not any(_same_kind(part, event.subject) for part in event.parts)
        and story.draw.may_do(kind_of(event.subject), event.verb)
    ]
    if not happened:
        return False
    event = story.draw.even(happened)
    one = event.subject
    predicate = _predicate(story, one, kind_of(one), event)
    if predicate is None:
        return False
    story.described.append(event)
    head = form_of(kind_of(one), plural=one.plural)
    link = "who" if one.is_a("person") and story.draw.chance(0.7) else "that"
    finite = conjugate(event.verb, one.pronoun, event.form)
    story.mention(one)
    relative = declare(link, finite, _others(story, event))
    story.emit(f"the {head} {relative} {predicate}")
    return True


def _same_kind(part: str | Entity, one: Entity) -> bool:
    return isinstance(part, Entity) and part is not one and kind_of(part) is kind_of(one)


def what_was_done(story: Story) -> bool:
    """`The ball that Anna took is red.`"""
    happened = [
        event
        for event in story.happenings[-6:]
        if event.thing is not None
        and event.thing is not event.subject
        and not event.thing.noun.is_name
        and not event.thing.gone
        and (event.thing.mood or event.thing.adjective) is not None
    ]
    if not happened:
        return False
    event = story.draw.even(happened)
    thing = event.thing
    assert thing is not None
    quality = thing.mood or thing.adjective
    if event.verb is lex.BREAK:
        quality = thing.adjective
    if quality is None:
        return False
    subject = story.subject(event.subject)
    finite = conjugate(event.verb, event.subject.pronoun, event.form)
    relative = declare(subject, finite, story.realise(*event.others))
    head = form_of(thing.noun, plural=thing.plural)
    link = "" if story.draw.chance(0.15) else "that"
    story.mention(thing)
    story.emit(join("the", head, link, relative, story.be(thing), quality.base))
    return True


def _others(story: Story, event: Happening) -> str:
    """The parts of an event, entities described rather than pronouns."""
    words = []
    story.bind(event.subject)
    for part in event.parts:
        if isinstance(part, str):
            words.append(part)
        elif part is event.subject:
            words.append(REFLEXIVE[part.pronoun])
        else:
            words.append(story.describe(part))
            story.mention(part)
    return join(*words)


def who_has_it(story: Story) -> bool:
    """`The boys who have the truck are angry.` `The ball that Anna has is red.`"""
    thing = story.thing(lambda it: it.holder is not None and it.adjective is not None and it.known)
    if thing is None or thing.holder is None or thing.adjective is None:
        return False
    holder, state = thing.holder, story.state
    if holder.mood is not None and not holder.members and not holder.is_a("kin"):
        noun = kind_of(holder)
        if not story.draw.may_be(noun, holder.mood):
            return False
        have = declare("who", conjugate(lex.HAVE, holder.pronoun, state), story.describe(thing))
        story.mention(thing)
        story.mention(holder)
        head = form_of(noun, plural=holder.plural)
        story.emit(f"the {head} {have} {story.be(holder)} {holder.mood.base}")
        return True
    have = declare(story.subject(holder), conjugate(lex.HAVE, holder.pronoun, state))
    head = form_of(thing.noun, plural=thing.plural)
    story.mention(thing)
    story.emit(f"the {head} that {have} {story.be(thing)} {thing.adjective.base}")
    return True


def compare(story: Story) -> bool:
    """`The dog is bigger than the cat.` `Which is bigger, the dog or the cat?`"""
    sized = [one for one in story.actors if one.noun.size]
    pairs = [
        (one, other)
        for one in sized
        for other in sized
        if one.noun.size > other.noun.size and one.is_a("person") == other.is_a("person")
    ]
    if not pairs:
        return _older(story)
    large, small = story.draw.even(pairs)
    if large.is_a("person"):
        first, second, quality = large, small, lex.TALL
    elif story.draw.chance(0.5):
        first, second, quality = large, small, lex.BIG
    else:
        first, second, quality = small, large, lex.SMALL
    if not story.draw.may_be(first.noun, quality):
        return False
    if not story.past and not first.plural and not second.plural and story.draw.chance(0.3):
        names = story.draw.shuffled([story.describe(first), story.describe(second)])
        story.mention(first)
        story.emit(f"who is {quality.comparative}, {names[0]} or {names[1]}", "?")
        story.emit(join(story.describe(first), be(first.pronoun)))
        return True
    story.emit(story.being(first, quality.comparative, "than", second))
    return True


def _older(story: Story) -> bool:
    old = story.actor(lambda one: one.is_a("adult") and story.draw.may_be(one.noun, lex.OLD))
    young = story.actor(lambda one: one.is_a("child"))
    if old is None or young is None:
        return False
    story.emit(story.being(old, lex.OLD.comparative, "than", young))
    return True


def point(story: Story) -> bool:
    """`This is a duck.` `These shoes are dirty.` `That dog is big.`"""
    if story.past:
        return False
    thing = story.thing(lambda it: it.adjective is not None) or story.actor(
        lambda one: one.is_a("animal")
    )
    if thing is None:
        return False
    word = story.draw.even(("these", "those") if thing.plural else ("this", "that"))
    are = be(thing.pronoun)
    noun = form_of(thing.noun, plural=thing.plural)
    if thing.adjective is None or story.draw.chance(0.4):
        kind = story.noun_phrase(thing, adjective=True)
        story.mention(thing)
        if not thing.plural and not thing.noun.is_mass:
            kind = article(kind)
        story.emit(f"{word} {are} {kind}")
    else:
        story.mention(thing)
        story.emit(f"{word} {noun} {are} {thing.adjective.base}")
    return True


def each(story: Story) -> bool:
    """`Each girl has a red hat.` `Both boys have balls.`"""
    group = story.actor(
        lambda one: one.plural and one.known and one.is_a("person") and not one.is_a("kin")
    )
    if group is None:
        return False
    noun = story.draw.pick([thing for thing in story.topics if thing.plural])
    adjective = _adjective_for(story, noun)
    phrase = join(adjective, noun.singular)
    if group.count == "two" and story.draw.chance(0.4):
        has = conjugate(lex.HAVE, "they", story.state).main
        words = f"both {group.noun.plural} {has} {join(adjective, noun.plural)}"
    else:
        has = conjugate(lex.HAVE, "it", story.state).main
        word = story.draw.even(("each", "every"))
        words = f"{word} {group.noun.singular} {has} {article(phrase)}"
    story.mention(group)
    story.emit(words)
    return True


def owns(story: Story) -> bool:
    """`Tom has two cars and a book.`"""
    owner = story.actor(lambda one: one.is_a("person"))
    noun = story.draw.pick([thing for thing in story.topics if thing.plural])
    if owner is None or noun in story.named or any(noun is it.noun for it in story.things):
        return False
    story.named.append(noun)
    adjective = _adjective_for(story, noun)
    if story.draw.chance(0.5):
        number = story.draw.pick(("two", "some", "three", "many", "four"))
        phrase = join(number, adjective, noun.plural)
    else:
        phrase = article(join(adjective, noun.singular))
    story.emit(story.clause(owner, lex.HAVE, phrase))
    return True


def _adjective_for(story: Story, noun: lex.Noun, probability: float = 0.5) -> str:
    fitting = [quality for quality in lex.ATTRIBUTES if story.draw.may_be(noun, quality)]
    return story.draw.pick(fitting).base if fitting and story.draw.chance(probability) else ""


# -- what someone knows, thinks, likes ----------------------------------------------------------


def knows(story: Story) -> bool:
    """`Mommy knows where the ball is.` `Daddy sees what Tom is holding.`"""
    knower = story.actor(lambda one: one.is_a("person") and not one.plural)
    if knower is None:
        return False
    verb = story.draw.even((lex.KNOW, lex.KNOW, lex.SEE))
    if not story.may_do(knower, verb):
        return False
    happened = [
        event
        for event in story.happenings[-4:]
        if knower is not event.subject
        and knower not in event.parts
        and knower not in event.subject.members
    ]
    placed = story.thing(lambda it: it.known and it.spot is not None)
    if placed is None and not happened:
        return False
    matrix = story.clause(knower, verb, negative=verb is lex.KNOW and story.draw.chance(0.2))
    if placed is not None and (not happened or story.draw.chance(0.3)):
        inner = _whereabouts(story, placed)
    else:
        inner = _indirect(story, story.draw.even(happened))
    story.emit(f"{matrix} {inner}")
    return True


def _whereabouts(story: Story, thing: Entity) -> str:
    assert thing.spot is not None
    if story.draw.chance(0.6):
        return join("where", story.object(thing, pronoun=False), story.be(thing))
    preposition, base = thing.spot
    return join("that", story.being(thing, preposition, base))


def _indirect(story: Story, event: Happening) -> str:
    """An embedded question or statement about what happened."""
    finite = conjugate(event.verb, event.subject.pronoun, event.form)
    kind = story.draw.pick(("gap", "that", "who"))
    thing = event.thing
    if kind == "gap" and thing is not None and thing is not event.subject:
        living = thing.is_a("person") or thing.is_a("animal")
        wh = "who" if living else "what"
        subject = story.subject(event.subject)
        return join(wh, declare(subject, finite, story.realise(*event.others)))
    if kind == "who" and event.parts and thing is not event.subject:
        return declare("who", conjugate(event.verb, "he", event.form), _others(story, event))
    subject = story.subject(event.subject)
    return join("that", declare(subject, finite, story.realise(*event.parts)))


def thinks(story: Story) -> bool:
    """`Tom thinks that the ball is in the box, but it is under the bed.`"""
    thing = story.thing(lambda it: it.known and it.spot is not None)
    thinker = story.actor(lambda one: one.is_a("person"))
    if thing is None or thinker is None or thing.spot is None:
        return False
    preposition, base = thing.spot
    other = story.base(lambda it: it is not base and it.is_a("top"))
    if other is None:
        return False
    link = "that" if story.draw.chance(0.8) else ""
    words = story.clause(thinker, lex.THINK, link)
    inner = story.being(thing, "on", other)
    truth = f"{thing.pronoun} {story.be(thing)} {preposition} {story.object(base)}"
    story.emit(f"{words} {inner}, but {truth}")
    return True


def likes(story: Story) -> bool:
    """`Tom likes apples, but he doesn't like soup.`"""
    one = story.actor(lambda one: one.is_a("person"))
    if one is None:
        return False
    nouns = story.draw.even((story.topics, lex.ANIMALS, lex.FOODS + lex.MASS))
    liked, other = story.draw.pick(nouns), story.draw.pick(nouns)
    if liked is other:
        return False
    text = story.subject(one)
    finite = conjugate(lex.LIKE, one.pronoun, story.state)
    first, second = (noun.plural or noun.singular for noun in (liked, other))
    if story.draw.chance(0.3):
        story.emit(declare(text, finite, first, negative=story.draw.chance(0.4)))
    elif story.draw.chance(0.3) and not story.past:
        story.emit(
            f"{declare(text, finite, first)}, {NEGATIVE[finite.operator]} {one.pronoun}", "?"
        )
    else:
        rest = declare(one.pronoun, finite, second, negative=True)
        story.emit(f"{declare(text, finite, first)}, but {rest}")
    return True


# -- what is not so -----------------------------------------------------------------------------


def _something(story: Story, verb: lex.Verb | None = None) -> str | None:
    """What one may have none of: `cookies`, `milk`."""
    there = {it.noun for it in story.things}
    nouns = [
        noun
        for noun in story.topics
        if noun not in there
        and noun not in story.named
        and (verb is None or verb.takes_object(noun))
    ]
    if not nouns:
        return None
    noun = story.draw.pick(nouns)
    story.named.append(noun)
    return noun.plural or noun.singular


def not_any(story: Story) -> bool:
    """`Tom doesn't have any cookies.`"""
    one = story.actor(lambda one: one.is_a("person"))
    verb = story.draw.even((lex.HAVE, lex.HAVE, lex.WANT, *_ANY_VERBS))
    noun = _something(story, verb)
    if one is None or noun is None:
        return False
    if not story.may_do(one, verb):
        return there_is_none(story)
    text = story.subject(one)
    form = story.state
    if verb not in (lex.HAVE, lex.WANT):
        form = story.state if story.style != "now" else story.draw.even(("past", "can"))
    finite = conjugate(verb, one.pronoun, form)
    if story.draw.chance(0.25):
        story.emit(declare(text, finite, f"some {noun}"))
        return True
    story.emit(declare(text, finite, f"any {noun}", negative=True))
    return True


def there_is_none(story: Story) -> bool:
    """`There isn't any milk on the table.`"""
    present = {one.noun for one in (*story.actors, *story.things)}
    noun = story.draw.pick(
        [noun for noun in (*lex.FOODS, *lex.MASS, *lex.ANIMALS) if noun not in present]
    )
    verb = be("it" if noun.is_mass else "they", past=story.past)
    base = story.base(lambda it: it.is_a("top"))
    if base is None or noun in lex.ANIMALS:
        tail = f"in the {story.place.singular}"
    else:
        tail = story.realise("on", base)
    story.emit(f"there {NEGATIVE[verb]} any {noun.plural or noun.singular} {tail}")
    return True


def never(story: Story) -> bool:
    """`Anna never eats soup.` `Tom has never seen a bear.`"""
    one = story.actor(lambda _: True)
    verb = story.draw.even((*_ANY_VERBS, *_SKILLS, lex.CRY, lex.RUN, lex.DRINK, lex.RIDE))
    if one is None or not story.may_do(one, verb) or story.has_done(one, verb):
        return False
    tail = ""
    if verb in _ANY_VERBS or verb in (lex.DRINK, lex.RIDE):
        noun = _something(story, verb) if verb is not lex.RIDE else "horses"
        if noun is None:
            return False
        tail = noun
    form = story.state if story.past or story.draw.chance(0.6) else "perfect"
    story.emit(story.clause(one, verb, tail, form=form, adverb="never"))
    return True


def ever(story: Story) -> bool:
    """`Have you ever seen a bear?` `Nobody has ever seen a mouse in the barn.`"""
    if story.past:
        return False
    animal = story.draw.pick(lex.ANIMALS)
    phrase = article(join(_adjective_for(story, animal, 0.4), animal.singular))
    where = f" in the {story.place.singular}" if story.draw.chance(0.4) else ""
    kind = story.draw.number(0, 3)
    if kind == 0:
        story.emit(f"have you ever seen {phrase}{where}", "?")
    elif kind == 1:
        story.emit(f"nobody has ever seen {phrase}{where}")
    elif kind == 2:
        return _no_animal_ever(story)
    else:
        one = story.actor(lambda one: one.is_a("person") and story.may_do(one, lex.SEE))
        if one is None:
            return False
        finite = conjugate(lex.SEE, one.pronoun, "perfect")
        words = join(finite.operator, story.subject(one), "ever", finite.rest)
        story.emit(f"{words} {phrase}{where}", "?")
        story.emit(f"no, {one.pronoun} {NEGATIVE[finite.operator]}")
    return True


def _no_animal_ever(story: Story) -> bool:
    animal = story.draw.pick(lex.ANIMALS)
    verbs = [
        verb
        for verb in (lex.FLY, lex.SWIM, lex.SING, lex.CLIMB, lex.JUMP, lex.EAT)
        if not verb.takes_subject(animal) and story.draw.may_say(animal, verb)
    ]
    if not verbs:
        return False
    story.emit(f"no {animal.singular} has ever {story.draw.even(verbs).participle}")
    return True


def nobody(story: Story) -> bool:
    """`Nobody wants any soup.` `Everybody wants some cake, but nobody wants any soup.`"""
    verb = story.draw.even((lex.WANT, lex.HAVE, lex.EAT, lex.FIND))
    noun, other = _something(story, verb), _something(story, verb)
    if noun is None or other is None or noun == other:
        return False
    form = story.state if verb in (lex.WANT, lex.HAVE) else "past"
    main = conjugate(verb, "he", form).main
    none, all_ = f"nobody {main} any {noun}", f"everybody {main} some {other}"
    kind = story.draw.number(0, 3)
    words = (none, all_, f"{none}, but {all_}", f"{all_}, but {none}")[kind]
    story.emit(words)
    return True


def can_and_cannot(story: Story) -> bool:
    """`Anna can't find any socks, but Tom can.`"""
    verb = story.draw.even(_ANY_VERBS)
    noun = _something(story, verb)
    able = story.actor(lambda one: one.is_a("person") and story.may_do(one, verb))
    unable = story.actor(
        lambda one: one.is_a("person") and one is not able and story.may_do(one, verb)
    )
    if noun is None or able is None or unable is None:
        return False
    form = "can" if story.draw.chance(0.6) and not story.past else "past"
    operator = "can" if form == "can" else "did"
    if story.draw.chance(0.6):
        no = story.clause(unable, verb, f"any {noun}", form=form, negative=True)
        name = story.describe(able)
        words = f"{no}, but {name} {operator}"
    else:
        yes = story.clause(able, verb, f"some {noun}", form=form)
        name = story.describe(unable)
        words = f"{yes}, but {name} {NEGATIVE[operator]}"
    story.mention(able)
    story.mention(unable)
    story.emit(words)
    return True


def one_who_is_not(story: Story) -> bool:
    """`The boy who isn't hungry isn't eating any soup.`"""
    one = story.actor(lambda one: one.is_a("person") and not one.members and not one.is_a("kin"))
    if one is None:
        return False
    noun = kind_of(one)
    verb = story.draw.even((lex.EAT, lex.DRINK, lex.WEAR, lex.MAKE, lex.HOLD))
    quality = one.mood or story.draw.pick(lex.MOODS)
    thing = _something(story, verb)
    fits = story.draw.may_do(noun, verb) and story.draw.may_be(noun, quality)
    if thing is None or not fits:
        return False
    are = story.be(one)
    no = NEGATIVE[are]
    need = {lex.EAT: lex.HUNGRY, lex.DRINK: lex.THIRSTY}.get(verb)
    inner = are if one.mood is quality else no
    if need is not None:
        outer = are if (quality is need) == (inner == are) else no
    else:
        outer = story.draw.even((are, no))
    amount = "any" if outer == no else "some"
    head = form_of(noun, plural=one.plural)
    link = story.draw.even(("who", "who", "that"))
    story.mention(one)
    story.emit(f"the {head} {link} {inner} {quality.base} {outer} {verb.gerund} {amount} {thing}")
    return True


def one_who_cannot(story: Story) -> bool:
    """`The boy who can swim can't find any shoes.`"""
    if story.past:
        return False
    one = story.actor(lambda one: one.is_a("person") and not one.members and not one.is_a("kin"))
    if one is None:
        return False
    noun = kind_of(one)
    skills = [skill for skill in _SKILLS if story.draw.may_do(noun, skill)]
    verbs = [verb for verb in _ANY_VERBS if story.draw.may_do(noun, verb)]
    if not skills or not verbs:
        return False
    skill, verb = story.draw.pick(skills), story.draw.even(verbs)
    thing = _something(story, verb)
    if thing is None:
        return False
    inner, outer = story.draw.even((("can", "can't"), ("can't", "can't"), ("can't", "can")))
    amount = "any" if outer == "can't" else "some"
    link = story.draw.even(("who", "who", "that"))
    head = form_of(noun, plural=one.plural)
    story.mention(one)
    tail = " the tree" if skill is lex.CLIMB else ""
    story.emit(f"the {head} {link} {inner} {skill.base}{tail} {outer} {verb.base} {amount} {thing}")
    return True


# -- two things at once -------------------------------------------------------------------------


def because(story: Story) -> bool:
    """`Anna is happy because she has the ball.`"""
    thing = story.thing(lambda it: it.holder is not None and it.is_a("portable"))
    if thing is None or thing.holder is None:
        return False
    holder = thing.holder
    quality = lex.HAPPY
    one = holder
    if story.draw.chance(0.4):
        other = story.actor(lambda one: one.is_a("person") and one is not holder)
        if other is None:
            return False
        one, quality = other, lex.SAD
    if one.members or not story.draw.may_be(one.noun, quality):
        return False
    words = story.being(one, quality.base)
    one.mood = quality
    if one is holder:
        has = declare(one.pronoun, conjugate(lex.HAVE, one.pronoun, story.state))
        story.emit(join(words, "because", has, story.object(thing)))
    else:
        story.emit(join(words, "because", story.clause(holder, lex.HAVE, thing)))
    return True


def meanwhile(story: Story) -> bool:
    """`Anna is singing and the dogs are sleeping.`"""
    recent = [event for event in story.happenings[-5:] if event.form in _GOING]
    if not recent:
        return False
    first = recent[-1]
    other = story.actor(lambda one: one is not first.subject and one not in first.parts)
    if other is None or other in first.subject.members:
        return False
    verbs = [verb for verb in (*_ALONE, lex.CRY) if story.may_do(other, verb)]
    if not verbs:
        return False
    verb = story.draw.even(verbs)
    link = story.draw.even(("and", "but"))
    words = story.clause(first.subject, first.verb, *first.parts, form=first.form)
    story.emit(f"{words}, {link} {story.clause(other, verb, form=first.form)}")
    story.remember(other, verb, form=first.form)
    return True


_GOING = ("progressive", "past progressive")
_ALONE = (lex.RUN, lex.PLAY, lex.LAUGH, lex.SING, lex.WALK, lex.JUMP, lex.SLEEP)


def when(story: Story) -> bool:
    """`When the dog barked, the cats ran away.`"""
    if not story.past:
        return False
    one = story.actor(lambda one: one.known)
    other = story.actor(lambda it: it is not one and it.known)
    if one is None or other is None:
        return False
    causes = [verb for verb in (lex.BARK, lex.FALL, lex.CRY, lex.LAUGH) if story.may_do(one, verb)]
    effects = [
        verb for verb in (lex.RUN, lex.LAUGH, lex.JUMP, lex.CRY) if story.may_do(other, verb)
    ]
    if not causes or not effects:
        return False
    cause, effect = story.draw.even(causes), story.draw.even(effects)
    tail = "away" if effect is lex.RUN else ""
    first = story.clause(one, cause, form="past")
    story.emit(f"when {first}, {story.clause(other, effect, tail, form='past')}")
    story.remember(one, cause, form="past")
    story.remember(other, effect, *([tail] if tail else []), form="past")
    return True


def habit(story: Story) -> bool:
    """`Lily sings every day.` `The dogs always sleep under the table.`"""
    one = story.actor(lambda one: one.known)
    if one is None:
        return False
    verbs = [verb for verb in _HABITS if story.may_do(one, verb)]
    if not verbs:
        return False
    verb = story.draw.even(verbs)
    tail = "trees" if verb is lex.CLIMB else ""
    if verb in (lex.RUN, lex.WALK, lex.SLEEP, lex.PLAY):
        tail = f"in the {story.place.singular}"
    if story.draw.chance(0.25):
        finite = conjugate(verb, one.pronoun, story.state)
        story.emit(ask(story.subject(one), finite, join(tail, "every day")), "?")
        story.emit(f"yes, {one.pronoun} {finite.operator}")
        story.mention(one)
    elif story.draw.chance(0.6):
        story.emit(story.clause(one, verb, tail, "every day"))
    else:
        adverb = "always" if story.has_done(one, verb) else story.draw.even(("always", "never"))
        story.emit(story.clause(one, verb, tail, adverb=adverb))
    return True


_HABITS = (
    lex.RUN, lex.SLEEP, lex.PLAY, lex.JUMP, lex.WALK, lex.LAUGH, lex.SWIM, lex.SING, lex.FLY,
    lex.BARK, lex.CRY, lex.CLIMB,
)  # fmt: skip


def plan(story: Story) -> bool:
    """`Tom will wash the cup.` `The girls won't eat the soup.`"""
    thing = story.thing(lambda it: it.holder is None)
    if thing is None or story.past:
        return False
    verbs = [
        verb
        for verb in lex.TRANSITIVE
        if verb.takes_object(thing.noun) and verb not in (lex.LOSE, lex.BREAK, lex.SEE)
    ]
    verb = story.draw.even(verbs)
    one = story.actor(lambda one: one.is_a("person") and story.may_do(one, verb))
    if one is None:
        return False
    form = story.draw.even(("will", "will", "want"))
    negative = story.draw.chance(0.35)
    story.emit(story.clause(one, verb, thing, form=form, negative=negative))
    return True


# -- the world ----------------------------------------------------------------------------------


def fact(story: Story) -> bool:
    """`Ducks can swim.` `A cow can't fly.` `Do dogs bark? Yes, they do.`"""
    animal = story.draw.pick(lex.ANIMALS)
    verb = story.draw.even((lex.FLY, lex.SWIM, lex.BARK, lex.CLIMB, lex.SING, lex.JUMP, lex.RUN))
    if not story.draw.may_say(animal, verb):
        return False
    true = verb.takes_subject(animal)
    plural = story.draw.chance(0.6)
    pronoun = "they" if plural else "it"
    subject = animal.plural if plural else article(animal.singular)
    finite = conjugate(verb, pronoun, story.draw.even(("can", "present")))
    tail = "trees" if verb is lex.CLIMB else ""
    if story.draw.chance(0.4):
        story.emit(ask(subject, finite, tail), "?")
        yes = f"yes, {pronoun} {finite.operator}"
        story.emit(yes if true else f"no, {pronoun} {NEGATIVE[finite.operator]}")
    elif true and story.draw.chance(0.3):
        story.emit(declare(f"every {animal.singular}", conjugate(verb, "it", "can"), tail))
    else:
        story.emit(declare(subject, finite, tail, negative=not true))
    return True


def passive(story: Story) -> bool:
    """`The cookie was eaten by the dog.`"""
    happened = [
        event
        for event in story.happenings[-3:]
        if event.thing is not None
        and event.form in ("past", "perfect")
        and len(event.parts) == 1
        and event.thing is not event.subject
        and not event.thing.is_a("furniture")
        and event.verb not in (lex.HAVE, lex.WANT, lex.SEE)
    ]
    if not happened:
        return False
    event = story.draw.even(happened)
    thing = event.thing
    assert thing is not None
    were = be(thing.pronoun, past=True)
    text = story.subject(thing)
    agent = story.object(event.subject, pronoun=False)
    story.emit(f"{text} {were} {event.verb.participle} by {agent}")
    return True


def request(story: Story) -> bool:
    """`Give the ball to Tom, please.` `Don't push the truck!`"""
    if story.past:
        return False
    child = next((one for one in story.actors if one.noun.is_name and one.is_a("child")), None)
    thing = story.thing(lambda it: it.known and it.is_a("portable"))
    if thing is None:
        return False
    name = child.noun.singular if child is not None and thing.holder in (None, child) else ""
    phrase = story.describe(thing)
    story.mention(thing)
    kind = story.draw.number(0, 3)
    base = story.base(lambda it: it.is_a("top"))
    if kind == 0 and base is not None:
        words = f"put {phrase} on {story.object(base)}, {name or 'please'}"
        if child is not None and name:
            story.emit(words)
            story.tell(child, lex.PUT, thing, "on", base, form=story.done())
            thing.holder, thing.spot = None, Spot("on", base)
            return True
    elif kind == 1:
        verbs = [
            verb
            for verb in (lex.THROW, lex.BREAK, lex.LOSE, lex.EAT)
            if verb.takes_object(thing.noun)
        ]
        words = f"don't {story.draw.even(verbs or [lex.TAKE]).base} {phrase}, please"
    elif kind == 2:
        words = f"give me {phrase}, please"
    else:
        words = f"look at {phrase}" + (f", {name}" if name else "")
    story.emit(words, "!" if kind == 3 else ".")
    return True
