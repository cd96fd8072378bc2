"""Files of minimal pairs: BLiMP's and its supplement's are read, bad lines are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from babyllama_ds.errors import DataError
from babyllama_ds.evaluation.pair_files import Pair, load_tasks


def write_lines(path: Path, *lines: object) -> None:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )


def record(good="the cat sees", bad="the cat see", **more):
    return {"sentence_good": good, "sentence_bad": bad, **more}


def test_tasks_are_read_in_order_of_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "b_plain.jsonl", record("é", "e"), "", record("c", "d"))
    facts = {"field": "syntax", "linguistics_term": "island_effects", "UID": "x"}
    write_lines(tmp_path / "a_island.jsonl", record(**facts), record("x", "y", **facts))
    write_lines(tmp_path / "notes.txt", "not a task")
    island, plain = load_tasks(tmp_path, max_pairs=None)
    assert (island.name, island.term, island.field) == ("a_island", "island_effects", "syntax")
    assert island.pairs == (Pair("the cat sees", "the cat see", 1), Pair("x", "y", 2))
    assert (plain.name, plain.term, plain.field) == ("b_plain", None, None)
    assert plain.pairs == (Pair("é", "e", 1), Pair("c", "d", 3))  # blank lines count as lines


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path) -> None:
    """As editors leave them; a text's files are read so, too."""
    line = json.dumps(record("玛拉画了", "画了玛拉"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{line}\r\n\r\n{line}\r\n".encode())
    (task,) = load_tasks(tmp_path, max_pairs=None)
    assert task.pairs == (Pair("玛拉画了", "画了玛拉", 1), Pair("玛拉画了", "画了玛拉", 3))


def test_only_the_first_pairs_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", record("1", "1"), record("2", "2"), "broken")
    (first,) = load_tasks(tmp_path, max_pairs=2)
    assert [pair.good for pair in first.pairs] == ["1", "2"]


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
    assert turns.pairs[1] == Pair(dialogue["sentence_good"], dialogue["sentence_bad"], 2)
    assert (turns.name, turns.term, turns.field) == ("turn_taking", None, None)
    assert (aux.name, len(aux.pairs)) == ("subject_aux_inversion", 1)


def test_a_term_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", record(linguistics_term=["binding"]))
    with pytest.raises(DataError, match=r"a\.jsonl:1: linguistics_term: got a list, expected a JS"):
        load_tasks(tmp_path, max_pairs=None)


def test_the_hint_names_what_named_the_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"see `evaluation\.minimal_pairs\[\]\.path`"):
        load_tasks(tmp_path, max_pairs=None)
    with pytest.raises(DataError, match="see `--pairs`"):
        load_tasks(tmp_path, max_pairs=None, where="--pairs")
