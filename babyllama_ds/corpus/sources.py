"""The text of a corpus, found, checked once, then streamed as often as it is needed.

Enters: a `FilesCorpus`, `HubCorpus` or `MixCorpus`. Leaves: `Sources` and, from `iter_text`, the
cleaned lines of a split, text by text, in bounded memory. `tokenizer` and `writing` read them.

    finding → checking (lines, rows) → cleaning    files, here
    hub                                            a dataset of the Hugging Face hub
    mixing                                         several of these, so much of each
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from babyllama_ds.corpus.checking import DAMAGED, TextFile, read_file
from babyllama_ds.corpus.cleaning import CLEANING_VERSION, Cleaning, clean
from babyllama_ds.corpus.documents import Documents, after_lines, mark_documents
from babyllama_ds.corpus.finding import find_files, split_key
from babyllama_ds.corpus.hub import read_hub
from babyllama_ds.corpus.lines import stream_lines
from babyllama_ds.corpus.mixing import mix
from babyllama_ds.corpus.published import RULES as PUBLISHED_RULES
from babyllama_ds.corpus.published import clean_as_published
from babyllama_ds.corpus.rows import read_rows
from babyllama_ds.corpus.streams import (
    Sources,
    Split,
    Texts,
    document,
    first_lines,
    num_documents,
    part_of_documents,
    train_lines,
    without_empty_documents,
)
from babyllama_ds.errors import DataError, Problem
from babyllama_ds.files import hash_json
from babyllama_ds.spec.corpus import FilesCorpus, HeldOutFiles, HubCorpus, MixCorpus, TextSpec

log = logging.getLogger(__name__)

Check = Callable[[], None]


def read_sources(spec: TextSpec, *, check: Check | None = None, key: str = "corpus") -> Sources:
    """Find the text of `spec` and check it: files are read once, hub datasets opened.

    `check` is called now and then and may raise to stop; `key` is the corpus's place in the job.
    Raises `DataError`: text that is not there, cannot be read or is none; text in two places.
    """
    if isinstance(spec, HubCorpus):
        return read_hub(spec, key=key, check=check)
    if isinstance(spec, MixCorpus):
        parts = [
            read_sources(source.corpus, check=check, key=f"{key}.sources[{number}].corpus")
            for number, source in enumerate(spec.sources)
        ]
        return mix(spec, parts, key=key, check=check)
    return read_files(spec, check=check, key=key)


def iter_text(sources: Sources, split: Split) -> Texts:
    """(domain, cleaned lines) of each text that has a part in `split`, in order.

    Every line ends with a line break, but maybe the last of a text whose cleaning is `published`;
    an empty string marks the end of a document. A text is opened when its first line is asked for,
    and at most a few megabytes of it are in memory. Raises `DataError` for a file that has changed
    since `read_sources`.
    """
    return sources.texts(split)


# -- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FileSources:
    """The files of a corpus, in the order in which they are read, and what is done to them."""

    files: tuple[TextFile, ...]
    cleaning: Cleaning
    tail: float | None
    """Share of each file's cleaned lines that is held out; none: dev files are given."""
    documents: Documents = "none"
    """Which marks of their ends stand among the lines; the text is the same with and without."""

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the cleaned text of both splits; paths do not."""
        files = [[file.domain, file.split, file.sha256, *file.read_as()] for file in self.files]
        cleaning = [self.cleaning, CLEANING_VERSION]
        return hash_json({"files": files, "cleaning": cleaning, "tail": self.tail})

    def texts(self, split: Split) -> Texts:
        """See `iter_text`."""
        for file in self.files:
            if self.tail is not None:
                yield file.domain, _part(file, self, self.tail, split)
            elif file.split == split:
                yield file.domain, _cleaned(file, self.cleaning, self.documents)

    def domains(self) -> set[str]:
        """The files' names without their suffixes."""
        return {file.domain for file in self.files}

    def contents(self) -> dict[str, str]:
        """SHA-256 and path of each file with text: of its text, and of its bytes, by which a folder
        of the hub's layout knows its files."""
        with_text = [file for file in self.files if file.has_text]
        return {
            digest: str(file.path)
            for file in with_text
            for digest in (file.text_sha256, file.sha256)
        }

    def size(self) -> str:
        """Megabytes."""
        return f"{sum(file.bytes for file in self.files) / 1e6:.1f} MB"


def read_files(spec: FilesCorpus, *, check: Check | None = None, key: str) -> FileSources:
    """Find the files of `spec` and read each once: its hash, its lines, whether it is text.

    Warns of files without text among others.

    Raises `DataError` with all problems of a kind at once: a pattern that matches nothing or what
    is not a text file; a file that cannot be read or is not UTF-8; the same text in train and dev;
    a split without any text; a table that rules for whole files are to clean.
    """
    held_out = spec.split.dev if isinstance(spec.split, HeldOutFiles) else ()
    found = find_files(spec.train, held_out, key=key)
    files: list[TextFile] = []
    problems: list[Problem] = []
    for split, path in found:
        try:
            files.append(read_file(path, split, spec.column, check))
        except DataError as error:
            problems += error.problems
    problems = problems or [
        *_shared_text(files, key),
        *_empty_splits(files, key),
        *(_tables_as_published(files, key) if spec.cleaning == "published" else []),
        *_other_documents(files, spec.documents, key),
    ]
    if problems:
        raise DataError.all_of(problems)
    if blank := [file.path for file in files if not file.has_text]:
        told = "%s: %d of %d files without text, the first %s"
        log.warning(told, key, len(blank), len(files), blank[0])
    tail = None if isinstance(spec.split, HeldOutFiles) else spec.split.fraction
    return FileSources(
        files=tuple(files), cleaning=spec.cleaning, tail=tail, documents=spec.documents
    )


