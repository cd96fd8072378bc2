"""Files of minimal pairs and their like: a directory of `*.jsonl` enters, checked tasks leave.

A line is an item: two or more candidate sentences of which the first is right, each scored from a
character on. A file has one of BabyLM's formats, recognised by its fields. In brackets, what is
scored; a task is a file but where another is named:

    BLiMP, supplement  [sentence_good], [sentence_bad]
    EWoK               Context1[ Target1], Context1[ Target2]; by Domain
    entity tracking    input_prefix[options[0]], input_prefix[options[1]], …; by file and numops
    COMPS              prefix_acceptable [property_phrase], prefix_unacceptable [property_phrase]

BLiMP's supplement has no `linguistics_term`; its dialogues are sentences with line breaks in them.
Whatever else stands in a line is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from babyllama_ds.errors import DataError
from babyllama_ds.evaluation.json_lines import read_records, text_of
from babyllama_ds.files import check_name

PATH_KEY = "evaluation.minimal_pairs[].path"


class Candidate(NamedTuple):
    """A sentence, and which part of it is scored."""

    sentence: str
    start: int = 0
    """The character that the scored part begins with, which goes to the end; 0: all of it."""


class Item(NamedTuple):
    """Candidates, the right one first, and the line they came from."""

    candidates: tuple[Candidate, ...]
    """At least two."""
    source: str
    """Its file:line."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items about one phenomenon."""

    name: str
    """The file's stem, or what the lines say."""
    items: tuple[Item, ...]
    """At least one."""
    term: str | None = None
    """BLiMP's `linguistics_term` (the phenomenon that several tasks share), where given."""


