"""What happens in a scene.

Each event looks for those to whom it can happen, tells it in one to four sentences, and changes
the scene: who holds what, where things are, who is hungry or sad. It returns whether it happened.
"""

from __future__ import annotations

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.grammar import OBJECT, article, be, conjugate, join
from babyllama_ds.corpus.nursery.story import Entity, Spot, Story, hiding_places

Parts = tuple[str | Entity, ...]


# -- people and things --------------------------------------------------------------------------


def take(story: Story) -> bool:
    """Someone takes or finds something that nobody has."""
    thing = story.thing(lambda it: it.holder is None and it.is_a("portable"))
    if thing is None:
        return False
    verb = lex.FIND if thing.spot and story.draw.chance(0.5) else lex.TAKE
    taker = story.actor(lambda one: one.is_a("person") and story.may_do(one, verb))
    if taker is None:
        return False
    story.tell(taker, verb, thing, *_origin(thing, verb), form=story.done())
    thing.holder, thing.spot = taker, None
    return True


def hold(story: Story) -> bool:
    """Someone holds or carries what they have."""
    verb = story.draw.even((lex.HOLD, lex.CARRY))
    thing = story.thing(lambda it: it.holder is not None and story.may_do(it.holder, verb))
    if thing is None or thing.holder is None or not thing.is_a("portable"):
        return False
    story.tell(thing.holder, verb, thing, form=story.going())
    return True


def give(story: Story) -> bool:
    """A thing changes hands; the new holder may say thank you."""
    thing = story.thing(lambda it: it.holder is not None and story.may_do(it.holder, lex.GIVE))
    if thing is None or thing.holder is None:
        return False
    giver = thing.holder
    taker = story.actor(lambda one: one.is_a("person") and one is not giver)
    if taker is None:
        return False
    if story.is_clear(thing) or story.draw.chance(0.5):
        parts: Parts = (thing, "to", taker)
    else:
        parts = (taker, thing)
    story.tell(giver, lex.GIVE, *parts, form=story.done())
    thing.holder = taker
    if not taker.plural and story.draw.chance(0.3):
        story.quote(taker, "thank you")
    elif story.draw.chance(0.4):
        feel(story, taker, lex.HAPPY)
    return True


def want(story: Story) -> bool:
    """Someone wants what another has."""
    thing = story.thing(lambda it: it.holder is not None and it.is_a("portable"))
    if thing is None or thing.holder is None:
        return False
    holder = thing.holder
    wanter = story.actor(lambda one: one.is_a("person") and one is not holder)
    if wanter is None:
        return False
    words = story.clause(wanter, lex.WANT, thing)
    if story.draw.chance(0.5):
        words = f"{words}, but {story.clause(holder, lex.HAVE, thing)}"
    story.emit(words)
    if not wanter.plural and story.draw.chance(0.35):
        _plead(story, wanter, holder, thing)
    return True


def _plead(story: Story, wanter: Entity, holder: Entity, thing: Entity) -> None:
    noun = story.noun_phrase(thing, adjective=story.has_twin(thing))
    pronoun = OBJECT[thing.pronoun]
    if story.draw.chance(0.5):
        story.quote(wanter, f"can I have the {noun}, please", "?")
        if holder.plural:
            return
        answers = (
            "yes, you can",
            f"no, you can't have {pronoun}",
            f"you can have {pronoun}",
            f"I want {pronoun}, too",
        )
        story.quote(holder, story.draw.even(answers))
    else:
        story.quote(wanter, f"give me the {noun}, please")


def play(story: Story) -> bool:
    """Someone plays with a toy."""
    toy = story.thing(lambda it: it.is_a("toy"))
    if toy is None:
        return False
    player = toy.holder or story.actor(lambda one: one.is_a("person"))
    if player is None or not story.may_do(player, lex.PLAY):
        return False
    story.tell(player, lex.PLAY, "with", toy, form=story.going())
    toy.holder, toy.spot = player, None
    return True


