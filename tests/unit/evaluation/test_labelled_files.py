"""Files of labelled texts: those of BabyLM's (Super)GLUE are read, whatever is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.errors import DataError
from babyllama_ds.evaluation.labelled_files import FORMS, load_labelled_tasks

Lines = list[Any]

PAIR = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i % 2, "idx": i} for i in range(4)]


def write(folder: Path, name: str, lines: Lines) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )


def write_task(folder: Path, name: str, train: Lines, valid: Lines | None = None) -> None:
    write(folder, f"{name}.train.jsonl", train)
    write(folder, f"{name}.valid.jsonl", train if valid is None else valid)


def refusal(folder: Path, *names: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_labelled_tasks(folder, names or None, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"sentence": "s"}, ("s",)),
        ({"sentence1": "a", "sentence2": "b"}, ("a", "b")),
        ({"question1": "a", "question2": "b"}, ("a", "b")),
        ({"premise": "a", "hypothesis": "b"}, ("a", "b")),
        ({"question": "a", "passage": "b"}, ("a", "b")),
        ({"question": "a", "sentence": "b"}, ("a", "b")),
        (
            {"paragraph": "p", "question": "q", "answer": "{a}"},
            ("Question: q Answer: {a}", "p"),
        ),
        (
            {"text": "t", "span1_text": "one", "span2_text": "two", "span1_index": 0},
            ('Does "two" refer to "one" in this passage?', "t"),
        ),
    ],
)
def test_the_texts_of_each_form(tmp_path: Path, fields: dict, texts: tuple[str, ...]) -> None:
    write_task(tmp_path, "some", [{**fields, "label": 0}, {**fields, "label": 1}])
    (task,) = load_labelled_tasks(tmp_path)
    assert [tuple(example) for example in task.train] == [(texts, 0), (texts, 1)]
    assert list(task.valid) == ["some"]


def test_every_form_is_tried_above() -> None:
    assert len(FORMS) == 8


def test_labels_are_numbered_in_their_order(tmp_path: Path) -> None:
    train = [{"sentence": "s", "label": label} for label in ("no", "yes", "maybe", "yes")]
    write_task(tmp_path, "words", train)
    write_task(tmp_path, "truths", [{"sentence": "s", "label": x} for x in (True, False)])
    truths, words = load_labelled_tasks(tmp_path)
    assert [example.label for example in words.train] == [1, 2, 0, 2]
    assert words.num_labels == 3
    assert [example.label for example in truths.train] == [1, 0]


def test_tasks_are_those_that_are_whole_and_others_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_task(tmp_path, "rte", PAIR)
    write_task(tmp_path, "mnli", PAIR)
    write(tmp_path, "mnli-mm.valid.jsonl", PAIR[:2])
    write(tmp_path, "boolq.valid.jsonl", PAIR)
    write(tmp_path, "qnli.train.jsonl", PAIR)
    mnli, rte = load_labelled_tasks(tmp_path)
    assert (mnli.name, rte.name) == ("mnli", "rte")
    assert {name: len(examples) for name, examples in mnli.valid.items()} == {
        "mnli": 4,
        "mnli-mm": 2,  # learnt from mnli's examples
    }
    assert "boolq is not measured, boolq.train.jsonl is not there" in caplog.text
    assert "qnli is not measured, qnli.valid.jsonl is not there" in caplog.text


def test_what_a_task_lacks_is_what_would_help(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """mnli-mm takes mnli's files: a training text of its own would be of no use."""
    write_task(tmp_path, "rte", PAIR)
    write_task(tmp_path, "mnli-mm", PAIR)
    write(tmp_path, "mnli.train.jsonl", PAIR)
    (task,) = load_labelled_tasks(tmp_path)
    assert task.name == "rte"
    assert "mnli-mm is not measured, mnli.valid.jsonl is not there" in caplog.text