def read_texts(paths: Sequence[Path], *, cleaning: Cleaning, where: str) -> FileSources:
    """Files that nothing is trained on, each a domain of development text, read once.

    `where` is what named them. Raises `DataError` with all problems of a kind at once: a file that
    cannot be read, is not UTF-8 or holds no text; two files that would be one domain.
    """
    files: list[TextFile] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            files.append(read_file(path.expanduser(), "dev", "text", None))
        except DataError as error:
            problems += error.problems
    problems = problems or _without_text(files, where) or _one_domain(files, where)
    if problems:
        raise DataError.all_of(problems)
    return FileSources(files=tuple(files), cleaning=cleaning, tail=None)


def _shared_text(files: list[TextFile], key: str) -> list[Problem]:
    """Held-out files that are copies of training files under another name."""
    trained = {file.text_sha256: file for file in files if file.split == "train"}
    return [
        Problem(
            where=split_key(key, "dev"),
            got=f"{file.path}, which has the same content as {trained[file.text_sha256].path}",
            expected="development text that no model is trained on",
        )
        for file in files
        if file.split == "dev" and file.has_text and file.text_sha256 in trained
    ]


def _empty_splits(files: list[TextFile], key: str) -> list[Problem]:
    problems = []
    for split in dict.fromkeys(file.split for file in files):
        mine = [file for file in files if file.split == split]
        if not any(file.has_text for file in mine):
            got = f"{len(mine)} file(s) without any text, the first {mine[0].path}"
            problems.append(Problem(where=split_key(key, split), got=got, expected="some text"))
    return problems


def _tables_as_published(files: list[TextFile], key: str) -> list[Problem]:
    """The published rules erase where documents end, and the rows of a table are documents."""
    return [
        Problem(
            where=f"{key}.cleaning",
            got=f"'published' for {file.path}, a table of documents",
            expected="text files: the published rules clean a file as one text",
            hint="cleaning: babylm has the same rules, document by document",
        )
        for file in files
        if file.form != "text" and file.domain in PUBLISHED_RULES
    ]


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


def _other_documents(files: list[TextFile], documents: Documents, key: str) -> list[Problem]:
    """The rows of a table are its documents; a text has no rows."""
    if documents == "none":
        return []
    wrong = [file for file in files if (file.form == "text") == (documents == "rows")]
    return [
        Problem(
            where=f"{key}.documents",
            got=f"{documents!r} for {file.path}, a {'text' if file.form == 'text' else 'table'}",
            expected="rows for tables; blank_lines, lines or files for text",
            hint="one corpus has one kind of documents; `kind: mix` puts several together",
        )
        for file in wrong
    ]


# -- streaming a file ----------------------------------------------------------------------------


def _part(file: TextFile, sources: FileSources, tail: float, split: Split) -> Iterator[str]:
    # BabyLlama-2 splits cleaned files, so the lines are counted after cleaning. It counts with
    # str.splitlines, which differs only where a text holds form feeds, U+2028 and the like.
    cut = train_lines(_num_cleaned(file, sources.cleaning), tail)
    lines = _cleaned(file, sources.cleaning, sources.documents)
    if file.form != "text":
        yield from part_of_documents(lines, cut, split)
    elif sources.documents in ("none", "files"):  # no marks: the same, much faster
        yield from islice(lines, cut) if split == "train" else islice(lines, cut, None)
    else:
        yield from first_lines(lines, cut) if split == "train" else after_lines(lines, cut)


@cache
def _num_cleaned(file: TextFile, cleaning: Cleaning) -> int:
    """Lines that cleaning leaves; of a table its documents."""
    # A pass over the file; its content is part of the key.
    lines = _cleaned(file, cleaning, "none")
    return sum(1 for _ in lines) if file.form == "text" else num_documents(lines)


def _cleaned(file: TextFile, cleaning: Cleaning, documents: Documents) -> Iterator[str]:
    if file.form != "text":
        rows = (line for text in _read(file) for line in document(text))
        return without_empty_documents(
            clean(file.domain, rows, "none" if cleaning == "none" else "babylm")
        )
    if cleaning == "published":
        return clean_as_published(file.domain, _read(file), file.path)
    return clean(file.domain, mark_documents(_read(file), documents), cleaning)


def _read(file: TextFile) -> Iterator[str]:
    """The lines of a file, each with its line break if it has one; of a table its texts."""
    num_read = 0
    batches = (
        stream_lines(file.path)
        if file.column is None
        else ([text] for text in read_rows(file.path, file.column))
    )
    try:
        for batch in batches:
            num_read += len(batch)
            yield from batch
            del batch  # before the next one is made: twice the memory costs time
        changed = file.path.stat().st_mtime_ns != file.modified_ns
    except (OSError, UnicodeDecodeError, *DAMAGED) as error:
        raise _changed(file, f"a file that fails to be read ({error})") from error
    if num_read != file.lines:
        raise _changed(file, f"{num_read} lines")
    if changed:
        raise _changed(file, "a file that was written to since")


def _changed(file: TextFile, got: str) -> DataError:
    what = "lines" if file.form == "text" else "rows"
    return DataError.of(
        file.path,
        got=got,
        expected=f"the {file.lines} {what} that were there when the stage began",
        hint="start again, and leave the text alone while a run prepares it",
    )
