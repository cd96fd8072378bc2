"""A file read once before anything is made of it: its content's hash, and whether it is text.

Enters: a path. Leaves: a `TextFile`, proved to be whole, UTF-8 and, where it is a table, to have
text in every row of the column; or an error that names the place.

A packed file is known by what is in it: packed anew, or unpacked, it is the same text. Copies are
known by their text, whatever their lines end in.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, cast

from babyllama_ds.corpus.finding import Form, Packing, domain_of, form_of, packing_of
from babyllama_ds.corpus.rows import read_rows
from babyllama_ds.corpus.streams import Split
from babyllama_ds.errors import DataError
from babyllama_ds.files import check_name

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_BLOCK_BYTES = 1 << 20
_CHECK_ROWS = 1024

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""What reading a packed file raises when it is cut short or damaged."""

_BEGINS: dict[bytes, Packing] = {
    b"\x1f\x8b": "gz",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zst",
}


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file as it was when it was read and found to be UTF-8."""

    path: Path
    domain: str
    """The file name without its suffixes."""
    split: Split
    """`train` for every file when development text is the tail of each (see `FileSources.tail`)."""
    sha256: str
    """Of the file's bytes, unpacked."""
    text_sha256: str = field(compare=False)
    """Of what is read from them: the same with and without a byte order mark or a last line break,
    and whatever lines end in."""
    bytes: int
    """How many there are, unpacked."""
    lines: int
    """Lines before cleaning; of a table its rows."""
    has_text: bool
    """Whether there is anything but whitespace in it."""
    column: str | None = None
    """Where a table has its text."""
    modified_ns: int = field(compare=False)
    """Modification time, to notice a file that changes under a run."""

    @property
    def form(self) -> Form:
        """What it holds: text, or rows of which each is a document."""
        return form_of(self.path) or "text"

    def read_as(self) -> list[str]:
        """What decides its text beside its bytes: nothing, or of a table its form and column."""
        return [] if self.column is None else [self.form, self.column]


def read_file(
    path: Path, split: Split, column: str, check: Callable[[], None] | None = None
) -> TextFile:
    """Read a file whole, block by block; `check` is called between them and may raise to stop.

    Raises `DataError`: it is no regular file, cannot be read or unpacked, is not UTF-8 (or hardly:
    null bytes in plenty), or is not called so, or is a table without text in `column` in every row.
    """
    check_name(path)
    form = form_of(path) or "text"
    content = _Content(path, is_text=form != "parquet")
    try:
        status = path.stat()
        if not (S_ISREG(status.st_mode) or S_ISDIR(status.st_mode)):
            raise _read_but_once(path)
        with unpacked(path) as stream:
            while block := stream.read(_BLOCK_BYTES):
                if check is not None:
                    check()
                content.add(block)
            content.end()
    except DAMAGED as error:
        raise _damaged(path, content.size, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    lines, has_text = content.lines.total(), content.has_text
    if form != "text" and content.size:
        lines, has_text = _count_rows(path, column, check)
    return TextFile(
        path=path,
        domain=domain_of(path),
        split=split,
        sha256=content.digest.hexdigest(),
        text_sha256=(content.digest if form == "parquet" else content.text_digest).hexdigest(),
        bytes=content.size,
        lines=lines,
        has_text=has_text,
        column=None if form == "text" else column,
        modified_ns=status.st_mtime_ns,
    )


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes in a file, as its name says that they are packed."""
    packing = packing_of(path)
    with path.open("rb", buffering=-1 if packing else 0) as raw:
        if packing is None:
            yield cast(IO[bytes], raw)
        elif packing == "gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield cast(IO[bytes], stream)
        else:
            with lzma.LZMAFile(raw) if packing == "xz" else zstd.ZstdFile(raw) as stream:
                yield cast(IO[bytes], stream)


class _Content:
    """What is found out of a file's bytes, block by block."""

    def __init__(self, path: Path, *, is_text: bool) -> None:
        self.size, self.has_text = 0, False
        self.digest, self.lines = hashlib.sha256(), LineCounter()
        self.text_digest = hashlib.sha256()
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True)
        self._line_ended = True
        self._nulls, self._begins_null = 0, False
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")() if is_text else None

    def add(self, block: bytes) -> None:
        self.digest.update(block)
        if self._decoder is not None:
            self.lines.add(block)
            text = self._decode(self._decoder, block)
            self._nulls += block.count(0)
            self._begins_null = self._begins_null or (not self.size and not block[0])
            text = text if self.size else text.removeprefix("\ufeff")
            self.has_text = self.has_text or bool(text.strip())
            self._digest_text(text)
        self.size += len(block)

    def end(self) -> None:
        if self._decoder is not None:
            self._decode(self._decoder, b"")
            self._digest_text("", final=True)
            if not self._line_ended:
                self.text_digest.update(b"\n")
            if 4 * self._nulls > self.size:
                encoding = "UTF-16BE" if self._begins_null else "UTF-16LE"
                raise _two_byte_text(self._path, self._nulls, self.size, encoding)

    def _digest_text(self, text: str, *, final: bool = False) -> None:
        if text := self._newlines.decode(text, final):
            self.text_digest.update(text.encode())
            self._line_ended = text.endswith("\n")

    def _decode(self, decoder: codecs.IncrementalDecoder, block: bytes) -> str:
        """`block` as text; no block: the file ends here."""
        held_back, _ = decoder.getstate()  # the start of a character that the last block cut in two
        try:
            return decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = self.size - len(held_back) + error.start
            raise _not_utf8(self._path, error, offset) from error


