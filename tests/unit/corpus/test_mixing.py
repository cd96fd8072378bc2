"""Mixes: as many words of each source as the weights or the budgets say, and not one line more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babyllama_ds.corpus.sources import iter_text, read_sources
from babyllama_ds.errors import DataError, Stopped
from babyllama_ds.spec.corpus import MixCorpus

Given = list[tuple[str, list[str]]]


def numbered(name: str, lines: int, words: int = 10) -> str:
    """So many lines of so many words, each unlike all others."""
    return "".join(f"{' '.join([f'{name}{i}'] * words)}\n" for i in range(lines))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write train and development files; the `files` corpus of them."""

    def make(name: str, *trains: str) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for number, text in enumerate(trains):
            stem = name if len(trains) == 1 else f"{name}{number}"
            (folder / f"{stem}.train").write_text(text)
            (folder / f"{stem}.dev").write_text(f"held out of {stem}\n")
        split = {"kind": "held_out", "dev": [str(folder / "*.dev")]}
        train = [str(folder / "*.train")]
        return {"kind": "files", "train": train, "split": split, "cleaning": "none"}

    return make


def mixed(*sources: dict[str, Any], **keys: Any) -> MixCorpus:
    text = json.dumps({"kind": "mix", "sources": sources, **keys})
    return MixCorpus.model_validate_json(text)


def texts(spec: MixCorpus, split: Any = "train") -> Given:
    return [(domain, list(lines)) for domain, lines in iter_text(read_sources(spec), split)]


def words(found: Given) -> dict[str, int]:
    """Words of each domain."""
    return {domain: sum(len(line.split()) for line in lines) for domain, lines in found}


def test_budgets_are_taken_from_the_start_up_to_the_end_of_a_line(write: Any) -> None:
    one, other = write("one", numbered("a", 30)), write("other", numbered("b", 30))
    spec = mixed(
        {"name": "one", "corpus": one, "words": 95}, {"name": "other", "corpus": other, "words": 10}
    )
    assert texts(spec) == [
        ("one", [*numbered("a", 10).splitlines(keepends=True), ""]),
        ("other", [*numbered("b", 1).splitlines(keepends=True), ""]),
    ]
    assert texts(spec) == texts(spec)
    assert texts(spec, "dev") == [
        ("one", ["held out of one\n"]),
        ("other", ["held out of other\n"]),
    ]


