"""Files of minimal pairs: a directory of `*.jsonl` enters, checked tasks leave.

The format is BLiMP's: a file is a task, a line a pair, with `sentence_good` and `sentence_bad`.
BabyLM's supplement has the same two fields and no `linguistics_term`; its dialogues are sentences
with line breaks in them. Whatever else stands in a line is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from babyllama_ds.errors import DataError
from babyllama_ds.evaluation.json_lines import read_records, text_of
from babyllama_ds.files import check_name

GOOD, BAD = "sentence_good", "sentence_bad"
PATH_KEY = "evaluation.minimal_pairs[].path"


class Pair(NamedTuple):
    """An acceptable sentence, its unacceptable twin, and the line they came from."""

    good: str
    bad: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One file of pairs about one phenomenon."""

    name: str
    """The file's stem."""
    pairs: tuple[Pair, ...]
    """At least one."""
    path: Path
    """Where it came from, for error messages."""
    term: str | None = None
    """BLiMP's `linguistics_term` (the phenomenon that several tasks share), where given."""
    field: str | None = None
    """BLiMP's `field` (syntax, morphology, …), where given."""


def load_tasks(directory: Path, *, max_pairs: int | None, where: str = PATH_KEY) -> list[Task]:
    """Every `*.jsonl` of a directory, by name; of each the first `max_pairs` pairs.

    `where` is what named the directory.

    Raises:
        DataError: no such directory, no task in it, a file that is not called in UTF-8, or (with
            file:line) a line that is not a UTF-8 JSON object with both sentences, in whole
            characters.
    """
    paths = sorted(directory.glob("*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise DataError.of(
            directory,
            got="no *.jsonl files" if directory.is_dir() else "no such directory",
            expected="a directory of minimal pairs, one *.jsonl file a task",
            hint=f"see `{where}`",
        )
    return [_load_task(path, max_pairs) for path in paths]


def _load_task(path: Path, max_pairs: int | None) -> Task:
    check_name(path)
    records = list(islice(_checked_records(path), max_pairs))
    if not records:
        raise DataError.of(path, got="an empty file", expected="at least one pair of sentences")
    line, first = records[0]
    source = f"{path}:{line}"
    return Task(
        name=path.stem,
        pairs=tuple(Pair(record[GOOD], record[BAD], line) for line, record in records),
        path=path,
        term=_label(first, "linguistics_term", source),
        field=_label(first, "field", source),
    )


def _label(record: dict[str, Any], key: str, source: str) -> str | None:
    """What a task says of itself; none where it says nothing."""
    label = record.get(key)
    if label is not None and not isinstance(label, str):
        got = f"a {type(label).__name__}"
        raise DataError.of(key, got=got, expected="a JSON string", source=source)
    return label


def _checked_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, record in read_records(path):
        for key in (GOOD, BAD):
            text_of(record, key, f"{path}:{line}", expected="a sentence (a JSON string)")
        yield line, record