def throw(story: Story) -> bool:
    """A ball flies to someone, who catches it or does not."""
    thing = story.thing(lambda it: it.is_a("throwable") and it.holder is not None)
    if thing is None or thing.holder is None or not story.may_do(thing.holder, lex.THROW):
        return False
    thrower = thing.holder
    catcher = story.actor(lambda one: one is not thrower and story.may_do(one, lex.CATCH))
    if catcher is None:
        return False
    simple = "present" if story.style == "book" else "past"
    story.tell(thrower, lex.THROW, thing, "to", catcher, form=story.done())
    if story.draw.chance(0.65):
        story.tell(catcher, lex.CATCH, thing, form=simple)
        thing.holder = catcher
        return True
    missed = story.clause(catcher, lex.CATCH, thing, form=simple, negative=True)
    story.emit(missed)
    return _roll_away(story, thing)


def _roll_away(story: Story, thing: Entity) -> bool:
    base = story.base(lambda it: it.is_a("furniture"))
    thing.holder = None
    if base is not None and story.may_do(thing, lex.ROLL):
        spot = Spot(story.draw.even(hiding_places(base)), base)
        story.tell(thing, lex.ROLL, spot.preposition, base, form=story.done())
        thing.spot = spot
    return True


def roll(story: Story) -> bool:
    """Something round rolls away."""
    thing = story.thing(lambda it: story.may_do(it, lex.ROLL))
    return thing is not None and _roll_away(story, thing)


def push(story: Story) -> bool:
    """Someone pushes a car."""
    car = story.thing(lambda it: it.is_a("vehicle") or it.is_a("pushable"))
    pusher = story.actor(lambda one: story.may_do(one, lex.PUSH))
    if car is None or pusher is None or car.holder not in (None, pusher):
        return False
    base = story.base(lambda it: it is not car)
    parts: Parts = (car, "to", base) if base and story.draw.chance(0.4) else (car,)
    story.tell(pusher, lex.PUSH, *parts, form=story.going())
    if car.is_a("portable"):
        car.holder, car.spot = pusher, None
    return True


def put(story: Story) -> bool:
    """Someone puts down or hides what they have."""
    verb = story.draw.even((lex.PUT, lex.PUT, lex.HIDE))
    thing = story.thing(
        lambda it: (
            it.holder is not None
            and it.holder.is_a("person")
            and it.is_a("portable")
            and story.may_do(it.holder, verb)
        )
    )
    if thing is None or thing.holder is None:
        return False
    base = story.base(lambda _: True)
    if base is None:
        return False
    shown = ("on", "near") if base.is_a("top") else ("in" if base.is_a("container") else "near",)
    spot = Spot(story.draw.even(hiding_places(base) if verb is lex.HIDE else shown), base)
    story.tell(thing.holder, verb, thing, spot.preposition, base, form=story.done())
    thing.holder, thing.spot = None, spot
    return True


def lose(story: Story) -> bool:
    """Someone loses a thing, and misses it."""
    thing = story.thing(lambda it: it.holder is not None and not it.is_a("food"))
    loser = thing.holder if thing is not None else None
    if thing is None or loser is None or not story.may_do(loser, lex.LOSE):
        return False
    story.tell(loser, lex.LOSE, thing, form="present" if story.style == "book" else story.done())
    base = story.base(lambda it: it.is_a("furniture") and not it.is_a("openable"))
    thing.holder, thing.spot = None, Spot("under", base) if base else None
    if story.draw.chance(0.4):
        feel(story, loser, lex.SAD)
    if not loser.plural and story.draw.chance(0.4):
        verb, noun = be(thing.pronoun), story.noun_phrase(thing, adjective=False)
        story.quote(loser, f"where {verb} my {noun}", "?")
    finder = story.actor(lambda one: one.is_a("person") and story.may_do(one, lex.FIND))
    if finder is not None and base is not None and story.draw.chance(0.6):
        story.tell(finder, lex.FIND, thing, "under", base, form=story.done())
        thing.holder, thing.spot = finder, None
    return True


def open_up(story: Story) -> bool:
    """Someone opens a box and sees what is in it."""
    box = story.base(lambda it: it.is_a("openable"))
    opener = story.actor(lambda one: story.may_do(one, lex.OPEN))
    if box is None or opener is None:
        return False
    story.tell(opener, lex.OPEN, box, form=story.done())
    inside = story.thing(lambda it: it.spot is not None and it.spot.base is box)
    if inside is not None and box.is_a("container"):
        noun = story.describe(inside)
        story.mention(inside)
        story.emit(f"there {story.be(inside)} {noun} in it")
    return True


