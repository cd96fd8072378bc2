"""Files of JSON lines that a user brings: a path enters, checked objects with their lines leave."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babyllama_ds.errors import DataError


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects of a file; blank lines are skipped.

    Raises:
        DataError: a file that cannot be read, or (with file:line) a line that is not a JSON object
            in UTF-8.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError.of(
            path, got=error.strerror or str(error), expected="a readable file"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _record(line, f"{path}:{number}")


def text_of(record: dict[str, Any], key: str, source: str, *, expected: str) -> str:
    """The text under `key`.

    Raises:
        DataError: there is none, or it holds half of a character, which JSON may and no tokenizer
            takes.
    """
    text = record.get(key)
    if not isinstance(text, str):
        got = f"a {type(text).__name__}" if key in record else "nothing"
        raise DataError.of(key, got=got, expected=expected, source=source)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"half of a character (\\u{ord(text[error.start]):04x})"
        raise DataError.of(key, got=got, expected="text that is Unicode", source=source) from error
    return text


def _record(line: bytes, source: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError.of(
            "line",
            got=f"byte 0x{line[error.start]:02x} at offset {error.start}, which is not UTF-8",
            expected="UTF-8 text",
            source=source,
        ) from error
    except ValueError as error:
        raise DataError.of("line", got=error, expected="a JSON object", source=source) from error
    if not isinstance(record, dict):
        raise DataError.of(
            "line", got=f"a JSON {type(record).__name__}", expected="a JSON object", source=source
        )
    return record
