"""Files of labelled texts: a directory of `*.jsonl` enters, checked tasks leave.

The format is that of (Super)GLUE in BabyLM's pipeline: `TASK.train.jsonl` and `TASK.valid.jsonl`, a
line an example with its `label` and one text or two. Which fields hold them is known from the first
line to train on; MultiRC's and WSC's three make two texts, worded as the pipeline words them.
Whatever else stands in a line is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from babyllama_ds.errors import DataError, Problem
from babyllama_ds.evaluation.classification import metric_of
from babyllama_ds.evaluation.json_lines import read_records, text_of
from babyllama_ds.files import check_name, hash_json, sha256_file
from babyllama_ds.spec.evaluation import MEASURED_WITH

log = logging.getLogger(__name__)

PATH_KEY = "evaluation.fine_tuning[].path"
TRAIN, VALID = ".train.jsonl", ".valid.jsonl"

LABELS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""How labels are told, by their number."""


class Form(NamedTuple):
    """Which fields an example has, and the texts that they make."""

    fields: tuple[str, ...]
    texts: tuple[str, ...]
    """Templates of one text or two."""


FORMS = (
    Form(("sentence1", "sentence2"), ("{sentence1}", "{sentence2}")),  # MRPC, RTE
    Form(("question1", "question2"), ("{question1}", "{question2}")),  # QQP
    Form(("premise", "hypothesis"), ("{premise}", "{hypothesis}")),  # MNLI
    Form(("question", "passage"), ("{question}", "{passage}")),  # BoolQ
    Form(("question", "sentence"), ("{question}", "{sentence}")),  # QNLI
    Form(
        ("paragraph", "question", "answer"),  # MultiRC
        ("Question: {question} Answer: {answer}", "{paragraph}"),
    ),
    Form(
        ("text", "span1_text", "span2_text"),  # WSC
        ('Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}"),
    ),
    Form(("sentence",), ("{sentence}",)),  # CoLA, SST-2
)
"""The first whose fields an example has is meant."""


class Example(NamedTuple):
    """One text or two, and the number of their label."""

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True, kw_only=True)
class LabelledTask:
    """One classification task."""

    name: str
    train: tuple[Example, ...]
    """At least one of each label."""
    valid: Mapping[str, tuple[Example, ...]]
    """By the name under which they are scored: the task's own first, then those of `MEASURED_WITH`.
    At least one example each."""
    num_labels: int
    """At least 2."""
    fingerprint: str
    """Of its files, and of how much of them is taken."""


def load_labelled_tasks(
    directory: Path,
    names: Sequence[str] | None = None,
    *,
    max_train: int | None = None,
    max_valid: int | None = None,
    where: str = PATH_KEY,
) -> list[LabelledTask]:
    """The tasks by `names` (none: all of which both files are there, by name; another file is told
    of), the first examples of each. `where` is what named the directory.

    Raises:
        DataError: no such directory, no task in it, a file that is missing or not called in UTF-8,
            or (with file:line) a line that is not a UTF-8 JSON object, without the texts of one of
            `FORMS` (of a task always the same) in whole characters, or with a label that is not
            text or a whole number; fewer than 2 labels to train on, more than 36, others than 0
            and 1 where F1 is measured, or one that only the validation text has.
    """
    if not directory.is_dir():
        raise _no_tasks(directory, "no such directory", where)
    names = _complete(directory, where) if names is None else names
    _check_files(directory, names, where)
    return [
        _load_task(
            directory,
            name,
            [other for other in names if MEASURED_WITH.get(other) == name],
            max_train,
            max_valid,
        )
        for name in names
        if name not in MEASURED_WITH
    ]


def _complete(directory: Path, where: str) -> list[str]:
    """The tasks that can be measured; what else looks like one is told of."""
    there = {path.name.removesuffix(VALID) for path in directory.glob("*" + VALID)}
    trained = {path.name.removesuffix(TRAIN) for path in directory.glob("*" + TRAIN)}
    names = sorted(name for name in there if MEASURED_WITH.get(name, name) in trained & there)
    for name in sorted((there | trained) - set(names)):
        lacking = next(file for file in _files_of(name) if not (directory / file).is_file())
        log.warning("%s: %s is not measured, %s is not there", directory, name, lacking)
    if not names:
        raise _no_tasks(directory, "no task", where)
    return names


def _files_of(name: str) -> tuple[str, ...]:
    """What a task is made of."""
    trained = MEASURED_WITH.get(name, name)
    return tuple(dict.fromkeys([f"{trained}{TRAIN}", f"{trained}{VALID}", f"{name}{VALID}"]))


def _no_tasks(directory: Path, got: str, where: str) -> DataError:
    expected = f"a directory of labelled tasks, TASK{TRAIN} and TASK{VALID}"
    return DataError.of(directory, got=got, expected=expected, hint=f"see `{where}`")


