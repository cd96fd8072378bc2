"""Text files, checked once, then streamed.

Enters: a `FilesCorpus`. Leaves: `Sources` (which files there are, what they hold, proved to be
UTF-8) and, from `iter_text`, the cleaned lines of a split, file by file, in bounded memory.
`tokenizer` and `shards` read them.

A line ends at a line feed, a carriage return or both (Python's universal newlines, as in the
published code) and at nothing else; a byte order mark at the start of a file is no text.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from babyllama_ds.corpus.cleaning import CLEANING_VERSION, Cleaning, clean
from babyllama_ds.errors import DataError, Problem
from babyllama_ds.files import hash_json
from babyllama_ds.spec.corpus import FilesCorpus, HeldOutFiles

Split = Literal["train", "dev"]

SUFFIXES = (".txt", ".train", ".dev")
_BLOCK_BYTES = 1 << 20
_BLOCK_LINES = 1024


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A text file as it was when it was read and found to be UTF-8."""

    path: Path
    domain: str
    """The file name without its suffix."""
    split: Split
    """`train` for every file when development text is the tail of each (see `Sources.tail`)."""
    sha256: str
    """Of the file's bytes."""
    bytes: int
    """The file's size."""
    lines: int
    """Lines before cleaning."""
    has_text: bool
    """Whether there is anything but whitespace in it."""
    modified_ns: int = field(compare=False)
    """Modification time, to notice a file that changes under a run."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of a corpus, in the order in which they are read, and what is done to them."""

    files: tuple[TextFile, ...]
    cleaning: Cleaning
    tail: float | None
    """Share of each file's cleaned lines that is held out; none: dev files are given."""

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the cleaned text of both splits; paths do not."""
        files = [[file.domain, file.split, file.sha256] for file in self.files]
        cleaning = [self.cleaning, CLEANING_VERSION]
        return hash_json({"files": files, "cleaning": cleaning, "tail": self.tail})


def read_sources(spec: FilesCorpus, *, check: Callable[[], None] | None = None) -> Sources:
    """Find the files of `spec` and read each once: its hash, its lines, whether it is UTF-8.

    `check` is called between blocks of bytes and may raise to stop. Raises `DataError` with all
    problems of a kind at once: a pattern that matches nothing or what is not a text file; a file
    that cannot be read or is not UTF-8; the same text in train and dev; a split without any text.
    """
    held_out = spec.split.dev if isinstance(spec.split, HeldOutFiles) else ()
    found = find_files(spec.train, held_out)
    files: list[TextFile] = []
    problems: list[Problem] = []
    for split, path in found:
        try:
            files.append(_read_file(path, split, check))
        except DataError as error:
            problems += error.problems
    problems = problems or _shared_text(files) or _empty_splits(files)
    if problems:
        raise DataError.all_of(problems)
    tail = None if isinstance(spec.split, HeldOutFiles) else spec.split.fraction
    return Sources(files=tuple(files), cleaning=spec.cleaning, tail=tail)


def read_texts(paths: Sequence[Path], *, cleaning: Cleaning, where: str) -> Sources:
    """Files that nothing is trained on, each a domain of development text, read once.

    `where` is what named them. Raises `DataError` with all problems of a kind at once: a file that
    cannot be read, is not UTF-8 or holds no text; two files that would be one domain.
    """
    files: list[TextFile] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            files.append(_read_file(path.expanduser(), "dev", None))
        except DataError as error:
            problems += error.problems
    problems = problems or _without_text(files, where) or _one_domain(files, where)
    if problems:
        raise DataError.all_of(problems)
    return Sources(files=tuple(files), cleaning=cleaning, tail=None)


def find_files(train: Sequence[str], dev: Sequence[str] = ()) -> list[tuple[Split, Path]]:
    """The files that the patterns of a corpus name, pattern by pattern, each one's matches sorted.

    `~` is the home directory; relative patterns start at the working directory; `**` crosses
    folders. A file matched twice is taken once. Raises `DataError` with every problem.
    """
    found: dict[Path, tuple[Split, Path]] = {}
    problems: list[Problem] = []
    patterns: list[tuple[Split, str]] = [("train", pattern) for pattern in train]
    patterns += [("dev", pattern) for pattern in dev]
    for split, pattern in patterns:
        paths = _expand(pattern)
        if not paths:
            problems.append(_nothing_matches(split, pattern))
        for path in paths:
            first_split, _ = found.setdefault(_identity(path), (split, path))
            if first_split != split:
                problems.append(_in_both_splits(path))
            elif (got := _not_a_text_file(path)) is not None:
                problems.append(_wrong_file(split, path, got))
    if problems:
        raise DataError.all_of(problems)
    return list(found.values())


def iter_text(sources: Sources, split: Split) -> Iterator[tuple[str, Iterator[str]]]:
    """(domain, cleaned lines) of each file that has a part in `split`, in order.

    Every line ends with a line break. A file is opened when its first line is asked for, and at
    most a few megabytes of it are in memory. Raises `DataError` for a file that has changed since
    `read_sources`.
    """
    for file in sources.files:
        if sources.tail is not None:
            yield file.domain, _part(file, sources.cleaning, sources.tail, split)
        elif file.split == split:
            yield file.domain, _cleaned(file, sources.cleaning)


def train_lines(num_lines: int, tail: float) -> int:
    """How many of a file's lines are train when its last `tail` is dev (BabyLlama-2's cut)."""
    return round((1 - tail) * num_lines)


# -- finding -------------------------------------------------------------------------------------


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if os.path.lexists(path):  # a name may hold glob characters
        return [path]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob: no absolute patterns
    return sorted(map(Path, matches))


def _identity(path: Path) -> Path:
    """What two names of one file have in common; a link that leads nowhere is itself."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return path.absolute()