def load_tasks(directory: Path, *, max_pairs: int | None, where: str = PATH_KEY) -> list[Task]:
    """Every task of a directory, by its (first) file and name; of each the first `max_pairs` items.

    `where` is what named the directory.

    Raises:
        DataError: no such directory, no file in it, a file that is not called in UTF-8, or (with
            file:line) a line that is not a UTF-8 JSON object with what its file's format asks for.
    """
    paths = sorted(directory.glob("*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise DataError.of(
            directory,
            got="no *.jsonl files" if directory.is_dir() else "no such directory",
            expected="a directory of minimal pairs in *.jsonl files",
            hint=f"see `{where}`",
        )
    groups: dict[str, _Group] = {}
    for path in paths:
        check_name(path)
        _read_file(path, groups, max_pairs)
    return [
        Task(
            name=name,
            items=tuple(group.items),
            term=group.first.term(),
        )
        for name, group in sorted(groups.items(), key=lambda one: (one[1].first.path, one[0]))
    ]


# -- files ----------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """An object, and where it stands."""

    path: Path
    number: int
    record: dict[str, Any]

    @property
    def source(self) -> str:
        return f"{self.path}:{self.number}"

    def text(self, key: str, expected: str = "a sentence (a JSON string)") -> str:
        return text_of(self.record, key, self.source, expected=expected)

    def term(self) -> str | None:
        """What a task says that it is about; none where it says nothing."""
        key = "linguistics_term"
        return None if self.record.get(key) is None else self.text(key, "a JSON string")

    def words(self, key: str) -> str:
        """A text that is not empty."""
        text = self.text(key, "a text (a JSON string)")
        if not text.strip():
            raise self.error(key, got=repr(text), expected="a text with words in it")
        return text

    def what(self, key: str) -> str:
        """What stands under a key, in an error."""
        return repr(self.record[key]) if key in self.record else "nothing"

    def error(self, where: str, *, got: str, expected: str, hint: str | None = None) -> DataError:
        return DataError.of(where, got=got, expected=expected, hint=hint, source=self.source)


class _Group(NamedTuple):
    """The lines of a task, which may come from several files of one format."""

    format: _Format
    first: _Line
    items: list[Item]


def _read_file(path: Path, groups: dict[str, _Group], max_items: int | None) -> None:
    form = None
    for number, record in read_records(path):
        line = _Line(path, number, record)
        form = form or _format_of(line)
        _check_format(line, form)
        task = path.stem if form.task is None else form.task(line)
        item = Item(tuple(form.candidates(line)), line.source)
        group = groups.setdefault(task, _Group(form, line, []))
        _check_group(line, task, form, group)
        if len(group.items) != max_items:
            group.items.append(item)
        if form.task is None and len(group.items) == max_items:
            return  # what is not asked for is not looked at
    if form is None:
        raise DataError.of(path, got="an empty file", expected="at least one pair of sentences")


def _format_of(line: _Line) -> _Format:
    """The first format that a line has all fields of; else, to tell which it lacks, any."""
    for enough in (all, any):
        for form in FORMATS:
            if enough(key in line.record for key in form.fields):
                return form
    raise line.error(
        "line",
        got=f"the fields {', '.join(line.record)}" if line.record else "no fields",
        expected="; or ".join(map(str, FORMATS)),
        hint="what a line holds is in docs/evaluation.md",
    )


def _check_format(line: _Line, form: _Format) -> None:
    """The line lacks nothing that makes it one of another format."""
    if all(key in line.record for key in form.fields):
        return
    for other in FORMATS:
        if all(key in line.record for key in other.fields):
            raise line.error(
                "line",
                got=str(other),
                expected=f"{form}, as in the lines before",
                hint="put each format into files of its own",
            )


def _check_group(line: _Line, task: str, form: _Format, group: _Group) -> None:
    if group.format is not form:
        raise line.error(
            "task",
            got=f"{task!r} of {form.name}",
            expected=f"another name than {group.first.source} has, of {group.format.name}",
            hint="put each benchmark into a directory of its own",
        )


# -- formats --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """How a line of a benchmark is read."""

    name: str
    fields: tuple[str, ...]
    candidates: Callable[[_Line], list[Candidate]]
    task: Callable[[_Line], str] | None = None
    """None: the file."""

    def __str__(self) -> str:
        return f"{', '.join(self.fields)} ({self.name})"


def _blimp(line: _Line) -> list[Candidate]:
    return [Candidate(line.text("sentence_good")), Candidate(line.text("sentence_bad"))]


def _ewok(line: _Line) -> list[Candidate]:
    context = line.words("Context1")
    return _completed(line, [(context, " " + line.words(key)) for key in ("Target1", "Target2")])


def _entity_tracking(line: _Line) -> list[Candidate]:
    context = line.words("input_prefix")
    options = line.record.get("options")
    if not isinstance(options, list) or len(options) < 2:
        raise line.error(
            "options",
            got=f"a list of {len(options)}" if isinstance(options, list) else line.what("options"),
            expected="a list of two texts or more, the right one first",
        )
    named = line._replace(record={f"options[{i}]": option for i, option in enumerate(options)})
    return _completed(line, [(context, named.words(key)) for key in named.record])


def _comps(line: _Line) -> list[Candidate]:
    phrase = line.words("property_phrase")
    contexts = [line.words(key) + " " for key in ("prefix_acceptable", "prefix_unacceptable")]
    return _completed(line, [(context, phrase) for context in contexts])


def _completed(line: _Line, parts: list[tuple[str, str]]) -> list[Candidate]:
    """Contexts, and completions that are scored."""
    right, *others = (Candidate(context + text, len(context)) for context, text in parts)
    if right in others:
        raise line.error(
            "line",
            got=f"the first candidate, {right.sentence!r}, once more",
            expected="others, of which none is right",
            hint="no model can tell them apart: correct the line, or remove it",
        )
    return [right, *others]


def _operations(line: _Line) -> str:
    number = line.record.get("numops")
    if not isinstance(number, int | str) or not str(number).isdecimal():
        raise line.error(
            "numops",
            got=line.what("numops"),
            expected="a number of operations: 0, 1, …",
        )
    return f"{line.path.stem}_{number}_ops"


FORMATS = (
    _Format("BLiMP", ("sentence_good", "sentence_bad"), _blimp),
    _Format(
        "EWoK",
        ("Context1", "Target1", "Target2", "Domain"),
        _ewok,
        task=lambda line: line.words("Domain"),
    ),
    _Format(
        "entity tracking", ("input_prefix", "options", "numops"), _entity_tracking, _operations
    ),
    _Format("COMPS", ("prefix_acceptable", "prefix_unacceptable", "property_phrase"), _comps),
)
"""A line that has the fields of several is read as the first of them."""
