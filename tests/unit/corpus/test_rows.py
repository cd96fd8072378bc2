"""Rows: every text of a table comes out as it went in, and what is none is named by its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babyllama_ds.corpus.rows import read_rows
from babyllama_ds.errors import DataError

# What readers of tables are known to change: dates, numbers, missing values, quotes, breaks.
ODD_TEXTS = [
    "2024-05-01",
    "12",
    "1e5",
    "None",
    "NA",
    "null",
    "",
    "nan",
    "True",
    ' "quoted", and a comma',
    "two\nlines",
    "a blank line\n\nbetween\n",
    "U+2028 \u2028 and \x0c and \x85 stay",
    "\ufeffa mark",
    "é 日本 🎈",
    "\\n is two characters",
    "; \t |",
]


def jsonl(texts: list[str], path: Path) -> Path:
    rows = [json.dumps({"id": i, "text": text, "more": {}}) for i, text in enumerate(texts)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def comma_separated(texts: list[str], path: Path) -> Path:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    path.write_text(out.getvalue(), encoding="utf-8")
    return path


def parquet(texts: list[Any], path: Path, **kwargs: Any) -> Path:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, **kwargs)})
    pq.write_table(table, path, row_group_size=5)
    return path


WRITERS = {"jsonl": jsonl, "csv": comma_separated, "parquet": parquet}
forms = pytest.mark.parametrize("form", sorted(WRITERS))


@forms
def test_no_text_is_changed(tmp_path: Path, form: str) -> None:
    path = WRITERS[form](ODD_TEXTS, tmp_path / f"a [1]#?.{form}")
    assert list(read_rows(path, "text")) == ODD_TEXTS


@forms
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"])), max_size=6
    )
)
def test_no_text_at_all_is_changed(tmp_path: Path, form: str, texts: list[str]) -> None:
    path = WRITERS[form](texts, tmp_path / f"a.{form}")
    assert list(read_rows(path, "text")) == texts


@forms
def test_many_rows_in_order(tmp_path: Path, form: str) -> None:
    texts = [f"row {i} " + "x" * (i % 97) for i in range(1000)] + ["y" * 200_000, "last"]
    assert list(read_rows(WRITERS[form](texts, tmp_path / f"a.{form}"), "text")) == texts


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_packed(tmp_path: Path, form: str) -> None:
    plain = WRITERS[form](ODD_TEXTS, tmp_path / f"a.{form}")
    path = tmp_path / f"a.{form}.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_rows(path, "text")) == ODD_TEXTS


def test_large_strings_of_parquet(tmp_path: Path) -> None:
    path = parquet(["a", "b"], tmp_path / "a.parquet", type=pa.large_string())
    assert list(read_rows(path, "text")) == ["a", "b"]


def test_a_mark_at_the_start_blank_lines_and_other_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a"}\r\n\r\n  \n{"text": "b"}\r'.encode())
    assert list(read_rows(path, "text")) == ["a", "b"]
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext,n\r\na,1\r\n\r\n"b\r\nc",2\r\n'.encode())
    assert list(read_rows(path, "text")) == ["a", "b\nc"]


# -- what is refused -----------------------------------------------------------------------------


def refused(path: Path, column: str = "text") -> tuple[str, str, str]:
    with pytest.raises(DataError) as caught:
        list(read_rows(path, column))
    (problem,) = caught.value.problems
    assert problem.where.startswith(str(path))
    return problem.where.removeprefix(str(path)), problem.got, problem.hint or ""


@forms
def test_a_column_that_does_not_exist(tmp_path: Path, form: str) -> None:
    where, got, hint = refused(WRITERS[form](["a"], tmp_path / f"a.{form}"), "txt")
    assert where == ("" if form == "parquet" else ":1")
    assert got.startswith("no column 'txt' (there are: id, text")
    assert hint == "did you mean `text`?"


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ('{"text": null}', "nothing (null) in column 'text'"),
        ('{"text": 12}', "int in column 'text' (12)"),
        ('{"text": ["a"]}', "list in column 'text' ([\"a\"])"),
        ('{"txt": "b"}', "no column 'text' (there are: txt)"),
        ('{"text": "\\ud83d"}', "half of a character (\\ud83d) in column 'text'"),
        ('["a"]', '["a"]'),
        ('"a"', '"a"'),
        ('{"text": "b"', "what is not JSON (Expecting ',' delimiter: line 2 column 1 (char 13))"),
    ],
)
def test_a_row_of_json_without_text(tmp_path: Path, row: str, got: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + row + "\n")
    assert refused(path)[:2] == (":3", got)


def test_json_too_deep_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    where, got, _ = refused(path)
    assert where == ":2"
    assert got.startswith("what is not JSON (maximum recursion depth exceeded")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", [[{"text": "a"}], {"text": "a", "n": 1}])
def test_json_that_is_not_one_object_a_line(tmp_path: Path, indent: Any, value: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, indent=indent))
    if indent is None and isinstance(value, dict):
        assert list(read_rows(path, "text")) == ["a"]
        return
    where, _, hint = refused(path)
    assert where == ":1"
    assert hint == "if the file is one list of objects: jq -c '.[]' a.json > NEW.jsonl"


@pytest.mark.parametrize(
    ("content", "where", "got"),
    [
        ("text,n\na,1\nb\n", ":3", "a row of 1 cells"),
        ("text,n\na, b,1\n", ":2", "a row of 3 cells"),
        ('text,n\n"a" b,1\n', ":2", "what is not CSV (',' expected after '\"')"),
        ('text,n\n"a,1\nb,2\n', ":3", "what is not CSV (unexpected end of data)"),
        ("", ":1", "no column 'text' (there are: none)"),
        ("n;text\n1;a\n", ":1", "one column, with ';' in its name"),
        ("text,n,text\na,1,b\n", ":1", "2 columns called 'text'"),
    ],
)
def test_csv_that_is_none(tmp_path: Path, content: str, where: str, got: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert refused(path)[:2] == (where, got)


def test_parquet_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert refused(parquet(["a", None], path))[:2] == (
        ", row 2",
        "nothing (null) in column 'text'",
    )
    assert refused(parquet([1, 2], path))[:2] == ("", "column 'text' of type int64")
    path.write_bytes(path.read_bytes()[:-9])
    assert refused(path)[1].startswith("what cannot be read as parquet (")
    path.write_bytes(b"no table\n" * 9)
    assert refused(path)[1].startswith("what cannot be read as parquet (")


def no_utf8(texts: list[bytes]) -> pa.Array:
    """Bytes that call themselves text, as programs of other languages may write them."""
    bounds = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def test_parquet_whose_text_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = no_utf8([b"a"] * 200 + ["h\u00e4user".encode("latin1")])
    pq.write_table(pa.table({"text": texts}), path)
    where, got, hint = refused(path)
    assert where == ", rows from 129"
    assert got.startswith("bytes that are not UTF-8 in column 'text' (")
    assert hint


def test_parquet_with_two_columns_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert refused(path)[:2] == ("", "2 columns called 'text'")
