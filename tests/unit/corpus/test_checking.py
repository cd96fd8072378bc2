"""Checking: packed files are what is in them, and damage is told before anything is made."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from babyllama_ds.corpus.checking import TextFile, read_file
from babyllama_ds.errors import DataError, Stopped

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}
packings = pytest.mark.parametrize("packing", sorted(PACK))

# Does not pack well, so that a file cut in the middle has given some of its text.
TEXT = "".join(f"line {random.Random(i).random()} é\r\n" for i in range(9000)).encode()


def read(path: Path) -> TextFile:
    return read_file(path, "train", "text")


def refused(path: Path) -> tuple[str, str, str]:
    with pytest.raises(DataError) as caught:
        read(path)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    return problem.got, problem.expected, problem.hint or ""


@packings
@pytest.mark.parametrize("parts", [1, 3])
def test_a_packed_file_is_what_is_in_it(tmp_path: Path, packing: str, parts: int) -> None:
    """Also one that is packed in parts, as parallel packers do it."""
    plain, packed = tmp_path / "a.txt", tmp_path / f"a.txt.{packing}"
    plain.write_bytes(TEXT * parts)
    packed.write_bytes(PACK[packing](TEXT) * parts)
    one, other = read(plain), read(packed)
    assert other.sha256 == one.sha256 == hashlib.sha256(TEXT * parts).hexdigest()
    assert (other.bytes, other.lines) == (one.bytes, one.lines) == (len(TEXT) * parts, 9000 * parts)
    assert other.domain == one.domain == "a"
    assert other.form == one.form == "text"


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    """It would be a domain's, in the index of the shards and in every report."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_bytes(TEXT)
    with pytest.raises(DataError, match=r"caf\\xe9\.txt: got a file name that is not") as told:
        read(path)
    str(told.value).encode()  # it stands in `state.json`


@packings
def test_a_file_cut_short(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt.{packing}"
    whole = PACK[packing](TEXT)
    for size in (len(whole) - 1, len(whole) * 3 // 4, 20):
        path.write_bytes(whole[:size])
        got, expected, hint = refused(path)
        assert got.startswith("a compressed file that is cut short, after "), size
        assert expected == f"a whole {packing} file"
        assert "download it again" in hint


@packings
def test_a_damaged_file(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt.{packing}"
    damaged = bytearray(PACK[packing](TEXT))
    for place in range(len(damaged) // 2, len(damaged) // 2 + 64):
        damaged[place] ^= 0x55
    path.write_bytes(damaged)
    got, _, _ = refused(path)
    # Damage that still unpacks to something is told by a checksum, or by what it unpacks to.
    assert "is damaged" in got or "is cut short" in got or "offset" in got, got


@packings
def test_a_file_whose_name_says_packed_and_is_not(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt.{packing}"
    path.write_text("Once upon a time there was a plain text file.\n" * 20)
    got, _, hint = refused(path)
    assert got == f"a file that does not begin like {packing}"
    assert hint == "if it is not compressed, call it a.txt"


@packings
def test_a_file_that_is_packed_and_its_name_says_nothing(tmp_path: Path, packing: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(PACK[packing](TEXT))
    got, expected, hint = refused(path)
    assert "offset" in got
    assert expected == "UTF-8 text"
    assert hint == f"it begins like a compressed file: call it a.txt.{packing}"


@packings
def test_bytes_that_are_not_utf8_inside(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt.{packing}"
    path.write_bytes(PACK[packing](TEXT + b"caf\xe9\n"))
    got, _, hint = refused(path)
    assert got == f"byte 0xE9 at offset {len(TEXT) + 3}, unpacked (invalid continuation byte)"
    assert "iconv" in hint


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE"])
def test_text_of_two_bytes_a_letter_without_a_mark_is_no_utf8(
    tmp_path: Path, encoding: str
) -> None:
    """It would be: every second byte is a null, which is a character."""
    path = tmp_path / "a.txt"
    path.write_bytes("A plain cat.\n".encode(encoding))
    got, expected, hint = refused(path)
    assert got == "13 null bytes among 26"
    assert expected == "UTF-8 text"
    assert f"iconv -f {encoding} " in hint


def test_a_null_byte_here_and_there_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\0cat sat\n" * 9)
    assert read_file(path, "train", "text").lines == 9


def test_check_can_stop_the_reading_of_a_packed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(TEXT))

    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        read_file(path, "train", "text", stop)


def test_a_pipe_can_be_read_but_once() -> None:
    """`evaluate --text <(zcat a.gz)`"""
    reading, writing = os.pipe()
    os.write(writing, b"a line\n")
    os.close(writing)
    try:
        assert refused(Path(f"/dev/fd/{reading}"))[:2] == (
            "something that is not a regular file",
            "a file: text is read several times",
        )
    finally:
        os.close(reading)
