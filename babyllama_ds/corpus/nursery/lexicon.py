"""The nursery's words: forms, and which words make sense together.

Leaves: `Noun`, `Verb` and `Adjective` entries, each list ordered from frequent to rare (words are
drawn with Zipf's skew along it). A noun has kinds ("person", "toy", "dog"); a verb lists the kinds
that can do it and the kinds it can be done to; an adjective lists the kinds it can describe.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Noun:
    """A common noun or a name. `plural` is empty for names and for what cannot be counted."""

    singular: str
    plural: str
    kinds: frozenset[str]
    gender: str
    """`m`, `f`, `n`, or empty: each individual has its own (`m` or `f`)."""
    size: int
    """Rank of size from 1 (mouse) to 9 (horse), for comparisons; 0: never compared."""

    @property
    def is_name(self) -> bool:
        """Whether it stands without a determiner."""
        return self.singular[0].isupper()

    @property
    def is_mass(self) -> bool:
        """Whether it cannot be counted (milk)."""
        return not self.plural and not self.is_name


@dataclass(frozen=True, slots=True)
class Verb:
    """The five forms of a verb and what it selects."""

    base: str
    third: str
    past: str
    participle: str
    gerund: str
    subjects: frozenset[str]
    objects: frozenset[str]
    common: bool
    """Too basic to be held out with any subject (want, have, say)."""

    def takes_subject(self, noun: Noun) -> bool:
        """Whether the noun can do it."""
        return not self.subjects.isdisjoint(noun.kinds)

    def takes_object(self, noun: Noun) -> bool:
        """Whether it can be done to the noun."""
        return not self.objects.isdisjoint(noun.kinds)


@dataclass(frozen=True, slots=True)
class Adjective:
    """An adjective, its comparative (or empty), and what it can describe."""

    base: str
    comparative: str
    nouns: frozenset[str]

    def describes(self, noun: Noun) -> bool:
        """Whether the noun can be so."""
        return not self.nouns.isdisjoint(noun.kinds)


def _noun(forms: str, kinds: str, gender: str = "n", size: int = 0) -> Noun:
    singular, _, plural = forms.partition(" ")
    return Noun(singular, plural, frozenset([singular.lower(), *kinds.split()]), gender, size)


def _verb(forms: str, subjects: str, objects: str = "", *, common: bool = False) -> Verb:
    base, third, past, participle, gerund = forms.split()
    return Verb(
        base,
        third,
        past,
        participle,
        gerund,
        frozenset(subjects.split()),
        frozenset(objects.split()),
        common,
    )


def _adjective(forms: str, nouns: str) -> Adjective:
    base, _, comparative = forms.partition(" ")
    return Adjective(base, comparative, frozenset(nouns.split()))


# -- nouns --------------------------------------------------------------------------------------

_CHILD = "person child swimmer climber jumper player reader"
_ADULT = "person adult swimmer reader"

NAMES = (
    _noun("Anna", _CHILD, "f"),
    _noun("Tom", _CHILD, "m"),
    _noun("Mommy", _ADULT, "f"),
    _noun("Lily", _CHILD, "f"),
    _noun("Daddy", _ADULT, "m"),
    _noun("Ben", _CHILD, "m"),
    _noun("Emma", _CHILD, "f"),
    _noun("Max", _CHILD, "m"),
    _noun("Grandma", _ADULT, "f"),
    _noun("Grandpa", _ADULT, "m"),
)

PEOPLE = (
    _noun("boy boys", _CHILD, "m", 6),
    _noun("girl girls", _CHILD, "f", 6),
    _noun("baby babies", "person infant player", "", 4),
    _noun("man men", _ADULT, "m", 8),
    _noun("woman women", _ADULT, "f", 8),
    _noun("child children", _CHILD, "", 6),
)

KIN = (
    _noun("brother brothers", _CHILD + " kin", "m"),
    _noun("sister sisters", _CHILD + " kin", "f"),
)

ANIMALS = (
    _noun("dog dogs", "animal furred barker swimmer chaser biter jumper player pet", "", 5),
    _noun("cat cats", "animal furred climber chaser biter jumper player pet", "", 4),
    _noun("bird birds", "animal flyer singer house", "", 2),
    _noun("duck ducks", "animal flyer swimmer", "", 3),
    _noun("puppy puppies", "animal furred barker chaser biter jumper player pet", "", 3),
    _noun("rabbit rabbits", "animal furred jumper pet", "", 3),
    _noun("kitten kittens", "animal furred climber chaser biter jumper player pet", "", 2),
    _noun("horse horses", "animal furred jumper grown", "", 9),
    _noun("cow cows", "animal furred grown", "f", 9),
    _noun("mouse mice", "animal furred climber house", "", 1),
    _noun("pig pigs", "animal grown", "", 6),
    _noun("frog frogs", "animal swimmer jumper", "", 1),
    _noun("bear bears", "animal furred swimmer climber chaser grown", "", 8),
)

_TOY = "thing portable toy painted"
_DISH = "thing portable dish painted washable breakable"
_CLOTHING = "thing portable clothing painted washable"
_VEHICLE = "thing toy portable vehicle painted roller breakable"

THINGS = (
    _noun("ball balls", _TOY + " roller throwable", size=2),
    _noun("book books", "thing portable readable painted"),
    _noun("doll dolls", "thing portable toy washable breakable huggable"),
    _noun("hat hats", _CLOTHING),
    _noun("cup cups", _DISH),
    _noun("car cars", _VEHICLE),
    _noun("shoe shoes", _CLOTHING + " chewed"),
    _noun("block blocks", _TOY + " throwable"),
    _noun("truck trucks", _VEHICLE),
    _noun("balloon balloons", _TOY + " flyer"),
    _noun("sock socks", _CLOTHING + " chewed"),
    _noun("spoon spoons", "thing portable dish washable"),
    _noun("flower flowers", "thing portable plant"),
    _noun("train trains", _VEHICLE),
    _noun("bowl bowls", _DISH),
    _noun("blanket blankets", "thing portable painted washable chewed"),
    _noun("kite kites", _TOY + " flyer breakable"),
    _noun("boat boats", "thing portable toy vehicle painted breakable"),
    _noun("coat coats", _CLOTHING),
)

FOODS = (
    _noun("apple apples", "thing portable food roller throwable snack"),
    _noun("cookie cookies", "thing portable food baked snack"),
    _noun("cake cakes", "thing portable food baked snack"),
    _noun("banana bananas", "thing portable food snack"),
    _noun("egg eggs", "thing portable food roller snack"),
    _noun("carrot carrots", "thing portable food snack"),
)

MASS = (
    _noun("milk", "thing drink"),
    _noun("soup", "thing food cooked"),
    _noun("water", "thing drink"),
    _noun("bread", "thing food cooked"),
    _noun("juice", "thing drink"),
)

CONTAINERS = (
    _noun("box boxes", "thing container pushable openable painted"),
    _noun("basket baskets", "thing container openable painted"),
)

FURNITURE = (
    _noun("table tables", "furniture painted top"),
    _noun("bed beds", "furniture top"),
    _noun("tree trees", "furniture plant tall climbable"),
    _noun("chair chairs", "furniture top painted pushable"),
    _noun("door doors", "furniture painted openable"),
)

PLACES = (
    _noun("kitchen", "indoors"),
    _noun("garden", "pond"),
    _noun("park", "pond"),
    _noun("yard", ""),
    _noun("bedroom", "indoors"),
    _noun("barn", ""),
)

COMMON = PEOPLE + ANIMALS
"""Who can be a subject and can be counted."""

# -- verbs --------------------------------------------------------------------------------------

_ANIMATE = "person animal"

BE = _verb("be is was been being", "", common=True)
HAVE = _verb("have has had had having", "person", "portable drink food", common=True)
DO = _verb("do does did done doing", _ANIMATE, common=True)
GO = _verb("go goes went gone going", _ANIMATE, common=True)
KNOW = _verb("know knows knew known knowing", "person", common=True)
THINK = _verb("think thinks thought thought thinking", "person", common=True)
WANT = _verb("want wants wanted wanted wanting", "person", "portable drink food", common=True)
LIKE = _verb("like likes liked liked liking", "person", "animal portable drink food", common=True)
LOOK = _verb("look looks looked looked looking", _ANIMATE, "person animal thing", common=True)
PUT = _verb("put puts put put putting", "person", "portable", common=True)
BARK = _verb("bark barks barked barked barking", "barker", common=True)
HURT = _verb("hurt hurts hurt hurt hurting", _ANIMATE, common=True)

RUN = _verb("run runs ran run running", _ANIMATE)
SLEEP = _verb("sleep sleeps slept slept sleeping", _ANIMATE)
PLAY = _verb("play plays played played playing", "player")
SIT = _verb("sit sits sat sat sitting", _ANIMATE)
JUMP = _verb("jump jumps jumped jumped jumping", "jumper")
FALL = _verb("fall falls fell fallen falling", _ANIMATE)
HIDE = _verb("hide hides hid hidden hiding", _ANIMATE, "portable")
WALK = _verb("walk walks walked walked walking", _ANIMATE)
CRY = _verb("cry cries cried cried crying", "child infant")
LAUGH = _verb("laugh laughs laughed laughed laughing", "person")
SWIM = _verb("swim swims swam swum swimming", "swimmer")
SING = _verb("sing sings sang sung singing", "child adult singer")
FLY = _verb("fly flies flew flown flying", "flyer")
ROLL = _verb("roll rolls rolled rolled rolling", "roller")
CLIMB = _verb("climb climbs climbed climbed climbing", "climber", "climbable")

EAT = _verb("eat eats ate eaten eating", _ANIMATE, "food")
SEE = _verb("see sees saw seen seeing", _ANIMATE, "person animal thing")
FIND = _verb("find finds found found finding", "person", "portable")
TAKE = _verb("take takes took taken taking", "person", "portable")
GIVE = _verb("give gives gave given giving", "person", "portable")
CHASE = _verb("chase chases chased chased chasing", "child chaser", "animal child")
THROW = _verb("throw throws threw thrown throwing", "child adult", "throwable")
HOLD = _verb("hold holds held held holding", "person", "portable")
BREAK = _verb("break breaks broke broken breaking", _ANIMATE, "breakable")
DRINK = _verb("drink drinks drank drunk drinking", _ANIMATE, "drink")
CATCH = _verb("catch catches caught caught catching", "child adult chaser", "throwable")
PUSH = _verb("push pushes pushed pushed pushing", "person", "vehicle pushable")
CARRY = _verb("carry carries carried carried carrying", "child adult", "portable")
HELP = _verb("help helps helped helped helping", "child adult", "person")
HUG = _verb("hug hugs hugged hugged hugging", "person", "person pet huggable")
WASH = _verb("wash washes washed washed washing", "child adult", "washable pet")
MAKE = _verb("make makes made made making", "child adult", "baked cooked")
READ = _verb("read reads read read reading", "reader", "readable")
OPEN = _verb("open opens opened opened opening", "child adult", "openable")
WEAR = _verb("wear wears wore worn wearing", "person", "clothing")
BITE = _verb("bite bites bit bitten biting", "biter", "chewed")
LOSE = _verb("lose loses lost lost losing", "child adult", "portable")
DRAW = _verb("draw draws drew drawn drawing", "child", "animal plant vehicle furniture")
RIDE = _verb("ride rides rode ridden riding", "child adult", "horse")
FIX = _verb("fix fixes fixed fixed fixing", "adult", "breakable")

INTRANSITIVE = (
    RUN,
    SLEEP,
    PLAY,
    SIT,
    JUMP,
    FALL,
    HIDE,
    WALK,
    CRY,
    LAUGH,
    SWIM,
    SING,
    FLY,
    BARK,
)
"""What one does alone."""

TRANSITIVE = (
    EAT,
    SEE,
    FIND,
    TAKE,
    CHASE,
    THROW,
    HOLD,
    BREAK,
    DRINK,
    CATCH,
    PUSH,
    CARRY,
    HELP,
    HUG,
    WASH,
    MAKE,
    READ,
    OPEN,
    WEAR,
    BITE,
    LOSE,
    DRAW,
    RIDE,
    FIX,
    CLIMB,
)
"""What one does to something."""

# -- adjectives ---------------------------------------------------------------------------------

MOODS = (
    _adjective("happy", _ANIMATE),
    _adjective("hungry", _ANIMATE),
    _adjective("sad", _ANIMATE),
    _adjective("tired", _ANIMATE),
    _adjective("angry", _ANIMATE),
    _adjective("scared", _ANIMATE),
    _adjective("thirsty", _ANIMATE),
)
HAPPY, HUNGRY, SAD, TIRED, ANGRY, SCARED, THIRSTY = MOODS

SIZES = (
    _adjective("little", "child infant animal toy container furniture plant cup bowl spoon"),
    _adjective("big bigger", "animal toy container furniture cup bowl snack"),
    _adjective("small smaller", "animal toy container dish snack"),
    _adjective("tall taller", "person"),
)
LITTLE, BIG, SMALL, TALL = SIZES

COLOURS = (
    _adjective("red", "painted flower apple"),
    _adjective("blue", "painted flower bird"),
    _adjective("white", "furred painted egg bird"),
    _adjective("green", "painted frog apple"),
    _adjective("brown", "furred chair table egg duck"),
    _adjective("black", "furred clothing vehicle bird"),
    _adjective("yellow", "painted flower bird"),
)

QUALITIES = (
    _adjective("new", "clothing toy readable dish painted"),
    _adjective("old older", "adult clothing toy readable furniture horse dog"),
    _adjective("soft", "clothing blanket bed furred doll"),
    _adjective("pretty", "doll flower bird girl woman clothing kite"),
    _adjective("warm", "clothing blanket baked cooked milk"),
    _adjective("fast", "horse dog vehicle rabbit cat"),
    _adjective("funny", "readable pet hat"),
    _adjective("heavy", "container readable vehicle furniture"),
    _adjective("cold", "drink soup egg"),
)
OLD = QUALITIES[1]

STATES = (
    _adjective("dirty", "washable pet child pig"),
    _adjective("clean", "washable"),
    _adjective("wet", "washable pet child duck"),
    _adjective("empty", "cup bowl container"),
    _adjective("broken", "breakable"),
)
DIRTY, CLEAN, WET, EMPTY, BROKEN = STATES

ATTRIBUTES = SIZES[:3] + COLOURS + QUALITIES
"""What tells one thing from another, before its noun."""
