"""YAML scalars of the core schema, places, and what is not YAML."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama_ds.errors import JobError
from babyllama_ds.spec.document import MAX_VALUES, Place, key_text, read_document, show


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("2.", 2.0),
        ("-0.0", -0.0),
        ("12", 12),
        ("-7", -7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", 1000),
        ("150_000_000", 150_000_000),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        # Text, whatever YAML 1.1 made of it.
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("2024_01", "2024_01"),
        ("1__000", "1__000"),
        ("0_1", "0_1"),
        ("12:30:45", "12:30:45"),
        ("2024-01-31", "2024-01-31"),
        ("1e", "1e"),
        ("'12'", "12"),
        ("!!str 12", "12"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    got = read_document(f"key: {text}\n", "f")
    assert got.data == {"key": value}
    assert type(got.data["key"]) is type(value)
    assert not got.found


@pytest.mark.parametrize(("text", "value"), [(".inf", math.inf), ("-.INF", -math.inf)])
def test_infinity_is_read(text: str, value: float) -> None:
    assert read_document(text, "f").data == value


def test_places_of_nested_values() -> None:
    text = "a: 1\nlist:\n  - name: x\n    deep:\n      er: 2\n  - {name: y, flow: [1,\n      2]}\n"
    document = read_document(text, "f")
    lines = {key_text(path): place.source for path, place in document.places.items()}
    assert lines == {
        "": "f:1",
        "a": "f:1",
        "list": "f:2",
        "list[0]": "f:3",
        "list[0].name": "f:3",
        "list[0].deep": "f:4",
        "list[0].deep.er": "f:5",
        "list[1]": "f:6",
        "list[1].name": "f:6",
        "list[1].flow": "f:6",
        "list[1].flow[0]": "f:6",
        "list[1].flow[1]": "f:7",
    }
    assert document.place(("list", 0, "deep", "absent", "more")).source == "f:4"


def test_duplicate_keys_are_named_with_both_lines() -> None:
    document = read_document("a:\n  x: 1\n  y: 2\n  x: 3\n", "f")
    with pytest.raises(JobError) as caught:
        document.raise_problems()
    (problem,) = caught.value.problems
    assert (problem.source, problem.where) == ("f:4", "a.x")
    assert "f:2" in problem.got


def test_merge_keeps_own_keys_and_their_places() -> None:
    text = "base: &b {x: 1, y: 2}\nnew:\n  y: 3\n  <<: *b\nboth: {<<: [{y: 9}, *b]}\n"
    document = read_document(text, "f")
    assert document.data["new"] == {"x": 1, "y": 3}
    assert document.data["both"] == {"x": 1, "y": 9}
    assert document.places[("new", "y")].source == "f:3"
    assert document.places[("new", "x")].source == "f:1"


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("a: !!python/object:os.system x", "!!python/object:os.system"),
        ("a: !thing x", "!thing"),
        ("a: !!binary aGVsbG8=", "!!binary"),
        ("a: !!set {x}", "!!set"),
        ("a: !!int x", "'x'"),
        ("a: {[1]: 2}", "a mapping or list as a key"),
        ("a: {<<: 5}", "<<: 5"),
    ],
)
def test_what_is_not_plain_data_is_refused(text: str, got: str) -> None:
    document = read_document(text, "f")
    with pytest.raises(JobError) as caught:
        document.raise_problems()
    (problem,) = caught.value.problems
    assert (problem.source, problem.where) == ("f:1", "a")
    assert got in problem.got


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("a: 1\nb: [1\n", "f:3: column 1", None),
        ("a: 1\n\tb: 2\n", "f:2: column 1", "spaces"),
        ("a: b: c\n", "f:1: column 5", "quote"),
        ("a: {b: ${NAME}}\n", "f:1: column 9", '"${NAME}"'),
        ("a: 1\n---\nb: 2\n", "f:2: column 1", None),
        ("a: *none\n", "f:1: column 4", None),
        ("a: 1\nb: \x07\n", "f:2: column 4", None),
        ("[" * 5000, "f: ", None),
    ],
)
def test_text_that_is_not_yaml(text: str, place: str, hint: str | None) -> None:
    with pytest.raises(JobError) as caught:
        read_document(text, "f")
    (problem,) = caught.value.problems
    assert str(problem).startswith(place)
    assert problem.expected == "YAML"
    assert (hint or "") in (problem.hint or "")


def test_aliases_cannot_grow_without_bound() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    with pytest.raises(JobError, match=f"at most {MAX_VALUES:,} values"):
        read_document("\n".join(lines), "f")


def test_an_alias_inside_its_own_anchor_is_refused() -> None:
    with pytest.raises(JobError, match=r"f:1: a\[0\]: got an alias inside its own anchor"):
        read_document("a: &a [*a]\n", "f")


@given(text=st.text(alphabet="ab:-{}[],&*!#|>'\"$\\%@ \n\t0.", max_size=25) | st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        places = read_document(text, "f").places
    except JobError:
        return
    assert () in places


def test_a_fixed_place_is_used_throughout() -> None:
    place = Place("command line: a=1", 5)
    assert set(read_document("{b: [1, 2]}", "x", place=place).places.values()) == {place}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ("x", "'x'"),
        ([1, 2], "a list of 2"),
        ({"a": 1}, "a mapping (a)"),
        ({}, "a mapping (empty)"),
        ("y" * 100, "'" + "y" * 58 + "…"),
    ],
)
def test_values_are_shown_short(value: object, text: str) -> None:
    assert show(value) == text
