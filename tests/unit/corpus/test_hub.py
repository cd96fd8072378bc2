"""Hub datasets: rows as they are, by split, column and domain; and what the hub refuses.

The library's own loading code runs on local folders laid out like datasets of the hub. What only
the hub itself can say is raised in its place, with the words that `datasets` uses.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from babyllama_ds.corpus import hub as module
from babyllama_ds.corpus.sources import iter_text, read_sources
from babyllama_ds.errors import DataError, Stopped
from babyllama_ds.spec.corpus import HubCorpus

ROWS = [
    {"text": f"row {i}\nsecond line", "source": ["wiki", "talk"][i % 3 == 0], "n": i}
    for i in range(20)
]
DEV = [{"text": f"dev {i}", "source": "talk", "n": i} for i in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's cache, in a folder of this test."""
    folder = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of two configurations: `main` (train and validation) and `odd`."""
    folder = tmp_path / "tales"
    write(folder / "main" / "train.parquet", ROWS)
    write(folder / "main" / "validation.parquet", DEV)
    write(folder / "odd" / "train.parquet", [{"text": "a", "n": 1}, {"text": None, "n": 2}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  default: true\n  data_files:\n"
        "  - {split: train, path: main/train.parquet}\n"
        "  - {split: validation, path: main/validation.parquet}\n"
        "- config_name: odd\n  data_files:\n  - {split: train, path: odd/train.parquet}\n"
        "---\n"
    )
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


def corpus(path: object, **keys: Any) -> HubCorpus:
    split = keys.pop("split", {"kind": "held_out"})
    return HubCorpus.model_validate({"kind": "hub", "path": str(path), "split": split, **keys})


def texts(spec: HubCorpus, split: Any) -> list[tuple[str, list[str]]]:
    return [(domain, list(lines)) for domain, lines in iter_text(read_sources(spec), split)]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    return [
        piece for row in rows for piece in [*(line + "\n" for line in row["text"].split("\n")), ""]
    ]


streamings = pytest.mark.parametrize("streaming", [False, True])


@streamings
def test_each_row_is_a_document(dataset: Path, streaming: bool) -> None:
    spec = corpus(dataset, streaming=streaming)
    assert texts(spec, "train") == [("tales", lines(ROWS))]
    assert texts(spec, "dev") == [("tales", lines(DEV))]


@streamings
def test_the_tail_is_cut_between_rows(dataset: Path, streaming: bool) -> None:
    spec = corpus(
        dataset, name="main", split={"kind": "tail", "fraction": 0.25}, streaming=streaming
    )
    assert texts(spec, "train") == [("main", lines(ROWS[:15]))]
    assert texts(spec, "dev") == [("main", lines(ROWS[15:]))]


def test_rows_are_gathered_by_their_domain(dataset: Path) -> None:
    spec = corpus(dataset, domain_column="source")
    talk = [row for row in ROWS if row["source"] == "talk"]
    wiki = [row for row in ROWS if row["source"] == "wiki"]
    assert texts(spec, "train") == [("talk", lines(talk)), ("wiki", lines(wiki))]
    assert texts(spec, "dev") == [("talk", lines(DEV))]
    spec = corpus(dataset, domain_column="source", split={"kind": "tail", "fraction": 0.5})
    (_, talk_train), (_, wiki_train) = texts(spec, "train")
    assert talk_train == lines(talk[:4])  # of 7: round(3.5) is 4
    assert wiki_train == lines(wiki[: round(len(wiki) / 2)])


def test_cleaning_goes_by_the_domain(tmp_path: Path) -> None:
    rows = [{"text": "one .\n\ntwo", "source": "simple_wiki"}, {"text": "a .", "source": "x"}]
    write(tmp_path / "set" / "train.parquet", [*rows, {"text": "\n", "source": "simple_wiki"}])
    write(tmp_path / "set" / "validation.parquet", rows)
    spec = corpus(tmp_path / "set", domain_column="source", cleaning="babylm")
    assert texts(spec, "train") == [
        ("simple_wiki", ["one .\n", "two\n", ""]),  # nothing is left of the last row
        ("x", ["a .\n", ""]),
    ]


def test_jsonl_in_hub_layout(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, rows in (("train", ROWS), ("validation", DEV)):
        (tmp_path / "set" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(corpus(tmp_path / "set"), "train") == [("set", lines(ROWS))]


# -- what identifies the text --------------------------------------------------------------------


def test_the_fingerprint_follows_content(dataset: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path = dataset, **keys: Any) -> str:
        return read_sources(corpus(path, **{"name": "main", **keys})).fingerprint()

    original = fingerprint()
    assert fingerprint(streaming=True) == original
    moved = Path(shutil.copytree(dataset, tmp_path / "moved"))
    assert fingerprint(moved) == original
    different = {
        fingerprint(split={"kind": "tail"}),
        fingerprint(column="source"),
        fingerprint(domain_column="source"),
        fingerprint(cleaning="babylm"),
        fingerprint(name=None),  # another domain
    }
    write(moved / "main" / "train.parquet", [*ROWS[1:], ROWS[0]])
    different.add(fingerprint(moved))
    assert len(different | {original}) == 7


def test_every_file_of_a_split_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    fingerprints = []
    for rows in (ROWS, [*ROWS[:-1], ROWS[0]], [ROWS[1], *ROWS[1:]]):
        folder = tmp_path / str(len(fingerprints)) / "set"
        write(folder / "train-00000-of-00002.parquet", rows[:4])
        write(folder / "train-00001-of-00002.parquet", rows[4:])
        write(folder / "validation.parquet", DEV)
        sources = read_sources(corpus(folder))
        assert list(next(iter_text(sources, "train"))[1]) == lines(rows)
        fingerprints.append(sources.fingerprint())
    assert len(set(fingerprints)) == 3


def test_a_folder_that_changed_is_read_anew(dataset: Path) -> None:
    """The library's cache, which knows a dataset by its name, would give the old rows."""
    before = read_sources(corpus(dataset)).fingerprint()
    write(dataset / "main" / "train.parquet", ROWS[:2])
    assert texts(corpus(dataset), "train") == [("tales", lines(ROWS[:2]))]
    assert read_sources(corpus(dataset)).fingerprint() != before