class LineCounter:
    """Counts lines as universal newlines do, over blocks that may cut a `\\r\\n` in two."""

    def __init__(self) -> None:
        self._breaks = 0
        self._last = b"\n"

    def add(self, block: bytes) -> None:
        """Count the next bytes."""
        self._breaks += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        self._breaks -= self._last == b"\r" and block.startswith(b"\n")
        self._last = block[-1:]

    def total(self) -> int:
        """The lines of all that was added."""
        return self._breaks + (self._last not in (b"\n", b"\r"))


def _count_rows(path: Path, column: str, check: Callable[[], None] | None) -> tuple[int, bool]:
    """The rows of a table, and whether there is any text in them."""
    rows, has_text = 0, False
    for text in read_rows(path, column):
        rows += 1
        has_text = has_text or bool(text.strip())
        if check is not None and rows % _CHECK_ROWS == 0:
            check()
    return rows, has_text


# -- what is wrong -------------------------------------------------------------------------------


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> DataError:
    begins = error.object[error.start : error.start + 2] if not offset else b""
    encoding = "UTF-16" if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "LATIN1"
    hint = f"convert it, for instance: iconv -f {encoding} -t UTF-8 OLD > NEW"
    if packing_of(path) is None and (packing := _begins_like(path)):
        hint = f"it begins like a compressed file: call it {path.name}.{packing}"
    inside = ", unpacked" if packing_of(path) else ""
    return DataError.of(
        path,
        got=f"byte 0x{error.object[error.start]:02X} at offset {offset}{inside} ({error.reason})",
        expected="UTF-8 text",
        hint=hint,
    )


def _two_byte_text(path: Path, nulls: int, size: int, encoding: str) -> DataError:
    """UTF-16 without a byte order mark: of English every second byte is 0, which UTF-8 allows."""
    return DataError.of(
        path,
        got=f"{nulls:,} null bytes among {size:,}",
        expected="UTF-8 text",
        hint=f"convert it, for instance: iconv -f {encoding} -t UTF-8 OLD > NEW",
    )


def _damaged(path: Path, size: int, error: Exception) -> DataError:
    packing = packing_of(path)
    expected = f"a whole {packing} file"
    if _begins_like(path) != packing and not size:
        return DataError.of(
            path,
            got=f"a file that does not begin like {packing}",
            expected=expected,
            hint=f"if it is not compressed, call it {path.with_suffix('').name}",
        )
    what = "is cut short" if isinstance(error, EOFError) else f"is damaged ({error})"
    return DataError.of(
        path,
        got=f"a compressed file that {what}, after {size:,} bytes of content",
        expected=expected,
        hint="copy or download it again, and compare its size with the original's",
    )


def _begins_like(path: Path) -> Packing | None:
    with path.open("rb") as stream:
        begin = stream.read(6)
    return next((packing for magic, packing in _BEGINS.items() if begin.startswith(magic)), None)


def _read_but_once(path: Path) -> DataError:
    return DataError.of(
        path,
        got="something that is not a regular file",
        expected="a file: text is read several times",
        hint="write what comes of a pipe into a file",
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError.of(path, got=error.strerror or str(error), expected="a readable file")