def test_tasks_by_name_in_the_order_given(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_task(tmp_path, name, PAIR)
    assert [task.name for task in load_labelled_tasks(tmp_path, ["c", "a"])] == ["c", "a"]
    told = refusal(tmp_path, "c", "d")
    assert "d.train.jsonl: got no such file" in told
    assert "d.valid.jsonl: got no such file" in told
    write(tmp_path, "mnli-mm.valid.jsonl", PAIR)
    assert "got the task mnli-mm without mnli" in refusal(tmp_path, "a", "mnli-mm")


def test_only_the_first_examples(tmp_path: Path) -> None:
    write_task(tmp_path, "rte", [*PAIR, "broken"])
    (task,) = load_labelled_tasks(tmp_path, max_train=3, max_valid=2)
    assert (len(task.train), len(task.valid["rte"])) == (3, 2)


def test_a_fingerprint_is_of_files_and_limits(tmp_path: Path) -> None:
    def fingerprint(**limits: int) -> str:
        (task,) = load_labelled_tasks(tmp_path, **limits)
        return task.fingerprint

    write_task(tmp_path, "rte", PAIR)
    seen = {fingerprint(), fingerprint(max_train=2), fingerprint(max_valid=2)}
    write_task(tmp_path, "rte", PAIR, PAIR[1:])
    seen.add(fingerprint())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ([], "got an empty file, expected at least one example"),
        (["{"], "x.train.jsonl:1"),
        (["[1]"], "got a JSON list, expected a JSON object"),
        ([{"words": "a", "label": 0}], "got the fields words, label, expected those of a task"),
        ([{"sentence": "a"}], "label: got nothing, expected a whole number or a text"),
        ([{"sentence": "a", "label": 0.5}], "label: got a float"),
        ([{"sentence": 3, "label": 0}], "sentence: got a int, expected a text"),
        ([{"sentence": "\ud800", "label": 0}], "got half of a character"),
        ([{"sentence": "a", "label": 1}], "got only the label 1, expected 2 to 36 labels"),
        ([{"sentence": "a", "label": i} for i in range(37)], "got 37 labels"),
        (
            [PAIR[0], {"premise": "a", "hypothesis": "b", "label": 1}],
            "x.train.jsonl:2: sentence1: got nothing",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, train: Lines, told: str) -> None:
    write_task(tmp_path, "x", train)
    assert told in refusal(tmp_path)


def test_a_label_to_predict_that_cannot_be_learnt(tmp_path: Path) -> None:
    write_task(tmp_path, "x", PAIR, [PAIR[0], {**PAIR[1], "label": 7}])
    assert "x.valid.jsonl:2: label: got 7, expected one of the training examples': 0, 1" in refusal(
        tmp_path
    )


def test_labels_that_a_limit_hides_are_told_of(tmp_path: Path) -> None:
    """Where files are sorted by label, the first examples have one."""
    hint = "hint: more labels may come later: raise max_train_examples"
    write_task(tmp_path, "x", [{"sentence": "a", "label": label} for label in (0, 0, 1, 2)])
    assert f"only the label 0, expected 2 to 36 labels\n    {hint}" in refusal(
        tmp_path, max_train=2
    )
    told = refusal(tmp_path, max_train=3)
    assert f"expected one of the training examples': 0, 1\n    {hint}" in told
    write_task(tmp_path, "x", [{"sentence": "a", "label": 0}])
    assert "hint" not in refusal(tmp_path, max_train=9)


def test_a_metric_of_two_labels_has_two(tmp_path: Path) -> None:
    write_task(tmp_path, "cola", [{"sentence": "a", "label": i} for i in range(3)])
    assert "got 3 labels, expected 2 labels, since cola is measured by mcc" in refusal(tmp_path)


@pytest.mark.parametrize(
    "labels", [("equivalent", "not_equivalent"), (1, 2), (-1, 1)], ids=["words", "from 1", "signs"]
)
def test_f1_is_of_the_label_1(tmp_path: Path, labels: tuple[Any, Any]) -> None:
    """Else it would be of whichever label comes second: of `not_equivalent`."""
    write_task(tmp_path, "mrpc", [{**PAIR[0], "label": label} for label in labels])
    one, other = map(repr, labels)
    assert f"got the labels {one} and {other}, expected 0 and 1, since mrpc is measured" in refusal(
        tmp_path
    )
    write_task(tmp_path, "mrpc", [{**PAIR[0], "label": label} for label in ("1", "0")])
    (task,) = load_labelled_tasks(tmp_path)
    assert [example.label for example in task.train] == [1, 0]


def test_examples_to_predict_have_the_texts_that_were_learnt(tmp_path: Path) -> None:
    """A classifier of two texts is not shown one; fields that mean other texts are ignored."""
    write_task(tmp_path, "x", PAIR, [{"sentence": "a", "label": 1}])
    assert "x.valid.jsonl:1: sentence1: got nothing" in refusal(tmp_path)
    single = [{"sentence": f"s{i}", "label": i} for i in range(2)]
    write_task(tmp_path, "x", single, [{**PAIR[0], **single[0]}])
    (task,) = load_labelled_tasks(tmp_path)
    assert [example.texts for example in task.valid["x"]] == [("s0",)]


def test_directories_without_tasks(tmp_path: Path) -> None:
    assert "got no such directory" in refusal(tmp_path / "nowhere", where="--fine-tune")
    assert "see `--fine-tune`" in refusal(tmp_path, where="--fine-tune")
    write(tmp_path, "x.valid.jsonl", PAIR)
    assert "got no task, expected a directory of labelled tasks" in refusal(tmp_path)