def test_weights_are_shares_of_the_words(write: Any) -> None:
    one, other = write("one", numbered("a", 500)), write("other", numbered("b", 500))
    sources = (
        {"name": "one", "corpus": one, "weight": 3.0},
        {"name": "other", "corpus": other, "weight": 1.0},
    )
    assert words(texts(mixed(*sources, words=4000))) == {"one": 3000, "other": 1000}
    # Without a total: all of the source that is shortest for its share.
    assert words(texts(mixed(*sources))) == {"one": 5000, "other": 1670}
    # Of 4002 and 4003 a quarter is a thousand and a part of a word, which no line is read for.
    single = {"name": "one", "corpus": write("one", numbered("a", 5000, words=1)), "weight": 3.0}
    for total in (4002, 4003):
        found = words(texts(mixed(single, sources[1], words=total)))
        assert found == {"one": total * 3 // 4, "other": 1000}


def test_texts_of_a_source_are_read_in_order(write: Any) -> None:
    """A source of several files keeps their domains, behind its own name."""
    many = write("many", numbered("a", 4), numbered("b", 4), numbered("c", 4))
    found = texts(mixed({"name": "all", "corpus": many, "words": 61}))
    assert words(found) == {"all/many0": 40, "all/many1": 30}
    assert [domain for domain, _ in found] == ["all/many0", "all/many1"]
    assert found[0][1][-1] != ""  # whole: nothing was cut
    assert found[1][1][-1] == ""


def test_the_order_of_asking_does_not_matter(write: Any) -> None:
    many = write("many", numbered("a", 4), numbered("b", 4))
    sources = read_sources(mixed({"name": "all", "corpus": many, "words": 61}))
    opened = list(iter_text(sources, "train"))
    assert [domain for domain, _ in opened] == ["all/many0", "all/many1"]
    assert [len(list(lines)) for _, lines in reversed(opened)] == [4, 4]


def test_a_source_that_repeats(write: Any) -> None:
    short, long = write("short", numbered("a", 3)), write("long", numbered("b", 50))
    sources = (
        {"name": "short", "corpus": short, "weight": 1.0, "repeat": True},
        {"name": "long", "corpus": long, "weight": 1.0},
    )
    found = texts(mixed(*sources, words=160))
    assert [domain for domain, _ in found] == ["short", "short", "short", "long"]
    assert "".join(found[0][1] + found[1][1] + found[2][1]) == numbered("a", 3) * 2 + numbered(
        "a", 2
    )
    # Without a total, what repeats sets no bound.
    assert sum(words([each])["short"] for each in texts(mixed(*sources))[:-1]) == 500


def test_rows_stay_documents(tmp_path: Path, write: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"a {i}\nb {i}"}) for i in range(10)))
    split = {"kind": "tail", "fraction": 0.2}
    spec = {"kind": "files", "train": [str(rows)], "split": split}
    found = texts(mixed({"name": "rows", "corpus": spec, "words": 10}))
    assert found == [("rows", ["a 0\n", "b 0\n", "", "a 1\n", "b 1\n", "", "a 2\n", ""])]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    lines=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=3),
    budget=st.integers(1, 40),
    repeat=st.booleans(),
)
def test_against_the_obvious_way(
    write: Any, tmp_path: Path, lines: list[list[int]], budget: int, repeat: bool
) -> None:
    """All text in a list, lines taken from it until there are words enough."""
    trains = [
        "".join("w \t " * n + f"{i}{j}\n" for j, n in enumerate(each))
        for i, each in enumerate(lines)
    ]
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    source = {"name": "s", "corpus": write("s", *trains), "words": budget, "repeat": repeat}
    supply = "".join(trains).splitlines(keepends=True)
    expected: list[str] = []
    while sum(len(line.split()) for line in expected) < budget:
        place = len(expected)
        if place >= len(supply) and not repeat:
            break
        expected.append(supply[place % len(supply)])
    if sum(len(line.split()) for line in expected) < budget:
        with pytest.raises(DataError, match="runs dry"):
            read_sources(mixed(source))
        return
    found = [line for _, each in texts(mixed(source)) for line in each if line]
    assert found == expected


# -- fingerprints --------------------------------------------------------------------------------


def test_the_fingerprint_follows_what_is_taken(write: Any, tmp_path: Path) -> None:
    one, other = write("one", numbered("a", 30)), write("other", numbered("b", 30))

    def fingerprint(**keys: Any) -> str:
        return read_sources(
            mixed(
                {"name": keys.get("name", "one"), "corpus": one, "words": keys.get("words", 95)},
                {"name": "other", "corpus": other, "words": 50},
            )
        ).fingerprint()

    original = fingerprint()
    assert fingerprint(words=100) == original  # the same ten lines
    different = {fingerprint(words=101), fingerprint(name="uno")}
    (tmp_path / "other" / "other.dev").write_text("other text\n")
    different.add(fingerprint())
    assert len(different | {original}) == 4


# -- what is refused -----------------------------------------------------------------------------


def test_a_mix_that_runs_dry(write: Any) -> None:
    one, other = write("one", numbered("a", 30)), write("other", numbered("b", 30))
    budgets = mixed(
        {"name": "one", "corpus": one, "words": 301}, {"name": "other", "corpus": other, "words": 3}
    )
    with pytest.raises(DataError) as caught:
        read_sources(budgets)
    assert str(caught.value) == (
        "corpus.sources[0]: got 300 words of training text in 'one': the mix runs dry, expected at "
        "least 301, its budget\n"
        "    hint: words: 300 is all there is of it; or `repeat: true` begins it again"
    )

    def weighed(total: int, weight: float) -> MixCorpus:
        return mixed(
            {"name": "one", "corpus": one, "weight": weight},
            {"name": "other", "corpus": other, "weight": 1.0},
            words=total,
        )

    with pytest.raises(DataError) as caught:
        read_sources(weighed(500, 3.0))
    assert str(caught.value) == (
        "corpus.sources[0]: got 300 words of training text in 'one': the mix runs dry, expected at "
        "least 375, its share of corpus.words (500)\n"
        "    hint: corpus.words: 400 would do, or weight: 1.5 here; or `repeat: true` begins it "
        "again"
    )
    assert words(texts(weighed(400, 3.0))) == {"one": 300, "other": 100}
    assert words(texts(weighed(500, 1.5))) == {"one": 300, "other": 200}
    with pytest.raises(DataError) as caught:
        read_sources(weighed(5000, 1.0))
    assert [problem.where for problem in caught.value.problems] == [
        "corpus.sources[0]",
        "corpus.sources[1]",
    ]


