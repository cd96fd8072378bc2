"""A dataset of the Hugging Face hub, or a local folder laid out like one, as text.

Enters: a `HubCorpus`. Leaves: `HubSources`: each row a document, as `datasets.load_dataset` gives
them, at the commit that was found first. Beside what the hub refuses, a column that is not there
or holds no text is an error before anything is made; a row without text, when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from babyllama_ds.corpus.cleaning import CLEANING_VERSION, clean
from babyllama_ds.corpus.rows import BATCH_ROWS, check_type, check_utf8, no_such_column, text_of
from babyllama_ds.corpus.streams import (
    Split,
    Texts,
    document,
    num_documents,
    part_of_documents,
    train_lines,
    without_empty_documents,
)
from babyllama_ds.errors import DataError, UserError
from babyllama_ds.files import hash_json, sha256_file
from babyllama_ds.spec.corpus import HeldOutSplit, HubCorpus
from babyllama_ds.spec.explain import did_you_mean

MOST_DOMAINS = 100
"""Values of a domain column; more say that it is something else."""


@dataclass(frozen=True, kw_only=True)
class HubSources:
    """Splits of a dataset at one commit, and what is done to their rows."""

    spec: HubCorpus
    key: str
    """The corpus's place in the job."""
    commit: str | None
    """What is loaded; none: a local folder, which has no commits."""
    identity: tuple[tuple[str, str], ...]
    """What identifies the rows of each split: the commit, or the SHA-256 of its files."""

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the cleaned text of both splits."""
        spec = self.spec
        return hash_json(
            {
                "hub": self.identity,
                "split": spec.split.model_dump(mode="json"),
                "columns": [spec.column, spec.domain_column],
                "domain": self._domain(),
                "cleaning": [spec.cleaning, CLEANING_VERSION],
            }
        )

    def texts(self, split: Split) -> Texts:
        """See `sources.iter_text`; rows of one domain are one text."""
        for domain in self._domains_of(self._name_of(split)):
            yield domain if domain is not None else self._domain(), self._part(domain, split)

    def domains(self) -> set[str] | None:
        """One, or those of the domain column, which are known when all is read."""
        return {self._domain()} if self.spec.domain_column is None else None

    def contents(self) -> dict[str, str]:
        """What identifies each split."""
        return {identity: f"{self.spec.path} ({split})" for split, identity in self.identity}

    def size(self) -> str:
        """What there is; rows are not counted before they are read."""
        return f"{self.spec.path} of the hub" if self.commit else f"the dataset in {self.spec.path}"

    def _domain(self) -> str:
        return self.spec.name or Path(self.spec.path).name

    def _name_of(self, split: Split) -> str:
        held_out = self.spec.split
        if split == "dev" and isinstance(held_out, HeldOutSplit):
            return held_out.dev
        return self.spec.train

    def _domains_of(self, name: str) -> tuple[str | None, ...]:
        return (None,) if self.spec.domain_column is None else _domain_values(self, name)

    def _part(self, domain: str | None, split: Split) -> Iterator[str]:
        documents = _documents(self, self._name_of(split), domain)
        if isinstance(self.spec.split, HeldOutSplit):
            return documents
        total = _num_documents(self, self._name_of(split), domain)
        return part_of_documents(documents, train_lines(total, self.spec.split.fraction), split)


def read_hub(
    spec: HubCorpus, *, key: str = "corpus", check: Callable[[], None] | None = None
) -> HubSources:
    """Open the dataset: its commit, its splits, its columns; a first row with text in each split.

    `check` is called between batches of rows and may raise to stop. Raises `DataError`: no such
    dataset, configuration, revision, split or column; no access; no network; no text; a revision
    of a folder.
    """
    if _is_folder(spec) and spec.revision is not None:
        raise DataError.of(
            f"{key}.revision",
            got=f"{spec.revision} for {spec.path}, a folder that is here",
            expected="no revision: only what is on the hub has commits",
        )
    builder = _builder(spec, key)
    held_out = [spec.split.dev] if isinstance(spec.split, HeldOutSplit) else []
    names = {f"{key}.train": spec.train} | {f"{key}.split.dev": name for name in held_out}
    files = builder.config.data_files or {}
    for where, name in names.items():
        if files and name not in files:
            raise DataError.of(
                where,
                got=f"{name!r}, no split of {spec.path} (there are: {', '.join(map(str, files))})",
                expected="the name of a split",
                hint=did_you_mean(name, map(str, files)),
            )
    commit = None if _is_folder(spec) else str(builder.hash)
    sources = HubSources(
        spec=spec,
        key=key,
        commit=commit,
        identity=tuple((name, _identity(spec, commit, name, files)) for name in names.values()),
    )
    for where, name in names.items():
        _check_columns(sources, name, where)
        if not _has_text(sources, name, check):
            got = f"no text in column {spec.column!r} of split {name!r} of {spec.path}"
            raise DataError.of(where, got=got, expected="some text")
    return sources


def commit_of_dataset(spec: HubCorpus, *, key: str) -> str | None:
    """The commit at which the dataset is read as things are now; none of a local folder.

    Raises `DataError` as `read_hub`: no such dataset, configuration or revision; no access or
    network.
    """
    if _is_folder(spec):
        return None
    if _is_commit(spec.revision):
        return spec.revision
    commit = str(_builder(spec, key).hash)
    return commit if _is_commit(commit) else None


def _builder(spec: HubCorpus, key: str) -> Any:
    with _told(spec, key):
        from datasets import load_dataset_builder

        return load_dataset_builder(spec.path, name=spec.name, revision=spec.revision)


def _is_folder(spec: HubCorpus) -> bool:
    return Path(spec.path).is_dir()


def _identity(spec: HubCorpus, commit: str | None, split: str, files: Any) -> str:
    if commit is None:
        hashes = [sha256_file(Path(file)) for file in files.get(split, ())]
        return hashes[0] if len(hashes) == 1 else hash_json(hashes)
    return f"{spec.path}@{commit}/{spec.name or ''}/{split}"


# -- rows ----------------------------------------------------------------------------------------


def _documents(sources: HubSources, split: str, domain: str | None) -> Iterator[str]:
    spec = sources.spec
    lines = (line for text in _rows(sources, split, domain) for line in document(text))
    name = domain if domain is not None else sources._domain()
    return without_empty_documents(clean(name, lines, spec.cleaning))


@cache
def _num_documents(sources: HubSources, split: str, domain: str | None) -> int:
    # A pass over the split; what identifies it is part of the key.
    return num_documents(_documents(sources, split, domain))


def _rows(sources: HubSources, split: str, domain: str | None = None) -> Iterator[str]:
    """The text of each row, or of those whose domain column holds `domain`."""
    column, domain_column = sources.spec.column, sources.spec.domain_column
    number = 0
    for table in _tables(sources, split, [column, *([domain_column] if domain_column else [])]):
        texts = table[column].to_pylist()
        kept = pc.equal(table[domain_column], domain).to_pylist() if domain_column else None
        for place, text in enumerate(texts):
            if kept is None or kept[place]:
                yield text_of(text, column, f"{_place(sources, split)}, row {number + place + 1}")
        number += len(texts)


@cache
def _domain_values(sources: HubSources, split: str) -> tuple[str, ...]:
    """The values of the domain column, in the order in which they first appear."""
    column = sources.spec.domain_column
    assert column is not None
    found: dict[str, None] = {}
    for number, table in enumerate(_tables(sources, split, [column])):
        for value in pc.unique(table[column]).to_pylist():
            where = f"{_place(sources, split)}, rows from {number * BATCH_ROWS + 1}"
            found[text_of(value, column, where)] = None
        if len(found) > MOST_DOMAINS:
            raise DataError.of(
                f"{sources.key}.domain_column",
                got=f"{column!r}, a column with more than {MOST_DOMAINS} values",
                expected="a column that names a few domains",
            )
    return tuple(found)


def _tables(sources: HubSources, split: str, columns: list[str]) -> Iterator[pa.Table]:
    with _told(sources.spec, sources.key):
        stream = _load(sources, split).select_columns(columns).with_format("arrow")
        for number, table in enumerate(stream.iter(batch_size=BATCH_ROWS)):
            check_utf8(table, f"{_place(sources, split)}, rows from {number * BATCH_ROWS + 1}")
            yield table


def _load(sources: HubSources, split: str) -> Any:
    from datasets import load_dataset

    spec = sources.spec
    # Of a folder that changed, the library's cache may give what was there before.
    is_folder = sources.commit is None
    return load_dataset(
        spec.path,
        name=spec.name,
        split=split,
        revision=sources.commit if _is_commit(sources.commit) else spec.revision,
        streaming=spec.streaming or is_folder,
    )


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _check_columns(sources: HubSources, split: str, where: str) -> None:
    spec, key = sources.spec, sources.key
    with _told(spec, key):
        table = next(_load(sources, split).with_format("arrow").iter(batch_size=1), None)
    if table is None:
        got = f"split {split!r} of {spec.path}, which has no rows"
        raise DataError.of(where, got=got, expected="some text")
    for name, column in (("column", spec.column), ("domain_column", spec.domain_column)):
        if column is None:
            continue
        if column not in table.column_names:
            raise no_such_column(f"{key}.{name}", column, table.column_names, f"{key}.{name}")
        check_type(table.schema.field(column).type, column, f"{key}.{name}")


def _has_text(sources: HubSources, split: str, check: Callable[[], None] | None) -> bool:
    for table in _tables(sources, split, [sources.spec.column]):
        if check is not None:
            check()
        if any(text and text.strip() for text in table[sources.spec.column].to_pylist()):
            return True
    return False


def _place(sources: HubSources, split: str) -> str:
    return f"{sources.spec.path} ({split})"


# -- what the hub says ---------------------------------------------------------------------------


@contextmanager
def _told(spec: HubCorpus, key: str) -> Iterator[None]:
    """Whatever the library raises, worded for the person who wrote the job."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries below raise their own, httpx's and Arrow's
        raise _refused(spec, key, error) from error