@pytest.fixture
def on_the_hub(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Let `datasets` find the folder under `nobody/tales` at a commit; what was asked for."""
    real_load, real_find = datasets.load_dataset, datasets.load_dataset_builder

    def stand_in(commit: str) -> list[Any]:
        asked: list[Any] = []

        def find(path: str, **kwargs: Any) -> Any:
            asked.append((path, kwargs["revision"]))
            builder = real_find(str(dataset), name=kwargs["name"])
            builder.hash = commit
            return builder

        def load(path: str, **kwargs: Any) -> Any:
            asked.append((path, kwargs.pop("revision")))
            return real_load(str(dataset), **kwargs)

        monkeypatch.setattr(datasets, "load_dataset_builder", find)
        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return stand_in


def test_the_commit_that_was_found_is_what_is_read_and_named(
    on_the_hub: Callable[[str], list[Any]],
) -> None:
    asked = on_the_hub("a" * 40)
    sources = read_sources(corpus("nobody/tales"))
    assert list(next(iter_text(sources, "train"))[1]) == lines(ROWS)
    assert asked[0] == ("nobody/tales", None)
    assert set(asked[1:]) == {("nobody/tales", "a" * 40)}
    on_the_hub("b" * 40)
    assert read_sources(corpus("nobody/tales")).fingerprint() != sources.fingerprint()


# -- what is refused -----------------------------------------------------------------------------


def read_all(spec: HubCorpus) -> None:
    texts(spec, "train")
    texts(spec, "dev")


def refused(spec: HubCorpus) -> tuple[str, str, str]:
    with pytest.raises(DataError) as caught:
        read_all(spec)
    (problem,) = caught.value.problems
    return problem.where, problem.got, problem.hint or ""


@streamings
def test_what_the_dataset_does_not_have(dataset: Path, streaming: bool) -> None:
    def told(**keys: Any) -> tuple[str, str, str]:
        return refused(corpus(dataset, streaming=streaming, **keys))

    where, got, hint = told(train="trian")
    assert where == "corpus.train"
    assert "no split of" in got
    assert "there are: train, validation" in got
    assert hint == "did you mean `train`?"
    assert told(split={"kind": "held_out", "dev": "test"})[0] == "corpus.split.dev"
    where, got, hint = told(column="txt")
    assert (where, hint) == ("corpus.column", "did you mean `text`?")
    assert got == "no column 'txt' (there are: text, source, n)"
    assert told(column="n")[:2] == ("corpus.column", "column 'n' of type int64")
    where, got, _ = told(name="mian")
    assert where == "corpus.name"
    assert "main" in got
    where, got, _ = told(name="odd", split={"kind": "tail", "fraction": 0.5})
    assert where == f"{dataset} (train), row 2"
    assert got == "nothing (null) in column 'text'"


def named_by_their_files(folder: Path, train: bytes = b'{"text": "a"}\n') -> Path:
    """A dataset without a card: its files say by their names what splits they are."""
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(train)
    (folder / "validation.jsonl").write_bytes(b'{"text": "b"}\n')
    return folder


def test_a_split_that_no_file_is_called_by(tmp_path: Path) -> None:
    folder = named_by_their_files(tmp_path / "tales")
    where, got, hint = refused(corpus(folder, train="trian"))
    assert where == "corpus.train"
    assert got == f"'trian', no split of {folder} (there are: train, validation)"
    assert hint == "did you mean `train`?"


def test_a_file_without_rows(tmp_path: Path) -> None:
    folder = named_by_their_files(tmp_path / "tales", b"")
    assert refused(corpus(folder))[:2] == (
        "corpus.path",
        f"{folder}: one of its files has no rows",
    )


def test_a_revision_of_a_folder(tmp_path: Path) -> None:
    folder = named_by_their_files(tmp_path / "tales")
    assert refused(corpus(folder, revision="v1"))[:2] == (
        "corpus.revision",
        f"v1 for {folder}, a folder that is here",
    )


@streamings
def test_text_that_is_not_utf8(dataset: Path, streaming: bool) -> None:
    bounds = pa.py_buffer(b"\0\0\0\0\3\0\0\0")
    texts = pa.Array.from_buffers(pa.string(), 1, [None, bounds, pa.py_buffer(b"h\xe4u")])
    table = pa.table({"text": texts, "source": ["wiki"], "n": [0]})
    pq.write_table(table, dataset / "main" / "train.parquet")
    where, got, _ = refused(corpus(dataset, streaming=streaming))
    assert where == f"{dataset} (train), rows from 1"
    assert got.startswith("bytes that are not UTF-8 in column 'text' (")


def test_a_domain_column_that_is_none(dataset: Path) -> None:
    assert refused(corpus(dataset, domain_column="sauce"))[0] == "corpus.domain_column"
    assert refused(corpus(dataset, domain_column="n"))[:2] == (
        "corpus.domain_column",
        "column 'n' of type int64",
    )
    rows = [{"text": "a", "id": str(i)} for i in range(module.MOST_DOMAINS + 1)]
    write(dataset / "main" / "train.parquet", rows)
    write(dataset / "main" / "validation.parquet", rows)
    where, got, _ = refused(corpus(dataset, domain_column="id"))
    assert where == "corpus.domain_column"
    assert "more than 100 values" in got


@streamings
def test_a_split_without_text(dataset: Path, streaming: bool) -> None:
    write(dataset / "main" / "validation.parquet", [{"text": " \n", "source": "x", "n": 0}] * 3)
    where, got, _ = refused(corpus(dataset, streaming=streaming))
    assert where == "corpus.split.dev"
    assert got.startswith("no text in column 'text' of split 'validation' of")


def test_check_can_stop_the_search_for_text(dataset: Path) -> None:
    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        read_sources(corpus(dataset), check=stop)


@pytest.mark.parametrize(
    ("error", "where", "hint"),
    [
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "corpus.path",
            "check its spelling; a private one needs `hf auth login`, or HF_TOKEN",
        ),
        (
            DatasetNotFoundError(
                "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access "
                "it."
            ),
            "corpus.path",
            "accept its terms on its page, then `hf auth login`, or set HF_TOKEN",
        ),
        (
            DatasetNotFoundError("Revision 'x' doesn't exist for dataset 'a/b' on the Hub."),
            "corpus.revision",
            "",
        ),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"),
            "corpus.path",
            "where there is a network: hf download --repo-type dataset a/b --local-dir FOLDER; "
            "then give FOLDER as `path`",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "corpus.path", ""),
    ],
    ids=["missing", "gated", "revision", "network", "script"],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, error: Exception, where: str, hint: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    told = refused(corpus("a/b"))
    assert told == (where, f"a/b: {error}", hint)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own answer, where it is told to stay offline."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    where, got, hint = refused(corpus("nobody/nothing-of-this-name"))
    assert where == "corpus.path"
    assert "offline" in got.lower()
    assert "hf download" in hint
