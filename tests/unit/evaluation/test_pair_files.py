"""Files of minimal pairs and their like: every format is read, bad lines are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from babyllama_ds.errors import DataError
from babyllama_ds.evaluation.pair_files import Candidate, Item, load_tasks


def write_lines(path: Path, *lines: object) -> None:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )


def record(good="the cat sees", bad="the cat see", **more):
    return {"sentence_good": good, "sentence_bad": bad, **more}


def pair(good: str, bad: str, path: Path, line: int) -> Item:
    return Item((Candidate(good), Candidate(bad)), f"{path}:{line}")


def test_tasks_are_read_in_order_of_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "b_plain.jsonl", record("é", "e"), "", record("c", "d"))
    facts = {"field": "syntax", "linguistics_term": "island_effects", "UID": "x"}
    write_lines(tmp_path / "a_island.jsonl", record(**facts), record("x", "y", **facts))
    write_lines(tmp_path / "notes.txt", "not a task")
    island, plain = load_tasks(tmp_path, max_pairs=None)
    assert (island.name, island.term) == ("a_island", "island_effects")
    path = tmp_path / "a_island.jsonl"
    assert island.items == (pair("the cat sees", "the cat see", path, 1), pair("x", "y", path, 2))
    assert (plain.name, plain.term) == ("b_plain", None)
    path = tmp_path / "b_plain.jsonl"  # of which blank lines count as lines
    assert plain.items == (pair("é", "e", path, 1), pair("c", "d", path, 3))


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path) -> None:
    """As editors leave them; a text's files are read so, too."""
    line = json.dumps(record("玛拉画了", "画了玛拉"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{line}\r\n\r\n{line}\r\n".encode())
    (task,) = load_tasks(tmp_path, max_pairs=None)
    assert task.items == tuple(
        pair("玛拉画了", "画了玛拉", tmp_path / "a.jsonl", line) for line in (1, 3)
    )


def test_only_the_first_pairs_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", record("1", "1"), record("2", "2"), "broken")
    (first,) = load_tasks(tmp_path, max_pairs=2)
    assert [item.candidates[0].sentence for item in first.items] == ["1", "2"]


def test_missing_directory_and_directory_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: got no such directory"):
        load_tasks(tmp_path / "nowhere", max_pairs=None)
    with pytest.raises(DataError, match=r"got no \*\.jsonl files"):
        load_tasks(tmp_path, max_pairs=None)
    write_lines(tmp_path / "a.jsonl", record())
    with pytest.raises(DataError, match="got no such directory"):
        load_tasks(tmp_path / "a.jsonl", max_pairs=None)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"sentence_good": "x"', "expected a JSON object"),
        (b'["x", "y"]', "got a JSON list, expected a JSON object"),
        (b'{"sentence_good": "x"}', "sentence_bad: got nothing, expected a sentence"),
        (b'{"sentence_good": 3, "sentence_bad": "x"}', "sentence_good: got a int, expected a"),
        (b'{"sentence_good": "caf\xe9", "sentence_bad": "x"}', "byte 0xe9 at offset 22"),
        (
            b'{"sentence_good": "x", "sentence_bad": "a \\ud83d b"}',
            "sentence_bad: got half of a character (\\ud83d), expected text that is Unicode",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        load_tasks(tmp_path, max_pairs=None)
    assert f"{path}:2: " in str(caught.value)
    assert complaint in str(caught.value)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", "", "")
    with pytest.raises(DataError, match=r"a\.jsonl: got an empty file, expected at least one"):
        load_tasks(tmp_path, max_pairs=None)


def test_a_name_that_is_not_unicode_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    """It would be the task's in the measurement's file, which could not be written."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    write_lines(path, json.dumps(record()))
    with pytest.raises(DataError, match=r"caf\\xe9\.jsonl: got a file name that is not UTF-8"):
        load_tasks(tmp_path, max_pairs=None)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl: got Is a directory, expected a readable file"):
        load_tasks(tmp_path, max_pairs=None)


def test_the_supplements_lines(tmp_path: Path) -> None:
    """No term, no UID; fields of its own, some of them null; two lines in a sentence."""
    dialogue = {
        "quad": "(('you', 'I'), ('she', 'I'))",
        "type": "single",
        "length": "short",
        "other": None,
        "sentence_good": "Dan: Should you go?\nMeg: No, I shouldn't.",
        "sentence_bad": "Dan: Should she go?\nMeg: No, I shouldn't.",
    }
    inversion = {"pair_ID": 0, "row": 0, "ambiguous": False, "template": "x", **record()}
    write_lines(tmp_path / "turn_taking.jsonl", dialogue, dialogue)
    write_lines(tmp_path / "subject_aux_inversion.jsonl", inversion)
    aux, turns = load_tasks(tmp_path, max_pairs=None)
    path = tmp_path / "turn_taking.jsonl"
    assert turns.items[1] == pair(dialogue["sentence_good"], dialogue["sentence_bad"], path, 2)
    assert (turns.name, turns.term) == ("turn_taking", None)
    assert (aux.name, len(aux.items)) == ("subject_aux_inversion", 1)


def test_a_term_that_is_null_is_none(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", record(linguistics_term=None))
    (task,) = load_tasks(tmp_path, max_pairs=None)
    assert task.term is None


def test_what_is_not_used_of_a_line_may_be_anything(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", record(field=["syntax"], UID=3))
    assert len(load_tasks(tmp_path, max_pairs=None)) == 1


def test_a_term_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", record(linguistics_term=["binding"]))
    with pytest.raises(DataError, match=r"a\.jsonl:1: linguistics_term: got a list, expected a JS"):
        load_tasks(tmp_path, max_pairs=None)


def test_the_hint_names_what_named_the_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"see `evaluation\.minimal_pairs\[\]\.path`"):
        load_tasks(tmp_path, max_pairs=None)
    with pytest.raises(DataError, match="see `--pairs`"):
        load_tasks(tmp_path, max_pairs=None, where="--pairs")


# -- the other formats ----------------------------------------------------------------------------


def ewok(domain="social", context="Mia hid the key.", **changes):
    facts = {"Context2": "Mia lost the key.", "ContextType": "direct", "ContextDiff": "verb"}
    targets = {"Target1": "She knows where it is.", "Target2": "She looks for it."}
    return {"Context1": context, "Domain": domain, **targets, **facts, **changes}


def entity(numops=2, **changes):
    facts = {"input_prefix": "Box 1 holds a cup. Box 1 holds", "numops": numops}
    return {**facts, "options": [" a cup.", " a hat.", " two hats."], **changes}


def comps(**changes):
    contexts = {"prefix_acceptable": "A wren", "prefix_unacceptable": "A trout"}
    return {**contexts, "property_phrase": "can fly.", "property": "fly", **changes}


FORMATS = {"blimp": record(), "ewok": ewok(), "entity": entity(), "comps": comps()}


def parts(item: Item) -> list[tuple[str, str]]:
    """What is context, and what is scored, of each candidate."""
    return [(text[:start], text[start:]) for text, start in item.candidates]


def test_what_is_scored_in_each_format(tmp_path: Path) -> None:
    for name, line in FORMATS.items():
        write_lines(tmp_path / f"{name}.jsonl", line)
    items = {task.name: task.items[0] for task in load_tasks(tmp_path, max_pairs=None)}
    assert {name: parts(item) for name, item in items.items()} == {
        "blimp": [("", "the cat sees"), ("", "the cat see")],
        "comps": [("A wren ", "can fly."), ("A trout ", "can fly.")],
        "entity_2_ops": [
            ("Box 1 holds a cup. Box 1 holds", option)
            for option in (" a cup.", " a hat.", " two hats.")
        ],
        "social": [
            ("Mia hid the key.", " She knows where it is."),
            ("Mia hid the key.", " She looks for it."),
        ],
    }
    assert items["social"].source == f"{tmp_path / 'ewok.jsonl'}:1"


def test_tasks_are_grouped_by_what_the_lines_say(tmp_path: Path) -> None:
    """A task may have lines of several files, and a file lines of several tasks."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_lines(one, ewok("spatial"), ewok("social"), "", ewok("spatial", "Mia hid a key."))
    write_lines(two, ewok("zoo"), ewok("social", "Tom hid the key."))
    write_lines(tmp_path / "plain.jsonl", entity(3), entity(0), entity("3"))
    tasks = load_tasks(tmp_path, max_pairs=None)
    lines = {task.name: [item.source for item in task.items] for task in tasks}
    plain = tmp_path / "plain.jsonl"
    assert list(lines.items()) == [  # by the file that begins them, then by name
        ("social", [f"{one}:2", f"{two}:2"]),
        ("spatial", [f"{one}:1", f"{one}:4"]),
        ("plain_0_ops", [f"{plain}:2"]),
        ("plain_3_ops", [f"{plain}:1", f"{plain}:3"]),
        ("zoo", [f"{two}:1"]),
    ]
    first = load_tasks(tmp_path, max_pairs=1)
    assert {task.name: [item.source for item in task.items] for task in first} == {
        name: sources[:1] for name, sources in lines.items()
    }


def test_whatever_else_a_line_says_leaves_it_blimps(tmp_path: Path) -> None:
    """As before other formats were read, one that has fields of theirs too."""
    write_lines(tmp_path / "a.jsonl", {**entity(), **record()}, record("x", "x"))
    (task,) = load_tasks(tmp_path, max_pairs=None)
    assert (task.name, [parts(item)[0][1] for item in task.items]) == ("a", ["the cat sees", "x"])


@pytest.mark.parametrize("name", ["entity", "comps"])
def test_a_field_of_another_format_makes_none_of_it(tmp_path: Path, name: str) -> None:
    """A line is of the format whose fields it has all of."""
    write_lines(tmp_path / "a.jsonl", {**FORMATS[name], "Domain": "x", "sentence_good": "y"})
    (task,) = load_tasks(tmp_path, max_pairs=None)
    write_lines(tmp_path / "a.jsonl", FORMATS[name])
    assert load_tasks(tmp_path, max_pairs=None) == [task]


def test_a_texts_own_spaces_stay(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ewok(context='Mia:\nIt is "x". ', Target1=" He  sat. "))
    (task,) = load_tasks(tmp_path, max_pairs=None)
    assert parts(task.items[0])[0] == ('Mia:\nIt is "x". ', "  He  sat. ")


def one_less(line: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in line.items() if name != key}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({}, "line: got no fields, expected sentence_good, sentence_bad (BLiMP); or Context1"),
        ({"text": "x", "id": 3}, "line: got the fields text, id, expected sentence_good, sent"),
        (one_less(ewok(), "Target2"), "Target2: got nothing, expected a text"),
        (one_less(ewok(), "Domain"), "Domain: got nothing, expected a text"),
        (ewok(Target1=["x"]), "Target1: got a list, expected a text"),
        (ewok(Target2="She knows where it is."), "line: got the first candidate, 'Mia hid the"),
        (ewok(Target2=" \n"), r"Target2: got ' \n', expected a text with words in it"),
        (ewok(context=""), "Context1: got '', expected a text with words in it"),
        (ewok(domain=""), "Domain: got '', expected a text with words in it"),
        (ewok(domain="a\ud800"), r"Domain: got half of a character (\ud800), expected text that"),
        (one_less(entity(), "options"), "options: got nothing, expected a list of two texts or"),
        (entity(options=[]), "options: got a list of 0, expected a list of two texts or more"),
        (entity(options=[" a cup."]), "options: got a list of 1, expected a list of two texts"),
        (entity(options="cup"), "options: got 'cup', expected a list of two texts or more"),
        (entity(options=[" a cup.", 3]), "options[1]: got a int, expected a text"),
        (entity(options=["", " a cup."]), "options[0]: got '', expected a text with words in it"),
        (entity(options=["a", "b", "a"]), "line: got the first candidate, 'Box 1 holds a cup. Box"),
        (one_less(entity(), "numops"), "numops: got nothing, expected a number of operations"),
        (entity(numops=1.5), "numops: got 1.5, expected a number of operations: 0, 1"),
        (entity(numops=-1), "numops: got -1, expected a number"),
        (entity(numops=True), "numops: got True, expected a number"),
        (entity(numops=None), "numops: got None, expected a number"),
        (one_less(comps(), "property_phrase"), "property_phrase: got nothing, expected a text"),
        (comps(property_phrase=""), "property_phrase: got '', expected a text with words in it"),
        (comps(prefix_unacceptable="A wren"), "line: got the first candidate, 'A wren can fly.',"),
    ],
)
def test_what_a_line_lacks_is_named(tmp_path: Path, line, complaint: str) -> None:
    write_lines(tmp_path / "a.jsonl", "", line)
    with pytest.raises(DataError) as caught:
        load_tasks(tmp_path, max_pairs=None)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:2: {complaint}")


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_a_file_has_one_format(tmp_path: Path, first: str, second: str) -> None:
    # Two lines alike: that makes a task of two, and no error.
    write_lines(tmp_path / "a.jsonl", FORMATS[first], FORMATS[second])
    if first == second:
        (task,) = load_tasks(tmp_path, max_pairs=None)
        assert len(task.items) == 2
        return
    with pytest.raises(DataError) as caught:
        load_tasks(tmp_path, max_pairs=None)
    (problem,) = caught.value.problems
    assert problem.source == f"{tmp_path / 'a.jsonl'}:2"
    fields = {
        "blimp": "sentence_good, sentence_bad (BLiMP)",
        "ewok": "Context1, Target1, Target2, Domain (EWoK)",
        "entity": "input_prefix, options, numops (entity tracking)",
        "comps": "prefix_acceptable, prefix_unacceptable, property_phrase (COMPS)",
    }
    assert problem.got == fields[second]
    assert problem.expected == f"{fields[first]}, as in the lines before"
    assert problem.hint is not None


def test_two_formats_do_not_share_a_task(tmp_path: Path) -> None:
    write_lines(tmp_path / "social.jsonl", record())
    write_lines(tmp_path / "world.jsonl", ewok("zoo"), ewok("social"))
    with pytest.raises(DataError) as caught:
        load_tasks(tmp_path, max_pairs=None)
    assert str(caught.value).startswith(
        f"{tmp_path / 'world.jsonl'}:2: task: got 'social' of EWoK, expected another name than "
        f"{tmp_path / 'social.jsonl'}:1 has, of BLiMP\n    hint: "
    )
