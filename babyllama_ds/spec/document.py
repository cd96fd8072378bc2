"""YAML text, read so that every value keeps its place.

Enters: the text of a job, of an override's value, or of a DeepSpeed JSON file (JSON is YAML).
Leaves: a `Document`: plain data, the place (`file:line`) of every key path, and what was wrong.
Next: `spec.loading` and `spec.deepspeed` validate the data and report at the places.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: `3e-4` is a number, only `true` and
`false` are booleans, dates are text. `1_000` is accepted as a whole number. `<<` merges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from babyllama_ds.errors import JobError, Problem

KeyPath = tuple[str | int, ...]
"""`teachers[0].model` is `("teachers", 0, "model")`; the whole document is `()`."""

WHOLE = "the whole job"
MAX_VALUES = 100_000
"""Values in one document, aliases expanded: a few lines of nested aliases can mean billions."""


@dataclass(frozen=True)
class Place:
    """Where a value was written; `order` sorts the places of one job."""

    source: str
    order: int


@dataclass(frozen=True)
class Finding:
    """Something wrong in a document, to become a `Problem`."""

    place: Place
    path: KeyPath
    got: str
    expected: str
    hint: str | None

    def problem(self) -> Problem:
        """As the user sees it."""
        return Problem(
            where=key_text(self.path) or WHOLE,
            got=self.got,
            expected=self.expected,
            hint=self.hint,
            source=self.place.source,
        )


@dataclass
class Document:
    """Plain data with the place of every key path, and what was found to be wrong."""

    data: Any
    places: dict[KeyPath, Place]
    found: list[Finding] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """The place of `path`, or of the nearest mapping around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]

    def complain(
        self, path: KeyPath, *, got: object, expected: object, hint: str | None = None
    ) -> None:
        """Note a problem at `path`."""
        self.complain_at(self.place(path), path, got=got, expected=expected, hint=hint)

    def complain_at(
        self, place: Place, path: KeyPath, *, got: object, expected: object, hint: str | None = None
    ) -> None:
        """Note a problem of `path` that stands at another place than the path's own."""
        self.found.append(Finding(place, path, str(got), str(expected), hint))

    def raise_problems(self) -> None:
        """Raise `JobError` with every problem noted, by place and then by key path."""
        if self.found:
            found = sorted(self.found, key=lambda one: (one.place.order, key_text(one.path)))
            raise JobError(*(one.problem() for one in found))


def key_text(path: KeyPath) -> str:
    """`("teachers", 0, "name")` as a reader writes it: `teachers[0].name`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def show(value: object, limit: int = 60) -> str:
    """A value as it would stand in YAML, cut to about `limit` characters."""
    if isinstance(value, Mapping):
        text = f"a mapping ({', '.join(map(str, value)) or 'empty'})"
    elif isinstance(value, list):
        text = f"a list of {len(value)}"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


IN_UTF8 = "text that UTF-8 can hold"


def is_utf8(text: str) -> bool:
    """Whether it is: half a surrogate pair is text to Python and to YAML alone."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_document(text: str, source: str, *, place: Place | None = None) -> Document:
    """Read one YAML document.

    Places are `source:line`, or all `place` where it is given. Raises `JobError` for text that
    is not YAML; problems that leave a readable document are noted in it instead.
    """
    try:
        return _Builder(source, place).build(yaml.compose(text, Loader=Loader))
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, source, place) from None
    except RecursionError:
        raise JobError.of(source, got="values nested too deeply", expected="YAML") from None


class CoreResolver:
    """The scalar types of YAML 1.2's core schema, as implicit resolvers for PyYAML."""

    table: ClassVar[dict[str, tuple[str, str]]] = {
        "null": (r"~|null|Null|NULL|", "~nN\0"),
        "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "int": (
            r"[-+]?(?:[0-9]+|[1-9][0-9]{0,2}(?:_[0-9]{3})+)|0o[0-7]+|0x[0-9a-fA-F]+",
            "-+0123456789",
        ),
        "float": (
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            "-+.0123456789",
        ),
    }

    @classmethod
    def add_to(cls, target: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
        """Register the table; the first match in the order of the table wins."""
        for name, (pattern, first) in cls.table.items():
            starts = ["" if character == "\0" else character for character in first]
            target.add_implicit_resolver(_TAG + name, re.compile(f"^(?:{pattern})$"), starts)


_TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema in place of its own scalars."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own name and meaning


CoreResolver.add_to(Loader)


def _to_int(text: str) -> int:
    return int(text, 0) if text.lower().startswith(("0x", "0o")) else int(text)


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: Mapping[str, Callable[[str], Any]] = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": _to_int,
    _TAG + "float": _to_float,
    _TAG + "str": str,
}