def break_it(story: Story) -> bool:
    """Something breaks; its owner minds, and someone may fix it."""
    thing = story.thing(
        lambda it: (
            it.is_a("breakable")
            and it.mood is not lex.BROKEN
            and not it.is_a("flyer")
            and story.draw.may_be(it.noun, lex.BROKEN)
        )
    )
    if thing is None:
        return False
    breaker = story.actor(lambda one: story.may_do(one, lex.BREAK))
    if breaker is None:
        return False
    story.tell(breaker, lex.BREAK, thing, form=story.done())
    thing.mood = lex.BROKEN
    if story.draw.chance(0.4):
        story.emit(story.being(thing, "broken"))
    if thing.owner is not None and thing.owner is not breaker:
        feel(story, thing.owner, story.draw.even((lex.SAD, lex.ANGRY)))
    return fix(story) if story.draw.chance(0.5) else True


def fix(story: Story) -> bool:
    """A grown-up mends what is broken."""
    thing = story.thing(lambda it: it.mood is lex.BROKEN)
    fixer = story.actor(lambda one: story.may_do(one, lex.FIX))
    if thing is None or fixer is None:
        return thing is not None
    story.tell(
        fixer, lex.FIX, thing, form=story.done() if story.past or story.draw.chance(0.5) else "will"
    )
    thing.mood = None
    return True


def wash(story: Story) -> bool:
    """Someone washes what is dirty, or themselves."""
    washer = story.actor(lambda one: story.may_do(one, lex.WASH))
    if washer is None:
        return False
    if washer.mood in (lex.DIRTY, lex.WET) or story.draw.chance(0.5):
        story.tell(washer, lex.WASH, washer, form=story.done())
        washer.mood = None
        return True
    dirty = story.thing(lambda it: lex.WASH.takes_object(it.noun)) or story.actor(
        lambda one: one is not washer and lex.WASH.takes_object(one.noun)
    )
    if dirty is None:
        return False
    if dirty.mood is None and story.draw.chance(0.5) and feel(story, dirty, lex.DIRTY):
        dirty.mood = lex.DIRTY
    story.tell(washer, lex.WASH, dirty, form=story.going())
    if story.draw.may_be(dirty.noun, lex.CLEAN) and story.draw.chance(0.5):
        story.emit(join("now", story.being(dirty, "clean")))
    dirty.mood = None
    return True


def wear(story: Story) -> bool:
    """Someone wears their clothes."""
    cloth = story.thing(lambda it: it.is_a("clothing"))
    if cloth is None:
        return False
    wearer = cloth.holder or cloth.owner or story.actor(lambda one: story.may_do(one, lex.WEAR))
    if wearer is None or not story.may_do(wearer, lex.WEAR):
        return False
    story.tell(wearer, lex.WEAR, cloth, form=story.going())
    cloth.holder, cloth.spot = wearer, None
    return True


def read(story: Story) -> bool:
    """Someone reads, perhaps to a child."""
    book = story.thing(lambda it: it.is_a("readable"))
    if book is None:
        return False
    reader = book.holder or story.actor(lambda one: story.may_do(one, lex.READ))
    if reader is None or not story.may_do(reader, lex.READ):
        return False
    listener = story.actor(lambda one: one.is_a("person") and one is not reader)
    parts: Parts = (book,)
    if listener is not None and story.draw.chance(0.5):
        parts = (book, "to", listener)
    story.tell(reader, lex.READ, *parts, form=story.going())
    book.holder, book.spot = reader, None
    return True


def sketch(story: Story) -> bool:
    """A child draws an animal, a tree, or itself."""
    artist = story.actor(lambda one: story.may_do(one, lex.DRAW))
    if artist is None:
        return False
    if story.draw.chance(0.25):
        story.tell(artist, lex.DRAW, artist, form=story.done())
        return True
    model = story.draw.pick(lex.ANIMALS)
    story.tell(artist, lex.DRAW, article(model.singular), form=story.going())
    return True


def cook(story: Story) -> bool:
    """Someone makes something to eat."""
    food = story.thing(lambda it: lex.MAKE.takes_object(it.noun) and it.holder is None)
    maker = story.actor(lambda one: story.may_do(one, lex.MAKE))
    if food is None or maker is None or food.known:
        return False
    story.tell(maker, lex.MAKE, food, form=story.going())
    table = story.base(lambda it: it.noun.singular == "table")
    food.spot = Spot("on", table) if table else None
    return True