def _not_a_text_file(path: Path) -> str | None:
    if path.is_dir():
        return "a directory"
    if path.suffix.lower() not in SUFFIXES:
        return f"a file called *{path.suffix}" if path.suffix else "a file without a suffix"
    if path.exists() and not path.is_file():
        return "something that is not a regular file"
    return None


def _key(split: Split) -> str:
    return "corpus.train" if split == "train" else "corpus.split.dev"


def _nothing_matches(split: Split, pattern: str) -> Problem:
    return Problem(
        where=_key(split),
        got=f"{pattern!r}, which matches nothing from {Path.cwd()}",
        expected="the path of a file, or a glob that matches one",
        hint="relative paths start at the directory where the command runs",
    )


def _wrong_file(split: Split, path: Path, got: str) -> Problem:
    return Problem(
        where=_key(split),
        got=f"{path}, {got}",
        expected=f"text files ({' '.join(SUFFIXES)})",
        hint=f"narrow the pattern, for instance to {path / '*.txt'}" if path.is_dir() else None,
    )


def _in_both_splits(path: Path) -> Problem:
    return Problem(
        where=_key("dev"),
        got=f"{path}, which is also a training file",
        expected="development text that no model is trained on",
    )


# -- reading once, as bytes ----------------------------------------------------------------------


def _read_file(path: Path, split: Split, check: Callable[[], None] | None) -> TextFile:
    digest, lines, has_text = hashlib.sha256(), _LineCounter(), False
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        modified_ns = path.stat().st_mtime_ns
        with path.open("rb", buffering=0) as stream:
            while block := stream.read(_BLOCK_BYTES):
                if check is not None:
                    check()
                digest.update(block)
                lines.add(block)
                text = _decode(decoder, block, size, path)
                has_text = has_text or bool(text.lstrip("\ufeff").strip())
                size += len(block)
            _decode(decoder, b"", size, path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return TextFile(
        path=path,
        domain=path.stem,
        split=split,
        sha256=digest.hexdigest(),
        bytes=size,
        lines=lines.total(),
        has_text=has_text,
        modified_ns=modified_ns,
    )


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, position: int, path: Path) -> str:
    """`block`, which starts at byte `position`, as text; no block: the file ends here."""
    held_back, _ = decoder.getstate()  # the start of a character that the last block cut in two
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        offset = position - len(held_back) + error.start
        raise DataError.of(
            path,
            got=f"byte 0x{bad:02X} at offset {offset} ({error.reason})",
            expected="UTF-8 text",
            hint="convert it, for instance: iconv -f LATIN1 -t UTF-8 OLD > NEW (or -f UTF-16)",
        ) from error


class _LineCounter:
    """Counts lines as universal newlines do, over blocks that may cut a `\\r\\n` in two."""

    def __init__(self) -> None:
        self._breaks = 0
        self._last = b"\n"

    def add(self, block: bytes) -> None:
        self._breaks += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        self._breaks -= self._last == b"\r" and block.startswith(b"\n")
        self._last = block[-1:]

    def total(self) -> int:
        return self._breaks + (self._last not in (b"\n", b"\r"))


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError.of(path, got=error.strerror or str(error), expected="a readable file")


