"""Minimal pairs: right ones differ from wrong ones in one point, and nothing gives them away."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from zlib import crc32

import pytest

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery import write
from babyllama_ds.corpus.nursery.held_out import Draw
from babyllama_ds.corpus.nursery.pairs import TASKS, Pair, Task, distinct_pairs
from babyllama_ds.corpus.nursery.write import write_nursery
from babyllama_ds.errors import DataError

NAMES = [task.name for task in TASKS]
LONG_DISTANCE = [
    "anaphor_gender_agreement", "anaphor_number_agreement", "agreement_across_pp",
    "agreement_across_relative_clause", "npi_licensing", "question_inversion", "wh_gap",
]  # fmt: skip
PER_TASK = 120
KEYS = {"sentence_good", "sentence_bad", "field", "linguistics_term", "UID", "pair_id"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nursery")
    write_nursery(directory, words=50_000, dev_words=500, pairs_per_task=PER_TASK, seed=7)
    return directory


@cache
def read_pairs(path: Path) -> tuple[Pair, ...]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(Pair(record["sentence_good"], record["sentence_bad"]) for record in records)


def pairs_of(corpus: Path, name: str) -> tuple[Pair, ...]:
    return read_pairs(corpus / "pairs" / f"{name}.jsonl")


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z']+|[.,?]", sentence.lower())


# -- files --------------------------------------------------------------------------------------


def test_there_is_a_file_for_each_task(corpus: Path) -> None:
    assert sorted(path.stem for path in (corpus / "pairs").iterdir()) == sorted(NAMES)
    assert 10 <= len(NAMES) <= 14


@pytest.mark.parametrize("name", NAMES)
def test_files_are_in_blimp_s_format(corpus: Path, name: str) -> None:
    lines = (corpus / "pairs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["pair_id"] for record in records] == list(range(PER_TASK))
    for record in records:
        assert set(record) == KEYS
        assert record["UID"] == name
        assert record["field"] in ("morphology", "syntax", "semantics")
    assert len({record["sentence_good"] for record in records}) == PER_TASK


# -- what a pair is -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_sentences_differ_minimally(corpus: Path, name: str) -> None:
    for good, bad in pairs_of(corpus, name):
        assert good != bad
        first, second = words(good), words(bad)
        assert len(first) == len(second)
        changed = sum(one != other for one, other in zip(first, second, strict=True))
        assert changed == 1 or Counter(first) == Counter(second), (good, bad)
        for sentence in (good, bad):
            assert re.fullmatch(r"[A-Z][A-Za-z', ]+[.?]", sentence)
            assert "  " not in sentence


@pytest.mark.parametrize("name", NAMES)
def test_training_text_has_the_words_but_not_the_sentences(corpus: Path, name: str) -> None:
    text = (corpus / "train" / "nursery.train").read_text(encoding="utf-8")
    vocabulary = set(words(text))
    for good, bad in pairs_of(corpus, name):
        assert f" {good}" not in text
        assert f" {bad}" not in text
        assert vocabulary.issuperset(words(good) + words(bad)), (good, bad)


@pytest.mark.parametrize("name", ["subject_verb_agreement", "agreement_across_pp"])
def test_agreement_is_tested_on_held_out_combinations(corpus: Path, name: str) -> None:
    lemmas = {noun.singular: noun.singular for noun in (*lex.COMMON, *lex.THINGS)}
    lemmas |= {noun.plural: noun.singular for noun in (*lex.COMMON, *lex.THINGS)}
    for verb in (*lex.INTRANSITIVE, *lex.TRANSITIVE):
        forms = (verb.base, verb.third, verb.past, verb.participle, verb.gerund)
        lemmas |= dict.fromkeys(forms, verb.base)
    for good, _ in pairs_of(corpus, name):
        sentence = [lemmas.get(word, word) for word in words(good)]
        head = next(word for word in sentence if word in lemmas)
        others = [word for word in sentence if word != head]
        actions = [f"{head} {other}" for other in others]
        descriptions = [f"{other} {head}" for other in others]
        assert any(crc32(pair.encode()) % 10 == 0 for pair in actions + descriptions), good


# -- nothing gives them away --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_word_is_right_more_often_than_wrong(corpus: Path, name: str) -> None:
    """Preferring one word to another, whatever the context, is right half of the time."""
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for good, bad in pairs_of(corpus, name):
        right.update(Counter(words(good)) - Counter(words(bad)))
        wrong.update(Counter(words(bad)) - Counter(words(good)))
    for word in right | wrong:
        total = right[word] + wrong[word]
        if total >= 30:
            assert 0.3 < right[word] / total < 0.7, (word, right[word], wrong[word])


@pytest.mark.parametrize("name", NAMES)
def test_frequent_words_do_not_give_the_answer(corpus: Path, name: str) -> None:
    counts = Counter(words((corpus / "train" / "nursery.train").read_text(encoding="utf-8")))

    def score(sentence: str) -> float:
        return sum(math.log(counts[word]) for word in words(sentence))

    points = [_points(score(good) - score(bad)) for good, bad in pairs_of(corpus, name)]
    assert 0.38 < sum(points) / len(points) < 0.62


def _points(difference: float) -> float:
    return 0.5 if abs(difference) < 1e-9 else float(difference > 0)


def test_neighbouring_words_do_not_solve_what_spans_a_distance(corpus: Path) -> None:
    text = (corpus / "train" / "nursery.train").read_text(encoding="utf-8").splitlines()
    before: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for line in text:
        sequence = words(line)
        before.update(sequence[:-1])
        pairs.update(pairwise(sequence))
    size = len(before)

    def score(sentence: str) -> float:
        return sum(
            math.log((pairs[pair] + 1) / (before[pair[0]] + size))
            for pair in pairwise([".", *words(sentence)])
        )

    accuracy = {
        name: sum(_points(score(good) - score(bad)) for good, bad in pairs_of(corpus, name))
        / PER_TASK
        for name in NAMES
    }
    distant = [accuracy[name] for name in LONG_DISTANCE]
    near = [accuracy[name] for name in NAMES if name not in LONG_DISTANCE]
    assert sum(distant) / len(distant) < 0.75, accuracy
    assert min(distant) < 0.6, accuracy
    # The baseline itself works: it solves part of what neighbours decide.
    assert sum(near) / len(near) > sum(distant) / len(distant) + 0.1, accuracy


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_variants_take_turns(task: Task, corpus: Path) -> None:
    pairs = pairs_of(corpus, task.name)
    for number, variant in enumerate(task.variants):
        mine = set(pairs[number :: len(task.variants)])
        made = set(islice(distinct_pairs(variant, f"7/pairs/{task.name}/{number}"), 2 * PER_TASK))
        assert mine <= made


# -- how many there are -------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_every_task_has_a_thousand_pairs(task: Task) -> None:
    share = 1_000 // len(task.variants) + 100
    for variant in task.variants:
        assert len(list(islice(distinct_pairs(variant, "many"), share))) == share


def test_too_few_pairs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_of_three(draw: Draw) -> Pair:
        return Pair(f"The {draw.even('abc')} runs.", "It run.")

    def one_of_nine(draw: Draw) -> Pair:
        return Pair(f"The {draw.even('abc')} or {draw.even('abc')} runs.", "It run.")

    task = Task("tiny", "term", "syntax", (one_of_nine, one_of_three))
    monkeypatch.setattr(write, "TASKS", (task,))
    write_nursery(tmp_path, words=200, dev_words=50, pairs_per_task=6, seed=1)
    assert len(read_pairs(tmp_path / "pairs" / "tiny.jsonl")) == 6
    with pytest.raises(DataError) as caught:
        write_nursery(tmp_path / "other", words=200, dev_words=50, pairs_per_task=8, seed=1)
    assert "tiny" in str(caught.value)
    assert "only 6 distinct pairs" in str(caught.value)
    assert "pairs_per_task=6" in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_pairs_found_in_the_training_text_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write.write_scenes(tmp_path / "text", "1/train", 500, training=True)
    scene = (tmp_path / "text").read_text(encoding="utf-8").splitlines()[1]
    present = re.findall(r"[A-Z][^.!?]*[.!?]", scene)[:3]
    fresh = ["Zoe runs.", "Zoe eats.", "Zoe sits."]

    def some(draw: Draw) -> Pair:
        return Pair(draw.even(present + fresh), "It run.")

    monkeypatch.setattr(write, "TASKS", (Task("some", "term", "syntax", (some,)),))
    write_nursery(tmp_path, words=500, dev_words=50, pairs_per_task=3, seed=1)
    assert {pair.good for pair in read_pairs(tmp_path / "pairs" / "some.jsonl")} == set(fresh)