def eat(story: Story) -> bool:
    """Someone eats; what is eaten is gone, and so is the hunger."""
    food = story.thing(lambda it: it.is_a("food"))
    eater = story.actor(
        lambda one: story.may_do(one, lex.EAT) and one.mood is lex.HUNGRY
    ) or story.actor(lambda one: story.may_do(one, lex.EAT))
    if food is None or eater is None or food.holder not in (None, eater):
        return False
    if story.draw.chance(0.4):
        story.tell(eater, lex.EAT, food, form=story.going())
        food.holder, food.spot = eater, None
        return True
    story.tell(eater, lex.EAT, food, form=story.done())
    food.gone = True
    _satisfied(story, eater, lex.HUNGRY)
    if story.draw.chance(0.25):
        noun = food.noun.plural or food.noun.singular
        verb = be("it" if food.noun.is_mass else "they", past=story.past)
        story.emit(f"now there {verb} no {noun}")
    return True


def drink(story: Story) -> bool:
    """Someone drinks."""
    milk = story.thing(lambda it: it.is_a("drink"))
    drinker = story.actor(lambda one: story.may_do(one, lex.DRINK))
    if milk is None or drinker is None or milk.holder not in (None, drinker):
        return False
    story.tell(drinker, lex.DRINK, milk, form=story.draw.even((story.going(), story.done())))
    cup = story.thing(lambda it: it.noun.singular == "cup" and it.holder in (None, drinker))
    if cup is not None and story.draw.may_be(cup.noun, lex.EMPTY):
        cup.mood = lex.EMPTY
        story.emit(join("now", story.being(cup, "empty")))
    _satisfied(story, drinker, lex.THIRSTY)
    milk.gone = True
    return True


def _satisfied(story: Story, one: Entity, need: lex.Adjective) -> None:
    if one.mood is need:
        one.mood = None
        if story.draw.chance(0.6):
            story.emit(join("now", story.being(one, need.base, negative=True)))


# -- people and animals -------------------------------------------------------------------------


def feel(story: Story, one: Entity, mood: lex.Adjective) -> bool:
    """Say how someone feels now."""
    nouns = [member.noun for member in one.members] or [one.noun]
    if one.mood is mood or not all(story.draw.may_be(noun, mood) for noun in nouns):
        return False
    one.mood = mood
    very = "very" if story.draw.chance(0.15) else ""
    story.emit(story.being(one, join(very, mood.base)))
    return True


def fall(story: Story) -> bool:
    """Someone falls, is hurt, cries and is comforted."""
    faller = story.actor(lambda one: one.is_a("person") and story.may_do(one, lex.FALL))
    if faller is None:
        return False
    form = "present" if story.style == "book" else "past"
    words = story.clause(faller, lex.FALL, form=form)
    if story.draw.chance(0.7):
        hurts = conjugate(lex.HURT, faller.pronoun, form).main
        words = join(words, "and", hurts, story.object(faller))
    story.emit(words)
    story.remember(faller, lex.FALL, form=form)
    if not story.may_do(faller, lex.CRY):
        return True
    faller.mood = lex.SAD
    cause = join("because", faller.pronoun, lex.FALL.past)
    if story.draw.chance(0.6):
        story.tell(faller, lex.CRY, form=story.going())
    elif story.style == "now":
        story.emit(f"why {story.be(faller)} {story.subject(faller)} crying", "?")
        story.emit(cause)
    helper = story.actor(
        lambda one: (
            one is not faller and lex.HUG.takes_object(faller.noun) and story.may_do(one, lex.HUG)
        )
    )
    if helper is not None and story.draw.chance(0.7):
        story.tell(helper, lex.HUG, faller, form=story.done())
        if feel(story, faller, lex.HAPPY):
            return True
        faller.mood = None
    return True


def chase(story: Story) -> bool:
    """One runs after another, who gets away."""
    hunter = story.actor(lambda one: story.may_do(one, lex.CHASE))
    if hunter is None:
        return False
    prey = story.actor(
        lambda one: (
            one is not hunter
            and lex.CHASE.takes_object(one.noun)
            and not one.is_a("grown")
            and one.noun is not hunter.noun
        )
    )
    if prey is None:
        return False
    story.tell(hunter, lex.CHASE, prey, form=story.going())
    if story.draw.chance(0.6):
        _flee(story, prey)
    elif story.draw.chance(0.5):
        feel(story, prey, lex.SCARED)
    return True


