"""Finding: which files a pattern names, what their names say of them, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from babyllama_ds.corpus.finding import domain_of, find_files, form_of, packing_of
from babyllama_ds.errors import DataError


def write(path: Path, content: str = "some text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_patterns_in_order_matches_sorted_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("c.txt", "a.train", "b.dev", "deep/er/d.txt"):
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = find_files(["c.txt", "*.txt", "[ab].*", "**/*.txt"], [])
    assert [str(path) for _, path in found] == ["c.txt", "a.train", "b.dev", "deep/er/d.txt"]
    assert {split for split, _ in found} == {"train"}


def test_a_name_may_hold_glob_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "[ab]*.txt")
    assert find_files([str(path)]) == [("train", path)]


def test_every_wrong_pattern_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notes.md")
    write(tmp_path / "bare")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError) as caught:
        find_files(["no/*.train", "notes.md", "bare", "folder", "pipe.txt"], ["none.dev"])
    lines = [(problem.where, problem.got) for problem in caught.value.problems]
    assert lines == [
        ("corpus.train", f"'no/*.train', which matches nothing from {tmp_path}"),
        ("corpus.train", "notes.md, a file called *.md"),
        ("corpus.train", "bare, a file without a suffix"),
        ("corpus.train", "folder, a directory"),
        ("corpus.train", "pipe.txt, something that is not a regular file"),
        ("corpus.split.dev", f"'none.dev', which matches nothing from {tmp_path}"),
    ]


@pytest.mark.parametrize(
    ("name", "form", "packing", "domain"),
    [
        ("childes.train", "text", None, "childes"),
        ("childes.train.gz", "text", "gz", "childes"),
        ("childes.train.txt", "text", None, "childes.train"),  # as ever: it names what was made
        ("childes.train.txt.zst", "text", "zst", "childes.train"),  # packed or not, one domain
        ("childes.train.jsonl", "jsonl", None, "childes"),
        ("childes.dev.jsonl.zst", "jsonl", "zst", "childes"),
        ("v1.2.CSV.XZ", "csv", "xz", "v1.2"),
        ("lines.json", "jsonl", None, "lines"),
        ("part-0.parquet", "parquet", None, "part-0"),
        ("packed.gz.txt", "text", None, "packed.gz"),
        ("part.parquet.gz", None, "gz", "part"),
        ("notes.md.gz", None, "gz", "notes"),
        ("archive.tar", None, None, "archive"),
        ("bare.gz", None, "gz", "bare"),
    ],
)
def test_what_a_name_says(name: str, form: str | None, packing: str | None, domain: str) -> None:
    path = Path("folder.txt", name)
    assert (form_of(path), packing_of(path), domain_of(path)) == (form, packing, domain)


def test_a_packed_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("a.md.gz", "b.parquet.xz", "c.gz"):
        write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path / "*")], key="corpus.sources[1].corpus")
    assert [(p.where, p.got.rpartition("/")[2], p.hint) for p in caught.value.problems] == [
        ("corpus.sources[1].corpus.train", "a.md.gz, a file called *.md.gz", None),
        (
            "corpus.sources[1].corpus.train",
            "b.parquet.xz, a file called *.parquet.xz",
            "parquet is compressed in itself: unpack the file",
        ),
        ("corpus.sources[1].corpus.train", "c.gz, a file called *.gz", None),
    ]
    assert ".jsonl .json .csv .parquet" in caught.value.problems[0].expected