@pytest.mark.parametrize("place", ["train", "dev"])
def test_the_same_text_in_two_sources(write: Any, tmp_path: Path, place: str) -> None:
    one, other = write("one", numbered("a", 9)), write("other", numbered("b", 9))
    (tmp_path / "other" / f"other.{place}").write_text(numbered("a", 9))
    spec = mixed(
        {"name": "one", "corpus": one, "words": 9}, {"name": "other", "corpus": other, "words": 9}
    )
    with pytest.raises(DataError) as caught:
        read_sources(spec)
    (problem,) = caught.value.problems
    assert problem.where == "corpus.sources[1].corpus"
    assert problem.got == (
        f"{tmp_path}/other/other.{place}, whose content source 'one' has too "
        f"({tmp_path}/one/one.train)"
    )


def test_a_problem_of_a_source_is_told_at_its_place(write: Any) -> None:
    one = write("one", numbered("a", 9))
    other = {**one, "train": ["/no/such.txt"]}
    with pytest.raises(DataError, match=r"corpus\.sources\[1\]\.corpus\.train: got '/no/such"):
        read_sources(
            mixed(
                {"name": "one", "corpus": one, "words": 9},
                {"name": "two", "corpus": other, "words": 9},
            )
        )


def test_check_can_stop_the_counting(write: Any) -> None:
    calls = 0

    def stop_late() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:  # after the files' own blocks
            raise Stopped("SIGTERM")

    one = write("one", numbered("a", 9000))
    with pytest.raises(Stopped):
        read_sources(mixed({"name": "one", "corpus": one, "words": 90_000}), check=stop_late)


def test_check_can_stop_the_counting_of_many_short_texts(write: Any) -> None:
    calls = 0

    def stop_late() -> None:
        nonlocal calls
        calls += 1
        if calls > 45:  # after the one block of each of 40 files
            raise Stopped("SIGTERM")

    one = write("one", *(numbered(f"a{number}", 1) for number in range(20)))
    with pytest.raises(Stopped):
        read_sources(mixed({"name": "one", "corpus": one, "words": 200}), check=stop_late)


def test_a_hub_dataset_beside_files(tmp_path: Path) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [{"text": f"{split} {i}", "source": ["b", "a"][i % 2]} for i in range(6)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"other {i}"}) for i in range(9)))
    tail = {"kind": "tail", "fraction": 0.5}

    def spec(path: Path, **keys: Any) -> MixCorpus:
        files = {"kind": "files", "train": [str(path)], "split": tail}
        hub = {"kind": "hub", "path": str(folder), "split": {"kind": "held_out"}, **keys}
        return mixed(
            {"name": "files", "corpus": files, "words": 3},
            {"name": "hub", "corpus": hub, "words": 7},
        )

    assert texts(spec(other)) == [
        ("files", ["other 0\n", "", "other 1\n", ""]),
        ("hub", [piece for i in range(4) for piece in (f"train {i}\n", "")]),
    ]
    by_domain = spec(other, domain_column="source")
    assert words(texts(by_domain)) == {"files": 4, "hub/b": 6, "hub/a": 2}
    assert list(words(texts(by_domain, "dev"))) == ["files", "hub/b", "hub/a"]
    with pytest.raises(DataError, match=r"tales \(train\), whose content source 'files' has too"):
        read_sources(spec(folder / "train.jsonl"))
