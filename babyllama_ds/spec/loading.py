"""From a job file and overrides to one validated `JobSpec`.

Enters: a YAML file, `key.path=value` overrides, the environment. Leaves: a frozen `JobSpec`, or
one `JobError` with everything that is wrong, sorted by line. Nothing else is read: no data, no
model, no device. Next: `pipeline`.

1. read the file, every key with its line; 2. put the overrides in; 3. fill `${VAR}` in text;
4. validate with Pydantic, strictly; 5. report all problems of 1 to 4 together.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from babyllama_ds.errors import JobError
from babyllama_ds.spec.document import (
    IN_UTF8,
    Document,
    KeyPath,
    Place,
    is_utf8,
    key_text,
    read_document,
    show,
)
from babyllama_ds.spec.explain import closest, explain
from babyllama_ds.spec.job import JobSpec


def load_job(
    path: Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> JobSpec:
    """Read and validate a job.

    `overrides` are `KEY=VALUE` texts, `VALUE` being YAML: `student.training.epochs=2`,
    `teachers.0.weight=2` or `teachers.NAME.weight=2`, `control=null`. `${VAR}` in any text is
    filled from `environ` (none: the process's), `$$` is a dollar sign. Raises `JobError`.
    """
    document = read_document(read_text(path), str(path))
    if not isinstance(document.data, dict):
        got = "an empty file" if document.data is None else show(document.data)
        raise JobError.of(path, got=got, expected="a mapping: `name: …`, `corpus: …`, …")
    for number, override in enumerate(overrides):
        _apply(document, override, Place(f"command line: {override}", _AFTER_LINES + number))
    environment = os.environ if environ is None else environ
    document.data = _map_values(
        document.data, (), lambda value, at: _fill(document, value, at, environment)
    )
    job = _validate(document)
    document.raise_problems()
    assert job is not None, "a validation that fails notes a problem"
    return job


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `JobError`."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise JobError.of(path, got=got, expected="UTF-8 text") from None
    except FileNotFoundError:
        hint = _hint_for_missing(path)
        raise JobError.of(path, got="no such file", expected="a file", hint=hint) from None
    except IsADirectoryError:
        raise JobError.of(path, got="a directory", expected="a file") from None
    except OSError as error:
        got = (error.strerror or str(error)).lower()
        raise JobError.of(path, got=got, expected="a readable file") from None


def _hint_for_missing(path: Path) -> str | None:
    """The file in the same folder that was meant, and what a relative path is relative to."""
    near = None
    with contextlib.suppress(OSError):
        near = closest(path.name, [one.name for one in path.parent.iterdir()])
    hints = [f"did you mean `{near}`?"] if near else []
    if not path.is_absolute():
        hints.append(f"paths are relative to {Path.cwd()}")
    return " ".join(hints) or None


_AFTER_LINES = 1_000_000_000
"""Overrides are reported after the lines of the file, in their own order."""


def _validate(document: Document) -> JobSpec | None:
    try:
        # JSON mode: lists become tuples, and yet "5" is no number and 1 no boolean.
        return JobSpec.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        explain(error, JobSpec, document)
        return None


# -- overrides ----------------------------------------------------------------------------------


def _apply(document: Document, override: str, place: Place) -> None:
    """Set one `KEY=VALUE` in the document, and the place of everything it holds."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or not text.strip():
        hint = "for example student.training.epochs=2; to unset: KEY=null"
        document.complain_at(place, (), got=repr(override), expected="KEY=VALUE", hint=hint)
        return
    if not is_utf8(key):
        document.complain_at(place, (), got=f"{show(key)} as a key", expected=IN_UTF8)
        return
    value = read_document(text, place.source, place=place)
    path = _resolve(document, key.strip(), place)
    if path is None:
        return
    _set(document, path, value.data, place)
    document.places.update({(*path, *inner): place for inner in value.places})
    document.found += [replace(one, path=(*path, *one.path)) for one in value.found]


def _resolve(document: Document, key: str, place: Place) -> KeyPath | None:
    """`teachers.small.weight` as a key path; list items go by number or by their `name`."""
    parts = key.replace("[", ".").replace("]", "").split(".")
    path: KeyPath = ()
    here = document.data
    while parts:
        if isinstance(here, list):
            item = _item(here, parts)
            if item is None:
                expected = f"a number below {len(here)}" if here else "an item of an empty list"
                names = [one["name"] for one in here if isinstance(one, dict) and "name" in one]
                if names:
                    expected += f", or one of {', '.join(map(repr, names))}"
                near = closest(parts[0], map(str, names))
                hint = f"did you mean `{near}`?" if near else None
                document.complain_at(place, path, got=repr(parts[0]), expected=expected, hint=hint)
                return None
            index, used = item
            path, here, parts = (*path, index), here[index], parts[used:]
        elif isinstance(here, dict) or here is None:
            path, here, parts = (*path, parts[0]), (here or {}).get(parts[0]), parts[1:]
        else:
            hint = f"`{key_text(path)}` has nothing below it"
            document.complain_at(
                place, path, got=f"{show(here)}, with .{parts[0]}", expected="a mapping", hint=hint
            )
            return None
    return path


def _item(items: list[Any], parts: list[str]) -> tuple[int, int] | None:
    """The index that `parts` start with, and how many of them it takes: names may hold dots."""
    if parts[0].isdecimal() and int(parts[0]) < len(items):
        return int(parts[0]), 1
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    for used in range(len(parts), 0, -1):
        name = ".".join(parts[:used])
        if name in names:
            return names.index(name), used
    return None


def _set(document: Document, path: KeyPath, value: Any, place: Place) -> None:
    """Put `value` at `path`, making the mappings on the way.

    The places of the replaced part go, and what was wrong with it in the file; what is wrong
    with an earlier override stays wrong.
    """
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.found = [
        one
        for one in document.found
        if one.place.order >= _AFTER_LINES or one.path[: len(path)] != path
    ]
    here = document.data
    for depth, key in enumerate(path[:-1], start=1):
        if isinstance(here, dict) and here.get(str(key)) is None:
            here[str(key)] = {}
            document.places[path[:depth]] = place
        here = here[key]
    here[path[-1]] = value


# -- text from the environment, and what JSON cannot hold ----------------------------------------

_DOLLAR = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\})?")


def _map_values(data: Any, path: KeyPath, change: Callable[[Any, KeyPath], Any]) -> Any:
    """The same tree with every scalar changed."""
    if isinstance(data, dict):
        return {key: _map_values(value, (*path, key), change) for key, value in data.items()}
    if isinstance(data, list):
        return [_map_values(value, (*path, i), change) for i, value in enumerate(data)]
    return change(data, path)


def _fill(document: Document, value: Any, path: KeyPath, environ: Mapping[str, str]) -> Any:
    """Text with `${VAR}` filled in; numbers that are not finite are refused."""
    if isinstance(value, float) and not math.isfinite(value):
        document.complain(path, got=value, expected="a finite number")
        return None
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        if match["escaped"]:
            return "$"
        if not name:
            expected = "${NAME} for a variable of the environment, or $$ for a dollar sign"
            document.complain(path, got=show(value), expected=expected)
        elif not environ.get(name):
            got = f"${{{name}}}, which is {'empty' if name in environ else 'not set'}"
            hint = f"export {name}=…, or give {key_text(path)}=… on the command line"
            expected = f"the environment variable {name}"
            document.complain(path, got=got, expected=expected, hint=hint)
        return environ.get(name or "", "")

    filled = _DOLLAR.sub(one, value)
    if not is_utf8(filled):
        document.complain(path, got=show(filled), expected=IN_UTF8)
        return None
    return filled
