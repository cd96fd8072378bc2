"""The rows of a table, each one's text: JSON lines, CSV, parquet.

Enters: a path and the name of a column. Leaves: one text a row, in order, none of them missing.

Lines and parquet tables are streamed by `datasets`. Rows are made of lines by `json` and `csv`
and not by the library's builders, which are made for tables that may be mended, and would change a
text without a word: JSON strings that look like dates become dates, a number among texts turns all
texts of its block into quoted JSON, `None` and `NA` in a CSV file are missing values.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from babyllama_ds.corpus.finding import form_of
from babyllama_ds.corpus.lines import stream_lines
from babyllama_ds.errors import DataError
from babyllama_ds.spec.explain import did_you_mean

BATCH_ROWS = 128
_CELL_CHARS = 1 << 28  # a quote that is never closed would otherwise take in the rest of the file


def read_rows(path: Path, column: str) -> Iterator[str]:
    """The text in `column` of each row. `DataError` names the row that has none."""
    form = form_of(path)
    if form == "parquet":
        return _parquet(path, column)
    lines = chain.from_iterable(stream_lines(path, batch_lines=BATCH_ROWS))
    return _json(path, lines, column) if form == "jsonl" else _csv(path, lines, column)


def text_of(value: object, column: str, where: str) -> str:
    """`value` if it is text that can be written as UTF-8."""
    if value is None:
        raise DataError.of(
            where,
            got=f"nothing (null) in column {column!r}",
            expected="text in every row",
            hint="leave such rows out of the file, or write an empty text where one is meant",
        )
    if not isinstance(value, str):
        got = f"{type(value).__name__} in column {column!r} ({_short(value)})"
        raise DataError.of(where, got=got, expected="text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"half of a character (\\u{ord(value[error.start]):04x}) in column {column!r}"
        raise DataError.of(where, got=got, expected="text that is Unicode") from error
    return value


def no_such_column(where: str, column: str, columns: Iterable[str], key: str) -> DataError:
    """The error of a table that lacks the column."""
    known = list(columns)
    return DataError.of(
        where,
        got=f"no column {column!r} (there are: {', '.join(known) or 'none'})",
        expected=f"the column that {key} names",
        hint=did_you_mean(column, known),
    )


def check_once(columns: Sequence[str], column: str, where: str) -> None:
    """`DataError` when several columns have the name."""
    if (number := columns.count(column)) > 1:
        raise DataError.of(
            where,
            got=f"{number} columns called {column!r}",
            expected="one",
            hint="rename or leave out those that are not the text",
        )


# -- JSON ----------------------------------------------------------------------------------------


def _json(path: Path, lines: Iterable[str], column: str) -> Iterator[str]:
    """One object a line; blank lines are passed over."""
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(where, path, line, number, error) from error
        if not isinstance(row, dict):
            raise _not_an_object(where, path, _short(row))
        if column not in row:
            raise no_such_column(where, column, row, "`column`")
        yield text_of(row[column], column, where)


def _not_json(where: str, path: Path, line: str, number: int, error: Exception) -> DataError:
    if number == 1 and line.lstrip().startswith(("[", "{")) and len(line.strip()) < 3:
        return _not_an_object(where, path, "JSON over several lines")
    return DataError.of(where, got=f"what is not JSON ({error})", expected="one JSON object a line")


def _not_an_object(where: str, path: Path, got: str) -> DataError:
    return DataError.of(
        where,
        got=got,
        expected="one JSON object a line",
        hint=f"if the file is one list of objects: jq -c '.[]' {path.name} > NEW.jsonl",
    )


# -- CSV -----------------------------------------------------------------------------------------


def _csv(path: Path, lines: Iterable[str], column: str) -> Iterator[str]:
    """Cells between commas, quoted with `"` where they need it; the first row names the columns."""
    csv.field_size_limit(_CELL_CHARS)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if column not in header:
            raise _not_in_header(path, header, column)
        check_once(header, column, f"{path}:1")
        place = header.index(column)
        for row in reader:
            if len(row) != len(header):
                if not row:  # a blank line
                    continue
                raise DataError.of(
                    f"{path}:{reader.line_num}",
                    got=f"a row of {len(row)} cells",
                    expected=f"{len(header)}, as in the first row",
                    hint='a cell with a comma or a line break in it has to stand in quotes ("…")',
                )
            yield row[place]
    except csv.Error as error:
        raise DataError.of(
            f"{path}:{reader.line_num}",
            got=f"what is not CSV ({error})",
            expected='cells between commas, quoted with " (and "" for a quote inside)',
        ) from error


def _not_in_header(path: Path, header: list[str], column: str) -> DataError:
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other is None:
        return no_such_column(f"{path}:1", column, header, "`column`")
    return DataError.of(
        f"{path}:1",
        got=f"one column, with {other!r} in its name",
        expected="cells between commas",
        hint="write the table anew with commas, or as JSON lines",
    )


# -- parquet -------------------------------------------------------------------------------------


def _parquet(path: Path, column: str) -> Iterator[str]:
    from datasets.packaged_modules.parquet.parquet import Parquet

    _check_schema(path, column)
    number = 0
    with tempfile.TemporaryDirectory(prefix="babyllama-ds-") as folder:
        link = Path(folder, "table.parquet")  # a harmless name: see `lines`
        link.symlink_to(path.resolve())
        builder = Parquet(
            cache_dir=folder, data_files=[str(link)], columns=[column], batch_size=BATCH_ROWS
        )
        stream = builder.as_streaming_dataset(split="train").with_format("arrow")
        try:
            for table in stream.iter(batch_size=BATCH_ROWS):
                check_utf8(table, f"{path}, rows from {number + 1}")
                for value in table[column].to_pylist():
                    number += 1
                    yield text_of(value, column, f"{path}, row {number}")
        except (pa.ArrowInvalid, OSError) as error:
            raise _not_parquet(path, error) from error


def _check_schema(path: Path, column: str) -> None:
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(str(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise _not_parquet(path, error) from error
    if column not in schema.names:
        raise no_such_column(str(path), column, schema.names, "`column`")
    check_once(schema.names, column, str(path))
    check_type(schema.field(column).type, column, str(path))


def check_type(arrow_type: Any, column: str, where: str) -> None:
    """`DataError` when a column of this Arrow type holds no text."""
    is_text = pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)
    if not is_text and not pa.types.is_null(arrow_type):  # nulls only: told by row
        got = f"column {column!r} of type {arrow_type}"
        raise DataError.of(where, got=got, expected="a column of text (string)")


def check_utf8(table: pa.Table, where: str) -> None:
    """`DataError` when text of a table is none: Arrow takes bytes for text as they come."""
    for column in table.column_names:
        try:
            table[column].validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError.of(
                where,
                got=f"bytes that are not UTF-8 in column {column!r} ({error})",
                expected="text in UTF-8",
                hint="write the table anew, its text decoded by the encoding that it is in",
            ) from error


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError.of(
        path,
        got=f"what cannot be read as parquet ({str(error).splitlines()[0]})",
        expected="a whole parquet file",
        hint="copy or download it again, and compare its size with the original's",
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
