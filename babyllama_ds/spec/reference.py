"""The reference of jobs: the JSON schema enters, docs/jobs.md leaves, so that it cannot grow stale.

Every part of a job is a section, in the order in which a job is written; every key is an item, with
what it takes, its default and its meaning.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from babyllama_ds.spec.schema import FROM_ENVIRONMENT

Schema = Mapping[str, Any]

_KIND = re.compile(r" \(.*?\)")
"""Which of several kinds a part is, at the end of its path."""

HEADER = """\
# The job, key by key

<!-- Written by `babyllama-ds schema --reference`; a test holds it to the code. -->

A job is a YAML file. Every key has the meaning, the limits and the default given here; a key that
is not here is an error. Any value can be overridden on the command line by its path
(`student.training.epochs=12`, `teachers[0].weight=2`). `${NAME}` in a text is an environment
variable, and `{seed}` in the name is the seed. A key without a default must be given.

What does not fit together is refused with a reason before anything starts: `babyllama-ds check`.
"""


def job_reference(schema: Schema) -> str:
    """The Markdown text of `schema` (`spec.schema.job_schema`)."""
    parts = {"": schema, **schema["$defs"]}
    places = _places(parts)
    sections = [_section(paths, parts[name], parts, places) for name, paths in places.items()]
    return "\n".join([HEADER, *sections])


def _places(parts: Mapping[str, Schema]) -> dict[str, list[str]]:
    """The paths of each part, the one that names its section first; the job itself is ``.

    In the order of the job, each part before the parts of it.
    """
    places: dict[str, list[str]] = {}

    def visit(name: str, path: str) -> None:
        first_time = name not in places
        places.setdefault(name, []).append(path)
        if not first_time:
            return
        for key, value in parts[name]["properties"].items():
            for other in _references(value):
                visit(
                    other, f"{_KIND.sub('', path)}.{key}".lstrip(".") + _step(value, parts[other])
                )

    visit("", "")
    return places


def _references(value: Schema) -> Iterator[str]:
    """The definitions that a value's schema names."""
    if "$ref" in value:
        yield _name(value)
    for choice in (*value.get("oneOf", ()), *value.get("anyOf", ())):
        yield from _references(choice)
    if "items" in value:
        yield from _references(value["items"])


def _name(value: Schema) -> str:
    name: str = value["$ref"].rpartition("/")[2]
    return name


def _step(value: Schema, part: Schema) -> str:
    """What the path of a list's element, or of one kind among several, ends in."""
    if "items" in value:
        return "[]"
    kind = part["properties"].get("kind", {}).get("const")
    return f" ({kind})" if kind else ""


def _section(
    paths: Sequence[str],
    part: Schema,
    parts: Mapping[str, Schema],
    places: Mapping[str, Sequence[str]],
) -> str:
    path, *others = paths
    described = part.get("description", "")
    if others:
        described += f" The same at {', '.join(f'`{other}`' for other in others)}."
    lines = [f"## {path or 'The whole'}", "", *_wrapped(described), ""]
    for key, value in part["properties"].items():
        if "const" in value:
            lines.append(f"- **`{key}`**: `{value['const']}`.")
            continue
        # A key that says no more than its part does has no description of its own.
        meaning = value.get("description") or parts[_name(value)]["description"]
        default = "to be given" if key in part.get("required", ()) else _default(value)
        takes = _takes(value, places)
        lines += _wrapped(f"- **`{key}`** ({takes}; {default}): {meaning}", indent="  ")
    return "\n".join(lines) + "\n"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        100,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _takes(value: Schema, places: Mapping[str, Sequence[str]]) -> str:
    """In words, what a value may be."""
    if "$ref" in value:
        path = places[_name(value)][0]
        return f"[{path}](#{_anchor(path)})"
    choices = [*value.get("oneOf", ()), *value.get("anyOf", ())]
    if choices:
        return " or ".join(_takes(choice, places) for choice in choices)
    if "enum" in value or "const" in value:
        words = value.get("enum", [value.get("const")])
        return ", ".join(f"`{word}`" for word in words)
    if "prefixItems" in value:
        return "a list: " + ", ".join(_takes(item, places) for item in value["prefixItems"])
    if "items" in value and 0 < value.get("minItems", 0) == value.get("maxItems"):
        return "a list: " + ", ".join([_takes(value["items"], places)] * value["minItems"])
    if "items" in value:
        least = "at least one" if value.get("minItems") else "a list"
        return f"{least}: {_takes(value['items'], places)}"
    names = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "`true`, `false`",
        "null": "none (`null`)",
    }
    return names[value["type"]] + _limits(value)


def _limits(value: Schema) -> str:
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    found = [f"{sign} {value[key]:,}" for key, sign in signs.items() if key in value]
    if "pattern" in value:
        found.append(f"matching `{value['pattern'].removesuffix(FROM_ENVIRONMENT)}`")
    return " " + ", ".join(found) if found else ""


def _default(value: Schema) -> str:
    default = value.get("default")
    if default is None:
        return "default none"
    if isinstance(default, dict):
        return "may be left out"
    return f"default `{default if isinstance(default, str) else json.dumps(default)}`"


def _anchor(path: str) -> str:
    """The fragment that GitHub gives a heading of this text."""
    kept = "".join(each for each in path.lower() if each.isalnum() or each in " -_")
    return kept.replace(" ", "-")