def _refused(spec: HubCorpus, key: str, error: Exception) -> DataError:
    from datasets.exceptions import DatasetNotFoundError

    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, StopIteration):  # of the library's reader, in which JSON is looked at
        said = "one of its files has no rows"
    where, expected, hint = f"{key}.path", "a dataset that can be loaded", None
    if isinstance(error, DatasetNotFoundError) and "gated" in said:
        expected = "a dataset that you may read"
        hint = "accept its terms on its page, then `hf auth login`, or set HF_TOKEN"
    elif isinstance(error, DatasetNotFoundError) and "Revision" in said:
        where, expected = f"{key}.revision", "a commit, a tag or a branch of the dataset"
    elif isinstance(error, DatasetNotFoundError):
        expected = "the id of a dataset (owner/name), or a local folder"
        hint = "check its spelling; a private one needs `hf auth login`, or HF_TOKEN"
    elif isinstance(error, ConnectionError | TimeoutError):
        expected = "a way to the hub, or a dataset that is in its cache"
        hint = (
            f"where there is a network: hf download --repo-type dataset {spec.path} --local-dir "
            "FOLDER; then give FOLDER as `path`"
        )
    elif isinstance(error, ValueError) and "onfig" in said:
        where, expected = f"{key}.name", "the name of one of its configurations"
    return DataError.of(where, got=f"{spec.path}: {_cut(said)}", expected=expected, hint=hint)


def _cut(text: str) -> str:
    return text if len(text) <= 300 else text[:299] + "…"