def _flee(story: Story, prey: Entity) -> None:
    base = story.base(lambda it: it.is_a("furniture"))
    options: list[tuple[lex.Verb, Parts]] = []
    if story.may_do(prey, lex.FLY):
        options.append((lex.FLY, ("away",)))
    elif story.may_do(prey, lex.RUN):
        options.append((lex.RUN, ("away",)))
    if base is not None and story.may_do(prey, lex.HIDE):
        options.append((lex.HIDE, (story.draw.even(hiding_places(base)), base)))
    if base is not None and base.is_a("climbable") and story.may_do(prey, lex.CLIMB):
        options.append((lex.CLIMB, (base,)))
    if options:
        verb, parts = story.draw.even(options)
        story.tell(prey, verb, *parts, form=story.done())


def move(story: Story) -> bool:
    """Someone does something alone: run, sleep, sing."""
    one = story.actor(lambda _: True)
    if one is None:
        return False
    verb = story.draw.pick(
        (
            lex.RUN,
            lex.PLAY,
            lex.SLEEP,
            lex.JUMP,
            lex.SIT,
            lex.WALK,
            lex.LAUGH,
            lex.SING,
            lex.SWIM,
            lex.FLY,
            lex.HIDE,
            lex.BARK,
        )
    )
    if not story.may_do(one, verb) or (verb is lex.SLEEP and one.mood not in (None, lex.TIRED)):
        return False
    form = story.going()
    if not story.past and verb is not lex.SLEEP and story.draw.chance(0.15):
        form = "want" if one.is_a("person") else "can"
    tail = _tail(story, verb, one)
    if tail is None:
        return False
    story.emit(story.clause(one, verb, *tail, form=form))
    if form not in ("want", "can"):
        story.remember(one, verb, *tail, form=form)
    if verb is lex.SLEEP:
        one.mood = lex.TIRED
    if verb is lex.SWIM and story.draw.chance(0.4):
        feel(story, one, lex.WET)
    return True


def _tail(story: Story, verb: lex.Verb, one: Entity) -> Parts | None:
    """Where it is done."""
    chance = story.draw.chance
    here: Parts = ("in", f"the {story.place.singular}")
    if verb is lex.SWIM:
        return ("in the water",) if "pond" in story.place.kinds else None
    if verb is lex.BARK:
        other = story.actor(lambda it: it is not one)
        return ("at", other) if other is not None and chance(0.7) else ()
    if verb in (lex.LAUGH, lex.SING):
        return ()
    if verb in (lex.SIT, lex.SLEEP, lex.JUMP):
        base = story.base(
            lambda it: it.is_a("top") or (verb is not lex.JUMP and not it.is_a("top"))
        )
        if base is None or base.is_a("openable") or one.is_a("grown"):
            return here
        return ("on" if base.is_a("top") else "under", base)
    base = story.base(lambda it: it.is_a("furniture"))
    if verb is lex.HIDE:
        return (story.draw.even(hiding_places(base)), base) if base is not None else None
    if base is None or chance(0.4):
        return here
    if verb is lex.FLY:
        return ("over", base)
    return ("to", base) if verb in (lex.RUN, lex.WALK) else ("near", base)


def together(story: Story) -> bool:
    """Two children do something together."""
    pair = story.pair()
    verb = story.draw.pick((lex.PLAY, lex.SING, lex.LAUGH, lex.RUN, lex.JUMP, lex.SIT, lex.WALK))
    if pair is None or not story.may_do(pair, verb):
        return False
    story.tell(pair, verb, *(_tail(story, verb, pair) or ()), form=story.going())
    return True


def admire(story: Story) -> bool:
    """Someone sees themselves in the water, or looks at someone."""
    one = story.actor(lambda one: story.may_do(one, lex.SEE))
    if one is None:
        return False
    if story.draw.chance(0.6) and "pond" in story.place.kinds:
        story.tell(one, lex.SEE, one, "in the water", form="past" if story.past else "present")
        return True
    other = one
    if story.draw.chance(0.35):
        other = story.actor(lambda it: it is not one) or one
    story.tell(one, lex.LOOK, "at", other, form=story.going())
    return True


