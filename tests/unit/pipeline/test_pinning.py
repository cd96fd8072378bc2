"""What a job names by a hub id is read at one commit by every start of a run: here datasets; models
and tokenizers in `integration/test_hub_models`.

The library's own code reads a local folder; a stand-in for the hub says which commit that is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from babyllama_ds.corpus.sources import read_sources
from babyllama_ds.errors import DataError
from babyllama_ds.pipeline.pinning import pin_to_commits
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.storages import Storages

TALES = "{kind: hub, path: nobody/tales, split: {kind: tail, fraction: 0.5}}"
MIX = (
    f"{{kind: mix, sources: [{{name: a, words: 3, corpus: {TALES}}}, {{name: b, words: 3, "
    "corpus: {kind: hub, path: PATH, split: {kind: tail, fraction: 0.5}}}]}"
)
FIRST, SECOND = "a" * 40, "b" * 40


class Hub:
    """Its main branch, which moves, a tag, and what was asked of it."""

    def __init__(self) -> None:
        self.main = FIRST
        self.tags = {"v1": SECOND}
        self.asked: list[str | None] = []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    for name in ("tales", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            "".join(f'{{"text": "a tale of {name} {number}"}}\n' for number in range(6))
        )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    real_find, real_load = datasets.load_dataset_builder, datasets.load_dataset
    hub = Hub()

    def folder(path: str) -> str:
        return str(tmp_path / "tales") if path == "nobody/tales" else path

    def find(path: str, *, revision: str | None, **given: Any) -> Any:
        builder = real_find(folder(path), **given)
        if path == "nobody/tales":
            hub.asked.append(revision)
            builder.hash = hub.main if revision is None else hub.tags.get(revision, revision)
        return builder

    def load(path: str, *, revision: str | None, **given: Any) -> Any:
        return real_load(folder(path), **given)

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return hub


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., JobSpec]:
    """A start of a run: the job with its commits."""

    def pinned(corpus: str, *, run: str = "run", storages: Storages | None = None) -> JobSpec:
        job = load_job(
            find_job("nursery"), [f"corpus={corpus}".replace("PATH", f"{tmp_path}/here")]
        )
        directory = RunDirectory(tmp_path / run)
        directory.open(job)
        return pin_to_commits(job, directory, storages or Storages())

    return pinned


@pytest.mark.parametrize("corpus", [TALES, MIX])
def test_a_run_goes_on_with_the_text_it_began_with(
    corpus: str, hub: Hub, start: Callable[..., JobSpec]
) -> None:
    """Its fingerprint is part of the tokens' and the models': another one would be refused."""

    def text(run: str = "run") -> str:
        spec: Any = start(corpus, run=run).corpus
        return read_sources(spec).fingerprint()

    first = text()
    hub.main, hub.asked = SECOND, []
    assert text() == first
    assert set(hub.asked) == {FIRST}, "the commit that is known"
    assert text("another") != first


def test_a_folder_has_no_commit(hub: Hub, start: Callable[..., JobSpec]) -> None:
    corpus: Any = start(MIX).corpus
    assert [source.corpus.revision for source in corpus.sources] == [FIRST, None]


def test_a_commit_that_is_named_is_the_one(hub: Hub, start: Callable[..., JobSpec]) -> None:
    named = TALES.replace("split", f"revision: {SECOND}, split")
    corpus: Any = start(named).corpus
    assert (corpus.revision, hub.asked) == (SECOND, [])


def test_what_the_hub_does_not_give_is_told_at_its_key(
    hub: Hub, start: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/tales' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(DataError, match=r"corpus\.sources\[0\]\.corpus\.path: got nobody/tales"):
        start(MIX)


def test_two_revisions_of_one_dataset_stay_two(hub: Hub, start: Callable[..., JobSpec]) -> None:
    tagged = MIX.replace("path: PATH", "path: nobody/tales, revision: v1")
    for _ in range(2):
        corpus: Any = start(tagged).corpus
        assert [source.corpus.revision for source in corpus.sources] == [FIRST, SECOND]
        hub.main = hub.tags["v1"] = "c" * 40


def test_every_node_keeps_the_commits(hub: Hub, start: Callable[..., JobSpec]) -> None:
    """The first node may be another one at the next start."""
    kept: list[str] = []

    class Nodes(Storages):
        def on_each(self, work: Callable[[], Any]) -> list[Any]:
            kept.append("on each")
            return [work()]

    nodes = Nodes(leads=(0, 1), hosts=("a", "b"))
    start(TALES, storages=nodes)
    assert kept == ["on each"]
    start(TALES, storages=nodes)
    assert kept == ["on each"], "nothing new"
