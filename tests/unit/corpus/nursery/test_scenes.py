"""The text, checked by a small grammar of its own: word lists and rules written out here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from zlib import crc32

import pytest

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery.scenes import tell_scene

NUM_SCENES = 1_000


def listed(text: str) -> list[str]:
    """The words of a list."""
    return text.split()


PLURAL_OF = dict(
    pair.split(":")
    for pair in listed("""
    boy:boys girl:girls baby:babies man:men woman:women child:children brother:brothers
    sister:sisters dog:dogs cat:cats bird:birds duck:ducks puppy:puppies rabbit:rabbits
    kitten:kittens horse:horses cow:cows mouse:mice pig:pigs frog:frogs bear:bears
    ball:balls book:books doll:dolls hat:hats cup:cups car:cars shoe:shoes block:blocks
    truck:trucks balloon:balloons sock:socks spoon:spoons flower:flowers train:trains
    bowl:bowls blanket:blankets kite:kites boat:boats coat:coats apple:apples cookie:cookies
    cake:cakes banana:bananas egg:eggs carrot:carrots box:boxes basket:baskets table:tables
    bed:beds tree:trees chair:chairs door:doors
    """)
)
SINGULARS, PLURALS = set(PLURAL_OF), set(PLURAL_OF.values())
NOUNS = SINGULARS | PLURALS
MASS = {"milk", "soup", "water", "bread", "juice"}
ADJECTIVES = set(
    listed("""
    red blue green yellow white black brown big little small old new soft pretty warm fast
    funny heavy cold good hot tall dirty clean wet empty broken happy hungry sad tired angry
    scared thirsty
    """)
)
HER = {"Anna", "Mommy", "Lily", "Emma", "Grandma"}
HIM = {"Tom", "Daddy", "Ben", "Max", "Grandpa"}
NAMES = HER | HIM
FINITE = {  # singular: plural
    "is": "are", "was": "were", "has": "have", "isn't": "aren't", "wasn't": "weren't",
    "hasn't": "haven't", "does": "do", "doesn't": "don't", "wants": "want", "likes": "like",
    "runs": "run", "sleeps": "sleep", "plays": "play", "sits": "sit", "jumps": "jump",
    "walks": "walk", "cries": "cry", "laughs": "laugh", "swims": "swim", "sings": "sing",
    "flies": "fly", "barks": "bark", "climbs": "climb", "eats": "eat", "sees": "see",
    "finds": "find", "takes": "take", "gives": "give", "chases": "chase", "throws": "throw",
    "holds": "hold", "breaks": "break", "drinks": "drink", "catches": "catch", "pushes": "push",
    "carries": "carry", "helps": "help", "hugs": "hug", "washes": "wash", "makes": "make",
    "opens": "open", "wears": "wear", "loses": "lose", "draws": "draw", "rides": "ride",
    "fixes": "fix", "knows": "know", "thinks": "think", "looks": "look", "falls": "fall",
    "goes": "go", "hides": "hide", "rolls": "roll",
}  # fmt: skip
BASES = set(FINITE.values()) - {"are", "were", "aren't", "weren't", "haven't", "don't"} | {"be"}
NUMBER = {"he": 1, "she": 1, "it": 1, "they": 2, "I": 0, "we": 2, "you": 2}
ONE = {"a", "an", "this", "that", "each", "every"}
MANY = {"two", "three", "four", "many", "these", "those", "both"}
OPERATORS = set(
    listed("is are was were do does did has have can") + listed("will isn't aren't wasn't weren't")
)


@cache
def train_scenes() -> tuple[str, ...]:
    return tuple(tell_scene(f"check/{number}", training=True) for number in range(NUM_SCENES))


def split(scene: str) -> list[str]:
    """Sentences, direct speech apart."""
    return [part.strip('"') for part in re.split(r'(?<=[.!?,])" |(?<=[.!?])"? ', scene)]


def sentences() -> Iterator[list[str]]:
    """Sentences as lists of words and marks; sentence-initial common words in lower case."""
    for scene in train_scenes():
        for sentence in split(scene):
            words = re.findall(r"[A-Za-z']+|[.,!?]", sentence)
            if words:
                first = words[0]
                yield [first if first in NAMES or first == "I" else first.lower(), *words[1:]]


def noun_after(words: list[str], start: int) -> tuple[str, int] | None:
    """The noun of the phrase that begins at `start`, past its adjectives, and where it is."""
    while start < len(words) and words[start] in ADJECTIVES:
        start += 1
    return (words[start], start) if start < len(words) else None


def is_plural(noun: str) -> bool:
    return noun in PLURALS


def test_a_scene_is_one_line_of_five_to_twelve_sentences() -> None:
    lengths = Counter()
    for scene in train_scenes():
        assert "\n" not in scene
        assert "  " not in scene
        assert scene == scene.strip()
        ends = len(re.findall(r'[.!?]"?(?= |$)', scene))
        lengths[5 <= ends <= 16] += 1  # a line of dialogue may hold two marks
        assert scene.count(" ") > 10
    assert lengths[True] > 0.97 * NUM_SCENES


def test_determiners_agree_with_their_nouns() -> None:
    checked = Counter()
    for words in sentences():
        for index, word in enumerate(words[:-1]):
            if word not in ONE | MANY or words[index + 1] in OPERATORS | {"day"}:
                continue
            found = noun_after(words, index + 1)
            if found is None or found[0].removesuffix("'s").removesuffix("'") not in NOUNS:
                continue
            if word == "that" and words[index - 1] not in ("see", "sees", "has", "is"):
                continue  # a conjunction or relative pronoun
            noun = found[0].removesuffix("'s").removesuffix("'")
            checked[word] += 1
            assert is_plural(noun) == (word in MANY), words
            if word in ("a", "an"):
                assert (words[index + 1][0] in "aeiou") == (word == "an"), words
    assert sum(checked.values()) > 2_000
    assert min(checked[word] for word in ("a", "an", "two", "many", "this", "each", "both")) > 1


def test_there_is_agrees_with_what_follows() -> None:
    checked = Counter()
    for words in sentences():
        if "there" not in words or words[-1] == "?":
            continue
        at = words.index("there") + 1
        if words[at] not in FINITE and words[at] not in FINITE.values():
            continue
        found = noun_after(words, at + 2)
        if found is None or found[0] not in NOUNS | MASS:
            continue
        plural = words[at] in FINITE.values()
        assert is_plural(found[0]) == plural, words
        checked[plural, words[at + 1] in ("any", "no")] += 1
    assert len(checked) == 4
    assert min(checked.values()) > 3


def subject_at(words: list[str], start: int) -> tuple[int, int] | None:
    """Number (1 or 2; 0 for I) of the subject that begins at `start`, and where it ends."""
    first = words[start]
    if first in NUMBER:
        return NUMBER[first], start + 1
    if first in NAMES:
        if words[start + 1] == "and" and (words[start + 2] in NAMES):
            return 2, start + 3
        return (1, start + 1) if words[start + 1] not in ("'s", "and") else None
    if first in {"nobody", "everybody"}:
        return 1, start + 1
    if first not in {"the", "some", "no", "his", "her", "their"} | ONE | MANY:
        return None
    found = noun_after(words, start + 1)
    if found is None or found[0] not in NOUNS | MASS or words[found[1] + 1] == "and":
        return None
    return 2 if is_plural(found[0]) else 1, found[1] + 1


def agrees(number: int, verb: str) -> bool:
    if verb in FINITE:
        return number == 1 or (number == 0 and verb in ("was", "wasn't"))
    if verb in FINITE.values():
        return number == 2 or (number == 0 and verb not in ("are", "were"))
    return True


def test_verbs_agree_with_the_subject_before_them() -> None:
    checked = Counter()
    for words in sentences():
        subject = subject_at(words, 0)
        if subject is None:
            continue
        number, at = subject
        if words[at] in ("always", "never"):
            at += 1
        assert agrees(number, words[at]), words
        if words[at] in FINITE or words[at] in FINITE.values():
            checked[number, words[at] in ("is", "are", "was", "were")] += 1
    assert min(checked[key] for key in ((1, True), (1, False), (2, True), (2, False))) > 40


def test_verbs_agree_across_a_prepositional_phrase() -> None:
    checked = Counter()
    for words in sentences():
        subject = subject_at(words, 0)
        if subject is None or words[subject[1]] not in ("near", "behind", "on", "under", "in"):
            continue
        number, at = subject
        inner = subject_at(words, at + 1)
        if words[at + 1] in ("him", "her", "them", "it"):
            inner = (2 if words[at + 1] == "them" else 1, at + 2)
        if inner is None:
            continue
        verb = words[inner[1]]
        assert agrees(number, verb), words
        checked[number, inner[0]] += 1
    assert len(checked) == 4  # both numbers, behind attractors of both numbers
    assert min(checked.values()) > 10


def test_verbs_agree_across_a_relative_clause() -> None:
    checked = Counter()
    for words in sentences():
        subject = subject_at(words, 0)
        if subject is None or words[subject[1]] not in ("who", "that"):
            continue
        number, at = subject
        inner = subject_at(words, at + 1)
        if inner is None:
            assert agrees(number, words[at + 1]), words  # the dog that chases
        else:
            assert agrees(inner[0], words[inner[1]]), words  # the dog that the boys chase
        last = [word for word in words[at + 2 :] if word in OPERATORS and word != "have"][-1:]
        for verb in last:
            assert agrees(number, verb), words
            checked[number, inner is None] += 1
    assert min(checked[key] for key in ((1, True), (1, False), (2, True), (2, False))) > 10


def test_reflexives_match_their_subject() -> None:
    checked = Counter()
    expected = {"himself": (1, "m"), "herself": (1, "f"), "themselves": (2, "")}
    for words in sentences():
        found = [word for word in words if word in ("himself", "herself", "themselves", "itself")]
        if not found or words[-1] == "?" or words[0] in ("then", "now", "one"):
            continue
        subject = subject_at(words, 0)
        if subject is None or {"that", "who", "knows", "knew", "sees", "saw"} & set(words[1:-1]):
            continue
        number, gender = expected[found[0]]
        assert subject[0] == number, words
        if words[0] in HER | {"she"} or {"girl", "woman"} & set(words[: subject[1]]):
            assert gender in ("f", ""), words
        if words[0] in HIM | {"he"} or {"boy", "man"} & set(words[: subject[1]]):
            assert gender in ("m", ""), words
        checked[found[0]] += 1
    assert min(checked[word] for word in expected) > 20
    assert "itself" not in checked


def test_questions_invert_and_statements_do_not() -> None:
    starts = OPERATORS | {"who", "what", "where", "which", "whose", "why", "how"}
    for words in sentences():
        tagged = "," in words and words[-2] in NUMBER
        if words[-1] == "?" and not tagged:
            assert words[0] in starts, words
            if words[0] in ("what", "where", "why") and words[1] not in FINITE:
                assert words[1] in OPERATORS or words[1] in ("rolled", "rolls"), words
        if words[-1] == "." and "," not in words:
            assert words[0] not in OPERATORS, words


def test_operators_of_do_are_followed_by_bare_verbs() -> None:
    checked = 0
    for words in sentences():
        for before, after in pairwise(words):
            if before in ("didn't", "doesn't", "don't", "can't", "won't") and after.isalpha():
                if after in NUMBER or after in NAMES:
                    continue  # a tag
                assert after in BASES | {"have", "read", "put", "bite", "hurt"}, words
                checked += 1
    assert checked > 200


def test_any_and_ever_are_licensed() -> None:
    checked = Counter()
    negative = re.compile(r"n't$|^(nobody|no|never)$")
    for words in sentences():
        for word in ("any", "ever"):
            if word not in words:
                continue
            before = words[: words.index(word)]
            if "but" in before:
                before = before[before.index("but") :]
            licensed = words[-1] == "?" or any(negative.search(other) for other in before)
            assert licensed, words
            checked[word] += 1
    assert checked["any"] > 100
    assert checked["ever"] > 20


def test_short_answers_agree() -> None:
    checked = Counter()
    for scene in train_scenes():
        for answer, pronoun, operator in re.findall(r"\b(Yes|No), (\w+) ([\w']+)\.", scene):
            assert ("n't" in operator) == (answer == "No"), scene
            assert agrees(NUMBER[pronoun], operator), (pronoun, operator)
            checked[answer] += 1
    assert min(checked["Yes"], checked["No"]) > 100


def test_meaning_restricts_words() -> None:
    text = " ".join(train_scenes())
    assert re.search(r"\b(ate|eats|eaten) [a-z ]*(apples?|cookies?|soup)\b", text)
    assert not re.search(r"\b(ate|eats|eat|eaten) (the|a|some|any) \w*(cups?|dolls?|hats?)\b", text)
    assert not re.search(r"\b(cows?|pigs?) (fly|flies|flew) ", text)
    assert re.search(r"\b(ducks?|frogs?|dogs?) (swim|swims|swam|can swim)", text)


# -- held-out combinations ----------------------------------------------------------------------


def _lemmas() -> tuple[dict[str, str], dict[str, str]]:
    verbs = {}
    for verb in {*lex.INTRANSITIVE, *lex.TRANSITIVE, lex.ROLL}:
        if not verb.common:
            for form in (verb.base, verb.third, verb.past, verb.gerund):
                verbs[form] = verb.base
    nouns = {plural: singular for singular, plural in PLURAL_OF.items()}
    nouns |= {word: word for word in SINGULARS | MASS} | {name: name.lower() for name in NAMES}
    return nouns, verbs


def combinations(scenes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Adjective and noun, subject and verb, wherever a sentence begins with its subject."""
    nouns, verbs = _lemmas()
    for scene in scenes:
        for sentence in split(scene):
            words = re.findall(r"[A-Za-z']+", sentence)
            for adjective, noun in pairwise(words):
                if adjective in ADJECTIVES and noun in nouns:
                    yield adjective, nouns[noun]
            start = 0 if words and words[0] in NAMES else 1
            found = noun_after(words, start)
            if found is None or found[0] not in nouns:
                continue
            noun, at = nouns[found[0]], found[1] + 1
            operator = words[at] if at < len(words) else ""
            if operator in OPERATORS | {"can't", "won't", "didn't", "doesn't", "don't"}:
                at += 1
            verb = words[at] if at < len(words) else ""
            passive = operator in ("was", "were") and not verb.endswith("ing")
            if verb in verbs and not passive:
                yield noun, verbs[verb]
            if operator in ("is", "are", "was", "were") and verb in ADJECTIVES:
                yield verb, noun


def _is_out(pair: tuple[str, str]) -> bool:
    return crc32(" ".join(pair).encode()) % 10 == 0


def test_held_out_combinations_are_in_dev_and_not_in_train() -> None:
    train = set(combinations(train_scenes()))
    dev = set(
        combinations(tuple(tell_scene(f"dev/{number}", training=False) for number in range(300)))
    )
    assert len(train) > 500
    assert not {pair for pair in train if _is_out(pair)}
    assert len({pair for pair in dev if _is_out(pair)}) > 20


def test_the_language_has_a_few_hundred_words() -> None:
    words = Counter(
        word.removesuffix("'s").strip("'")
        for scene in train_scenes()
        for word in re.findall(r"[a-z']+", scene.lower())
    )
    assert 380 <= len(words) <= 500
    frequent = sum(count for _, count in words.most_common(50))
    assert 0.45 < frequent / sum(words.values()) < 0.75  # skewed, like speech


@pytest.mark.parametrize("training", [True, False])
def test_a_scene_is_a_function_of_its_seed(training: bool) -> None:
    first, again, other = (tell_scene(seed, training=training) for seed in ("a", "a", "b"))
    assert first == again != other
