"""Sources: what is found, what is refused, and that no character is lost on the way."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babyllama_ds.corpus import checking
from babyllama_ds.corpus import sources as module
from babyllama_ds.corpus.sources import (
    FileSources,
    iter_text,
    read_sources,
    read_texts,
    train_lines,
)
from babyllama_ds.errors import DataError, Stopped
from babyllama_ds.spec.corpus import FilesCorpus, HeldOutFiles, TailOfEachFile

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def tail(fraction: float = 0.05) -> TailOfEachFile:
    return TailOfEachFile(kind="tail", fraction=fraction)


def held_out(*dev: object) -> HeldOutFiles:
    return HeldOutFiles(kind="held_out", dev=tuple(map(str, dev)))


def corpus(
    *train: object,
    split: HeldOutFiles | TailOfEachFile | None = None,
    cleaning: Literal["babylm", "published", "none"] = "none",
) -> FilesCorpus:
    return FilesCorpus(
        kind="files", train=tuple(map(str, train)), split=split or tail(), cleaning=cleaning
    )


def texts(sources: FileSources, split: Literal["train", "dev"]) -> list[tuple[str, str]]:
    return [(domain, "".join(lines)) for domain, lines in iter_text(sources, split)]


def write(path: Path, content: str | bytes = "some text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -- what is refused -----------------------------------------------------------------------------


def test_one_file_in_both_splits_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    link = tmp_path / "b.txt"
    link.symlink_to(path)
    for dev in (path, tmp_path / "." / "a.txt", link):
        with pytest.raises(DataError, match="which is also a training file"):
            read_sources(corpus(path, split=held_out(dev)))


def test_a_copy_of_training_text_in_dev_is_refused(tmp_path: Path) -> None:
    train, dev = write(tmp_path / "a.train"), write(tmp_path / "b.dev")
    with pytest.raises(DataError, match=r"b\.dev, which has the same content as .*a\.train"):
        read_sources(corpus(train, split=held_out(dev)))


@pytest.mark.parametrize("block_bytes", [1 << 20, 4, 5])
@pytest.mark.parametrize(
    "copy",
    [
        "\ufeffმარა\n\nხატავს\n",  # a byte order mark, as some editors put it
        "მარა\r\n\r\nხატავს\r\n",
        "მარა\r\rხატავს\r",
        "მარა\n\nხატავს",
        "\ufeffმარა\r\n\r\nხატავს",
    ],
)
def test_a_copy_with_other_line_ends_is_one(
    tmp_path: Path, copy: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("babyllama_ds.corpus.checking._BLOCK_BYTES", block_bytes)
    train = write(tmp_path / "a.train", "მარა\n\nხატავს\n")
    dev = write(tmp_path / "b.dev", copy)
    with pytest.raises(DataError, match=r"b\.dev, which has the same content as .*a\.train"):
        read_sources(corpus(train, split=held_out(dev)))
    other = write(tmp_path / "c.dev", copy.replace("მ", "ნ"))
    read_sources(corpus(train, split=held_out(other)))


# -- reading -------------------------------------------------------------------------------------


def test_a_link_to_nowhere_and_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "gone.txt"
    nowhere.symlink_to(tmp_path / "target.txt")
    secret = write(tmp_path / "secret.txt")
    real_open = Path.open

    def open_as_another_user(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == secret:  # tests may run as root, who may read everything
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_as_another_user)
    with pytest.raises(DataError) as caught:
        read_sources(corpus(nowhere, secret))
    assert [(p.where, p.got) for p in caught.value.problems] == [
        (str(nowhere), "No such file or directory"),
        (str(secret), "Permission denied"),
    ]


def test_files_without_text_among_others_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full, empty = write(tmp_path / "full.txt"), write(tmp_path / "empty.txt", " \n")
    read_sources(corpus(full))
    assert caplog.messages == []
    read_sources(corpus(full, empty))
    assert caplog.messages == [f"corpus: 1 of 2 files without text, the first {empty}"]


@pytest.mark.parametrize("blank", ["", "\n \t\n", "\ufeff", "\u00a0\u2003\n"])
def test_a_split_without_text_is_refused(tmp_path: Path, blank: str) -> None:
    empty = write(tmp_path / "empty.txt", blank)
    full = write(tmp_path / "full.txt")
    with pytest.raises(DataError, match=r"corpus\.train: got 1 file\(s\) without any text"):
        read_sources(corpus(empty))
    with pytest.raises(DataError, match=r"corpus\.split\.dev: got 1 file\(s\) without any text"):
        read_sources(corpus(full, split=held_out(empty)))
    assert len(read_sources(corpus(empty, full)).files) == 2


def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path: Path) -> None:
    # The second byte of a character is missing, just where a block of the real size ends.
    good = b"x" * ((1 << 20) - 1)
    path = write(tmp_path / "latin.txt", good + "é".encode()[:1] + b" and more\n")
    with pytest.raises(DataError) as caught:
        read_sources(corpus(path))
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert problem.got == f"byte 0xC3 at offset {len(good)} (invalid continuation byte)"
    assert "iconv -f LATIN1 " in (problem.hint or "")


def test_utf_16_is_known_by_its_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "windows.txt", "Once upon a time.\n".encode("utf-16"))
    with pytest.raises(DataError) as caught:
        read_sources(corpus(path))
    (problem,) = caught.value.problems
    assert problem.got == "byte 0xFF at offset 0 (invalid start byte)"
    assert "iconv -f UTF-16 " in (problem.hint or "")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    parts=st.lists(
        st.one_of(st.text(max_size=3).map(str.encode), st.binary(max_size=3), st.just(b"\r\n")),
        max_size=8,
    ),
    block_bytes=st.integers(1, 6),
)
def test_offsets_and_lines_do_not_depend_on_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: list[bytes], block_bytes: int
) -> None:
    content = b"".join(parts)
    path = write(tmp_path / "any.txt", content)
    monkeypatch.setattr(checking, "_BLOCK_BYTES", block_bytes)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(DataError, match=f"at offset {error.start} "):
            checking.read_file(path, "train", "text")
    else:
        if 4 * content.count(0) > len(content):
            with pytest.raises(DataError, match="null bytes"):
                checking.read_file(path, "train", "text")
            return
        with path.open(encoding="utf-8") as stream:
            assert checking.read_file(path, "train", "text").lines == len(list(stream))


def test_check_can_stop_the_reading(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        read_sources(corpus(write(tmp_path / "a.txt")), check=stop)


# -- streaming -----------------------------------------------------------------------------------

ODD_TEXT = (
    "\ufeffone\r\ntwo\x0cff\u2028ls\x85nel\x1cfs\x00nul\rthree\n\n \t\nBOM inside \ufeff é last"
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.train", ODD_TEXT),
        ("brackets [x] #1/a*b?.txt", ODD_TEXT),
        ("zip::chained.txt", ODD_TEXT),
        ("magic.train", "BZh starts like an archive\n"),
        ("magic.dev", "PK\x03\x04 as well\n"),
        ("packed.gz.txt", "not packed\n"),
        ("empty.txt", ""),
    ],
)
def test_no_character_is_lost(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    sources = read_sources(
        corpus(path, write(tmp_path / "z.txt"), split=held_out(write(tmp_path / "y.dev", "dev")))
    )
    with path.open(encoding="utf-8-sig") as stream:
        expected = stream.read()
    if expected and not expected.endswith("\n"):
        expected += "\n"
    (domain, text), (_, other) = texts(sources, "train")
    assert (domain, text, other) == (path.stem, expected, "some text\n")
    assert texts(sources, "dev") == [("y", "dev\n")]


def test_many_lines_and_long_ones(tmp_path: Path) -> None:
    # More than a block of bytes, more than a block of lines, and one line longer than a block.
    lines = [f"line {i} é\n" for i in range(5000)] + ["x" * 1_500_000 + "\n"] + ["end\n"] * 1500
    sources = read_sources(corpus(write(tmp_path / "long.txt", "".join(lines)), split=tail(0.5)))
    (_, train), (_, dev) = texts(sources, "train") + texts(sources, "dev")
    assert sources.files[0].lines == 6501
    assert train + dev == "".join(lines)


def test_reading_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    sources = read_sources(corpus(write(tmp_path / "a.txt", "a\nb\n"), split=tail(0.5)))
    assert texts(sources, "train") == [("a", "a\n")]


def test_cleaning_goes_by_the_file_name(tmp_path: Path) -> None:
    text = "one .\n\ntwo .\n"
    paths = [write(tmp_path / name, text) for name in ("childes.train", "simple_wiki.train")]
    dev = write(tmp_path / "bnc_spoken.dev", text + text)
    cleaned = read_sources(corpus(*paths, split=held_out(dev), cleaning="babylm"))
    assert texts(cleaned, "train") == [
        ("childes", "one.\n\ntwo.\n"),
        ("simple_wiki", "one .\ntwo .\n"),
    ]
    assert texts(cleaned, "dev") == [("bnc_spoken", "one.\ntwo.\none.\ntwo.\n")]
    raw = read_sources(corpus(*paths, split=held_out(dev)))
    assert texts(raw, "train") == [("childes", text), ("simple_wiki", text)]


@pytest.mark.parametrize(
    ("num_lines", "expected"),
    [(0, 0), (1, 1), (9, 9), (10, 10), (11, 10), (20, 19), (30, 28), (50, 48), (1000, 950)],
)  # 9.5 -> 10, 28.5 -> 28, 47.5 -> 48: Python rounds halves to even, as the published code does
def test_the_published_cut(num_lines: int, expected: int) -> None:
    assert train_lines(num_lines, 0.05) == expected


def test_the_tail_of_each_file_is_cut_after_cleaning(tmp_path: Path) -> None:
    documents = [f"document {i}\n\n" for i in range(20)]
    wiki = write(tmp_path / "simple_wiki.train", "".join(documents))
    diary = write(tmp_path / "diary.txt", "".join(f"day {i}\n" for i in range(40)))
    sources = read_sources(corpus(wiki, diary, cleaning="babylm"))
    (_, wiki_train), (_, diary_train) = texts(sources, "train")
    assert wiki_train == "".join(f"document {i}\n" for i in range(19))
    assert diary_train == "".join(f"day {i}\n" for i in range(38))
    assert texts(sources, "dev") == [
        ("simple_wiki", "document 19\n"),
        ("diary", "day 38\nday 39\n"),
    ]


def rewrite(path: Path, text: str, *, modified_ns: int | None = None) -> None:
    before = path.stat().st_mtime_ns
    path.write_text(text)
    time = before if modified_ns is None else modified_ns
    os.utime(path, ns=(time, time))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: rewrite(path, "one\ntwo\nthree\n"),
        lambda path: rewrite(path, "eno\nowt\n", modified_ns=0),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"\xff\n\n"),
    ],
)
def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path, change: Any) -> None:
    path = write(tmp_path / "a.train", "one\ntwo\n")
    sources = read_sources(corpus(path, split=held_out(write(tmp_path / "b.dev"))))
    change(path)
    with pytest.raises(DataError, match="that were there when the stage began"):
        texts(sources, "train")


# -- fingerprints --------------------------------------------------------------------------------


def test_the_fingerprint_follows_content_not_paths(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    write(folder / "childes.train", "a b c\n" * 20)
    write(folder / "diary.txt", "d e f\n" * 20)

    def fingerprint(where: Path, **choices: Any) -> str:
        return read_sources(corpus(where / "*", **choices)).fingerprint()

    original = fingerprint(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "two"))
    assert fingerprint(moved) == original

    different = {
        fingerprint(folder, cleaning="babylm"),
        fingerprint(folder, split=tail(0.1)),
        fingerprint(folder, split=held_out(write(tmp_path / "x.dev"))),
    }
    (moved / "diary.txt").write_text("d e f\n" * 19 + "d e g\n")  # one byte
    different.add(fingerprint(moved))
    shutil.move(moved / "childes.train", moved / "cbt.train")  # another domain
    different.add(fingerprint(moved))
    assert len(different | {original}) == 6


def test_the_fingerprint_follows_the_cleaning_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = read_sources(corpus(write(tmp_path / "a.txt")))
    before = sources.fingerprint()
    monkeypatch.setattr(module, "CLEANING_VERSION", module.CLEANING_VERSION + 1)
    assert sources.fingerprint() != before


# -- packed files and tables ---------------------------------------------------------------------

PACK: dict[str, Any] = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd.compress}


@pytest.mark.parametrize("packing", sorted(PACK))
def test_a_packed_file_gives_the_text_that_is_in_it(tmp_path: Path, packing: str) -> None:
    """Packed in two parts; its first mark shows that it is read as UTF-8 and no other way."""
    content = (ODD_TEXT + "\n" + "x" * 3000 + "é\n") * 400
    plain = write(tmp_path / "plain" / "town.train", content)
    half = len(content.encode()) // 2
    packed = write(
        tmp_path / "packed" / f"town.train.{packing}",
        PACK[packing](content.encode()[:half]) + PACK[packing](content.encode()[half:]),
    )
    one, other = (read_sources(corpus(path, split=tail(0.5))) for path in (plain, packed))
    for split in ("train", "dev"):
        assert texts(other, split) == texts(one, split)  # type: ignore[arg-type]
    (_, whole), (_, rest) = texts(other, "train") + texts(other, "dev")
    with plain.open(encoding="utf-8-sig") as stream:
        assert whole + rest == stream.read()
    assert other.fingerprint() == one.fingerprint()


def rows_file(path: Path, rows: list[str]) -> Path:
    return write(path, "".join(json.dumps({"text": row}) + "\n" for row in rows))


def test_each_row_is_a_document(tmp_path: Path) -> None:
    rows = ["one\ntwo", "", "three\r\nfour\n", "\n", "last"]
    path = rows_file(tmp_path / "a.jsonl", rows)
    sources = read_sources(corpus(path, split=held_out(write(tmp_path / "b.dev"))))
    ((domain, lines),) = iter_text(sources, "train")
    assert domain == "a"
    assert list(lines) == ["one\n", "two\n", "", "three\n", "four\n", "", "\n", "", "last\n", ""]
    assert texts(sources, "dev") == [("b", "some text\n")]


def test_cleaning_keeps_the_ends_of_documents(tmp_path: Path) -> None:
    rows = ["Subtitles by nobody", "a\nsubtitle\nb", "c"]
    path = rows_file(tmp_path / "open_subtitles.train.jsonl", rows)
    dev = write(tmp_path / "b.dev")
    sources = read_sources(corpus(path, split=held_out(dev), cleaning="babylm"))
    ((_, lines),) = iter_text(sources, "train")
    assert list(lines) == ["a\n", "b\n", "", "c\n", ""]


def test_the_tail_of_a_table_is_whole_rows(tmp_path: Path) -> None:
    rows = [f"a {i}\nb {i}" for i in range(10)]
    sources = read_sources(corpus(rows_file(tmp_path / "a.jsonl", rows), split=tail(0.3)))
    assert texts(sources, "train") == [("a", "".join(f"{row}\n" for row in rows[:7]))]
    assert texts(sources, "dev") == [("a", "".join(f"{row}\n" for row in rows[7:]))]


def test_a_table_by_its_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,body\n1,one\n2,two\n")
    dev = held_out(write(tmp_path / "b.dev"))

    def read(**keys: Any) -> FileSources:
        spec = FilesCorpus(kind="files", train=(str(path),), split=dev, cleaning="none", **keys)
        return read_sources(spec)  # type: ignore[return-value]

    assert texts(read(column="body"), "train") == [("a", "one\ntwo\n")]
    assert texts(read(column="id"), "train") == [("a", "1\n2\n")]
    assert read(column="body").fingerprint() != read(column="id").fingerprint()
    with pytest.raises(DataError, match=r"a\.csv:1: got no column 'text'"):
        read()


def test_a_table_without_text_is_refused(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.jsonl", ["", " \n"])
    with pytest.raises(DataError, match=r"corpus\.train: got 1 file\(s\) without any text"):
        read_sources(corpus(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: rewrite(path, '{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n'),
        lambda path: rewrite(path, '{"text": "eno"}\n{"text": "owt"}\n', modified_ns=0),
        lambda path: path.unlink(),
    ],
)
def test_a_table_that_changes_under_a_run_is_noticed(tmp_path: Path, change: Any) -> None:
    path = rows_file(tmp_path / "a.jsonl", ["one", "two"])
    sources = read_sources(corpus(path, split=held_out(write(tmp_path / "b.dev"))))
    change(path)
    with pytest.raises(DataError, match="rows that were there when the stage began"):
        texts(sources, "train")


def test_a_packed_copy_of_training_text_in_dev_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.train", "text\n")
    dev = write(tmp_path / "b.dev.xz", lzma.compress(b"text\n"))
    with pytest.raises(DataError, match=r"b\.dev\.xz, which has the same content as .*a\.train"):
        read_sources(corpus(train, split=held_out(dev)))


# -- cleaning as published -----------------------------------------------------------------------


def test_published_cleaning_glues_documents_and_files(tmp_path: Path) -> None:
    """In sorted order; the published code reads files in that of the file system."""
    write(tmp_path / "qed.train", "SO IT IS.\n")
    write(tmp_path / "simple_wiki.train", "End.\n\nStart.\n")
    dev = held_out(write(tmp_path / "x.dev"))
    sources = read_sources(corpus(tmp_path / "*.train", split=dev, cleaning="published"))
    assert texts(sources, "train") == [("qed", "So it is."), ("simple_wiki", "End.Start.\n")]
    fixed = read_sources(corpus(tmp_path / "*.train", split=dev, cleaning="babylm"))
    assert texts(fixed, "train") == [("qed", "So it is.\n"), ("simple_wiki", "End.\nStart.\n")]
    assert sources.fingerprint() != fixed.fingerprint()


def test_the_published_failure_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "qed.train", "a\n(LAUGHTER)\n")
    dev = held_out(write(tmp_path / "x.dev"))
    with pytest.raises(DataError, match=r"qed\.train:2: got '\(LAUGHTER\)'.*ZeroDivisionError"):
        texts(read_sources(corpus(path, split=dev, cleaning="published")), "train")


def test_a_table_cannot_be_cleaned_as_published(tmp_path: Path) -> None:
    dev = held_out(write(tmp_path / "x.dev"))
    path = rows_file(tmp_path / "qed.jsonl", ["a"])
    with pytest.raises(DataError, match=r"corpus\.cleaning: got 'published' for .*qed\.jsonl"):
        read_sources(corpus(path, split=dev, cleaning="published"))
    other = rows_file(tmp_path / "diary.jsonl", ["a"])  # no rule, so nothing to apply
    sources = read_sources(corpus(other, split=dev, cleaning="published"))
    assert texts(sources, "train") == [("diary", "a\n")]


# -- documents of tables ---------------------------------------------------------------------------


def test_rows_are_documents_of_a_table_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": "three"}\n')
    (tmp_path / "b.txt").write_text("four\n\nfive\n")
    (tmp_path / "dev.txt").write_text("six\n")

    def refused(train: str, documents: str) -> str:
        spec = FilesCorpus.model_validate(
            {
                "kind": "files",
                "train": (str(tmp_path / train),),
                "split": {"kind": "tail", "fraction": 0.5},
                "documents": documents,
            }
        )
        with pytest.raises(DataError) as caught:
            read_sources(spec)
        return str(caught.value)

    assert "b.txt, a text" in refused("b.txt", "rows")
    assert "a.jsonl, a table" in refused("a.jsonl", "lines")
    assert "corpus.documents" in refused("a.jsonl", "blank_lines")


# -- texts that are only measured on -------------------------------------------------------------


def test_texts_are_development_text_each_a_domain(tmp_path: Path) -> None:
    paths = [write(tmp_path / "tales.text", "a \n\nb"), write(tmp_path / "switchboard.dev", "c\n")]
    sources = read_texts(paths, cleaning="none", where="--text")
    assert texts(sources, "dev") == [("tales", "a \n\nb\n"), ("switchboard", "c\n")]
    assert texts(sources, "train") == []
    split = held_out(tmp_path / "switchboard.dev")
    same = read_sources(corpus(write(tmp_path / "x.train"), split=split)).files[-1]
    assert sources.files[1] == same


def test_texts_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    latin = write(tmp_path / "latin.txt", b"caf\xe9")
    with pytest.raises(DataError) as caught:
        read_texts([tmp_path / "no.txt", latin, tmp_path], cleaning="none", where="--text")
    got = [problem.got for problem in caught.value.problems]
    assert got[0] == "No such file or directory"
    assert "0xE9" in got[1]
    assert got[2] == "Is a directory"
    blank = write(tmp_path / "blank.txt", " \n\n")
    with pytest.raises(DataError, match=r"--text: got .*blank\.txt, a file without any text"):
        read_texts([blank], cleaning="none", where="--text")
    pair = [write(tmp_path / "one" / "a.txt"), write(tmp_path / "two" / "a.dev")]
    with pytest.raises(DataError, match=r"two/a\.dev, of the same name as .*one/a\.txt"):
        read_texts(pair, cleaning="none", where="--text")