class _Builder:
    """Nodes to plain data. Nothing is constructed but str, int, float, bool, None, list, dict."""

    def __init__(self, source: str, place: Place | None) -> None:
        self._source = source
        self._fixed = place
        self._document = Document(None, {(): place or Place(f"{source}:1", 1)})
        self._open: set[int] = set()
        self._num_values = 0

    def build(self, root: yaml.Node | None) -> Document:
        if root is not None:
            self._document.places[()] = self._place(root)
            self._document.data = self._value(root, ())
        return self._document

    def _place(self, node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return self._fixed or Place(f"{self._source}:{line}", line)

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES or id(node) in self._open:
            got = "an alias inside its own anchor" if id(node) in self._open else "too many values"
            raise JobError.of(
                key_text(path) or WHOLE,
                got=got,
                expected=f"at most {MAX_VALUES:,} values once aliases are expanded",
                source=self._place(node).source,
            )
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return self._sequence(node, path)
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        for index, item in enumerate(node.value):
            self._document.places[(*path, index)] = self._place(item)
        return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        is_merge = [key.value == "<<" for key, _ in node.value]
        # Merged values first, so that the places of the mapping's own keys replace theirs.
        merged: dict[str, Any] = {}
        for merge, (_, value_node) in zip(is_merge, node.value, strict=True):
            if merge:
                merged = {**self._merge(value_node, path), **merged}
        for merge, (key_node, value_node) in zip(is_merge, node.value, strict=True):
            key = str(key_node.value)
            child = (*path, key)
            if not isinstance(key_node, yaml.ScalarNode):
                self._document.complain(path, got="a mapping or list as a key", expected="text")
            elif not is_utf8(key):
                self._document.complain(path, got=f"{show(key)} as a key", expected=IN_UTF8)
            elif child[-1] in result:
                first = self._document.place(child).source
                self._document.complain_at(
                    self._place(key_node),
                    child,
                    got=f"the key a second time (the first: {first})",
                    expected="each key once",
                )
            elif not merge:
                self._document.places[child] = self._place(key_node)
                result[key_node.value] = self._value(value_node, child)
        return {**merged, **result}

    def _merge(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """`<<: *anchor` or `<<: [*a, *b]`; earlier ones win, own keys over all."""
        values = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for value in reversed(values):
            data = self._value(value, path)
            if isinstance(data, dict):
                merged.update(data)
            else:
                self._document.complain(path, got=f"<<: {show(data)}", expected="<<: a mapping")
        return merged

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        convert = _SCALARS.get(node.tag)
        if convert is None or not isinstance(node, yaml.ScalarNode):
            self._document.complain(
                path, got=f"the tag {node.tag.replace(_TAG, '!!')}", expected="a value without tag"
            )
            return None
        try:
            return convert(node.value)
        except (ValueError, KeyError):
            tag = node.tag.replace(_TAG, "!!")
            self._document.complain(path, got=show(node.value), expected=f"a value of {tag}")
            return None


def _syntax_error(error: yaml.YAMLError, text: str, source: str, place: Place | None) -> JobError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if isinstance(error, yaml.reader.ReaderError):
        mark = _mark(text, error.position)
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    hint = None
    if "'\\t'" in said:
        hint = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in said:
        hint = "quote text that contains ': '"
    elif "but got '{'" in said:
        hint = 'inside { } and [ ], write "${NAME}" with quotes'
    where = f"column {mark.column + 1}" if mark else WHOLE
    line = f"{source}:{mark.line + 1}" if mark else source
    if place:
        line = place.source
    return JobError.of(
        where, got=f"text that is not YAML ({said})", expected="YAML", hint=hint, source=line
    )


def _mark(text: str, position: int) -> yaml.Mark:
    """A place in the text, where PyYAML gives no more than its number."""
    before = text[:position]
    column = position - (before.rfind("\n") + 1)
    return yaml.Mark("", position, before.count("\n"), column, None, 0)