def do_both(story: Story) -> bool:
    """`Anna hugged Tom and washed herself.` `The dog saw the cat and ran away.`"""
    first = story.draw.even((lex.SEE, lex.HUG, lex.HELP, lex.CHASE))
    one = story.actor(lambda one: one.known and story.may_do(one, first))
    if one is None:
        return False
    other = story.actor(lambda it: it is not one and first.takes_object(it.noun))
    second = story.draw.even((lex.WASH, lex.HURT, lex.RUN, lex.LAUGH, lex.HURT))
    if other is None or not story.may_do(one, second):
        return False
    form = "present" if story.style == "book" else "past"
    words = story.clause(one, first, other, form=form)
    parts: Parts = (one,) if second in (lex.WASH, lex.HURT) else ()
    if second is lex.RUN:
        parts = ("away",)
    finite = conjugate(second, one.pronoun, form)
    story.emit(join(words, "and", finite.main, story.realise(*parts)))
    story.remember(one, second, *parts, form=form)
    return True


def climb(story: Story) -> bool:
    """Someone climbs a tree."""
    tree = story.base(lambda it: it.is_a("climbable"))
    climber = story.actor(lambda one: story.may_do(one, lex.CLIMB))
    if tree is None or climber is None:
        return False
    story.tell(climber, lex.CLIMB, tree, form=story.going())
    return True


def help_out(story: Story) -> bool:
    """One person helps another."""
    helper = story.actor(lambda one: story.may_do(one, lex.HELP))
    if helper is None:
        return False
    other = story.actor(lambda one: one.is_a("person") and one is not helper)
    if other is None:
        return False
    story.tell(helper, lex.HELP, other, form=story.going())
    return True


def hug(story: Story) -> bool:
    """Someone hugs someone, or a doll."""
    hugger = story.actor(lambda one: story.may_do(one, lex.HUG))
    if hugger is None:
        return False
    other = story.actor(lambda one: one is not hugger and lex.HUG.takes_object(one.noun))
    if other is None:
        return False
    story.tell(hugger, lex.HUG, other, form=story.going())
    if story.draw.chance(0.4):
        feel(story, other, lex.HAPPY)
    return True


def ride(story: Story) -> bool:
    """Someone rides a horse."""
    horse = story.actor(lambda one: one.is_a("horse") and not one.plural)
    rider = story.actor(lambda one: story.may_do(one, lex.RIDE))
    if horse is None or rider is None or rider.plural:
        return False
    story.tell(rider, lex.RIDE, horse, form=story.going())
    return True


def bite(story: Story) -> bool:
    """A dog bites a shoe."""
    shoe = story.thing(lambda it: lex.BITE.takes_object(it.noun))
    biter = story.actor(lambda one: story.may_do(one, lex.BITE))
    if shoe is None or biter is None:
        return False
    story.tell(biter, lex.BITE, shoe, form=story.done())
    if shoe.owner is not None:
        feel(story, shoe.owner, lex.ANGRY)
    return True


def notice(story: Story) -> bool:
    """An animal comes along."""
    watcher = story.actor(lambda one: one.is_a("person") and story.may_do(one, lex.SEE))
    animal = story.offstage
    if watcher is None or animal is None or "indoors" in story.place.kinds:
        return False
    story.tell(watcher, lex.SEE, animal, form=story.state)
    story.actors.append(animal)
    story.offstage = None
    return _arrive(story, animal)


def _arrive(story: Story, one: Entity) -> bool:
    """What a newcomer does first."""
    verbs = [
        verb
        for verb in (lex.RUN, lex.SLEEP, lex.SWIM, lex.JUMP, lex.FLY, lex.SIT)
        if story.may_do(one, verb)
    ]
    if not verbs:
        return True
    verb = story.draw.even(verbs)
    tail = _tail(story, verb, one)
    if tail is not None:
        story.tell(one, verb, *tail, form=story.going())
    return True


def _origin(thing: Entity, verb: lex.Verb) -> Parts:
    """Where it is found, or taken from."""
    if thing.spot is None:
        return ()
    preposition, base = thing.spot
    if verb is lex.FIND:
        return (preposition, base)
    return ("from", base) if preposition in ("on", "in") else ()