def _check_files(directory: Path, names: Sequence[str], where: str) -> None:
    """Whatever the tasks by `names` are made of is there."""
    problems = []
    for name in names:
        trained = MEASURED_WITH.get(name, name)
        if trained not in names:
            problems.append(
                Problem(
                    where=where,
                    got=f"the task {name} without {trained}",
                    expected=f"{trained} too, whose classifier it is given",
                )
            )
        for file in _files_of(name):
            if not (directory / file).is_file():
                problems.append(
                    Problem(
                        where=str(directory / file),
                        got="no such file",
                        expected=f"the examples of the task {name}",
                        hint="take it out of `tasks`, or bring the file",
                    )
                )
    if problems:
        raise DataError.all_of(problems)


def _load_task(
    directory: Path,
    name: str,
    others: Sequence[str],
    max_train: int | None,
    max_valid: int | None,
) -> LabelledTask:
    train_path = directory / (name + TRAIN)
    valid_paths = {other: directory / (other + VALID) for other in (name, *others)}
    form, train = _read(train_path, max_train)
    few = "more labels may come later: raise max_train_examples"
    hint = few if max_train is not None and len(train) == max_train else None
    values = sorted({label for _, label, _ in train}, key=lambda label: (str(type(label)), label))
    if not 2 <= len(values) <= len(LABELS):
        raise DataError.of(
            train_path,
            got=f"{len(values)} labels" if len(values) != 1 else f"only the label {values[0]!r}",
            expected=f"2 to {len(LABELS)} labels",
            hint=hint if len(values) < 2 else None,
        )
    if len(values) > 2 and metric_of(name) != "accuracy":
        raise DataError.of(
            train_path,
            got=f"{len(values)} labels",
            expected=f"2 labels, since {name} is measured by {metric_of(name)}",
            hint="give files of other tasks another name",
        )
    if metric_of(name) == "f1" and [str(label) for label in values] != ["0", "1"]:
        raise DataError.of(
            train_path,
            got=f"the labels {' and '.join(map(repr, values))}",
            expected=f"0 and 1, since {name} is measured by the F1 of label 1",
            hint="write 1 for pairs that mean the same, 0 for others",
        )
    numbers = {label: number for number, label in enumerate(values)}
    return LabelledTask(
        name=name,
        train=_examples(train, numbers, hint),
        valid={
            other: _examples(_read(path, max_valid, form)[1], numbers, hint)
            for other, path in valid_paths.items()
        },
        num_labels=len(values),
        fingerprint=hash_json(
            [
                {path.name: sha256_file(path) for path in (train_path, *valid_paths.values())},
                max_train,
                max_valid,
            ]
        ),
    )


_Read = tuple[tuple[str, ...], str | int, str]
"""Texts, label as written, and file:line."""


def _read(path: Path, limit: int | None, form: Form | None = None) -> tuple[Form, list[_Read]]:
    """Examples of a form; none: that of the first, which is given too."""
    check_name(path)
    found = []
    for line, record in islice(read_records(path), limit):
        source = f"{path}:{line}"
        form = form or _form_of(record, source)
        parts = {
            key: text_of(record, key, source, expected="a text (a JSON string)")
            for key in form.fields
        }
        texts = tuple(template.format(**parts) for template in form.texts)
        found.append((texts, _label_of(record, source), source))
    if form is None or not found:
        raise DataError.of(path, got="an empty file", expected="at least one example")
    return form, found


def _form_of(record: Mapping[str, Any], source: str) -> Form:
    form = next((form for form in FORMS if set(form.fields) <= record.keys()), None)
    if form is None:
        raise DataError.of(
            "line",
            got=f"the fields {', '.join(record)}",
            expected="those of a task: " + "; ".join(" and ".join(form.fields) for form in FORMS),
            source=source,
        )
    return form


def _label_of(record: Mapping[str, Any], source: str) -> str | int:
    label = record.get("label")
    if isinstance(label, bool):  # BoolQ's, as first published
        return int(label)
    if not isinstance(label, str | int):
        got = f"a {type(label).__name__}" if "label" in record else "nothing"
        raise DataError.of("label", got=got, expected="a whole number or a text", source=source)
    return label


def _examples(
    read: Sequence[_Read], numbers: Mapping[str | int, int], hint: str | None
) -> tuple[Example, ...]:
    for _, label, source in read:
        if label not in numbers:
            raise DataError.of(
                "label",
                got=repr(label),
                expected=f"one of the training examples': {', '.join(map(repr, numbers))}",
                hint=hint,
                source=source,
            )
    return tuple(Example(texts, numbers[label]) for texts, label, _ in read)