def _shared_text(files: list[TextFile]) -> list[Problem]:
    """Held-out files that are copies of training files under another name."""
    trained = {file.sha256: file for file in files if file.split == "train"}
    return [
        Problem(
            where=_key("dev"),
            got=f"{file.path}, which has the same content as {trained[file.sha256].path}",
            expected="development text that no model is trained on",
        )
        for file in files
        if file.split == "dev" and file.has_text and file.sha256 in trained
    ]


def _empty_splits(files: list[TextFile]) -> list[Problem]:
    problems = []
    for split in dict.fromkeys(file.split for file in files):
        mine = [file for file in files if file.split == split]
        if not any(file.has_text for file in mine):
            got = f"{len(mine)} file(s) without any text, the first {mine[0].path}"
            problems.append(Problem(where=_key(split), got=got, expected="some text"))
    return problems


def _without_text(files: list[TextFile], where: str) -> list[Problem]:
    return [
        Problem(where=where, got=f"{file.path}, a file without any text", expected="some text")
        for file in files
        if not file.has_text
    ]


def _one_domain(files: list[TextFile], where: str) -> list[Problem]:
    firsts: dict[str, TextFile] = {}
    return [
        Problem(
            where=where,
            got=f"{file.path}, of the same name as {first.path}",
            expected="texts with names of their own: a name without its suffix is a domain",
            hint="rename one, or leave one out",
        )
        for file in files
        if (first := firsts.setdefault(file.domain, file)) is not file
    ]


# -- streaming -----------------------------------------------------------------------------------


def _part(file: TextFile, cleaning: Cleaning, tail: float, split: Split) -> Iterator[str]:
    # BabyLlama-2 splits cleaned files, so the lines are counted after cleaning. It counts with
    # str.splitlines, which differs only where a text holds form feeds, U+2028 and the like.
    cut = train_lines(_num_cleaned_lines(file, cleaning), tail)
    lines = _cleaned(file, cleaning)
    yield from islice(lines, cut) if split == "train" else islice(lines, cut, None)


@cache
def _num_cleaned_lines(file: TextFile, cleaning: Cleaning) -> int:
    # A pass over the file; its content is part of the key.
    return sum(1 for _ in _cleaned(file, cleaning))


def _cleaned(file: TextFile, cleaning: Cleaning) -> Iterator[str]:
    return clean(file.domain, _read_lines(file), cleaning)


def _read_lines(file: TextFile) -> Iterator[str]:
    """The lines of a file, streamed by `datasets`, each with its line break if it has one.

    `load_dataset("text", ...)` is a wrapper of the builder used here, and loses text or time in
    four ways. It sends a request to the hub, also for local files. It takes a path for a pattern,
    so that a folder called `a[1]` gives no rows and no error. It takes `::` in a path for a chain
    of protocols. It unpacks a `.train` file that starts like an archive (`BZh…`, `Rar!…`). So the
    builder gets a link with a harmless name. Its cache folder only ever holds an empty lock.
    """
    num_lines = 0
    with tempfile.TemporaryDirectory(prefix="babyllama-ds-") as folder:
        link = Path(folder, "text.txt")
        link.symlink_to(file.path.resolve())
        try:
            # Arrow tables: a Python dictionary per line would take ten times as long.
            for table in _stream(link).iter(batch_size=_BLOCK_LINES):
                num_lines += len(table)
                yield from table["text"].to_pylist()
            changed = file.path.stat().st_mtime_ns != file.modified_ns
        except (OSError, UnicodeDecodeError) as error:
            raise _changed(file, f"a file that fails to be read ({error})") from error
    if num_lines != file.lines:
        raise _changed(file, f"{num_lines} lines")
    if changed:
        raise _changed(file, "a file that was written to since")


def _stream(link: Path) -> Any:
    """The `datasets.IterableDataset` of a text file's lines, in Arrow format."""
    from datasets.packaged_modules.text.text import Text

    builder = Text(
        cache_dir=str(link.parent),
        data_files=[str(link)],
        encoding="utf-8-sig",  # drops a byte order mark
        chunksize=_BLOCK_BYTES,
        keep_linebreaks=True,
        sample_by="line",
    )
    return builder.as_streaming_dataset(split="train").with_format("arrow")


def _changed(file: TextFile, got: str) -> DataError:
    return DataError.of(
        file.path,
        got=got,
        expected=f"the {file.lines} lines that were there when the stage began",
        hint="start again, and leave the text alone while a run prepares it",
    )
