"""Two nodes whose copies differ are told before anything is trained on them.

A node is a working folder: the same relative path is another file there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import files
from babyllama_ds.corpus.prepare import CorpusEntries
from babyllama_ds.errors import DataError, RunError
from babyllama_ds.pipeline.equal import check_same_benchmarks, check_same_corpus
from babyllama_ds.storages import Storages

ENTRIES = CorpusEntries(
    tokenizer_dir=Path("store/tokenizer"),
    tokenizer_key="t",
    tokens_dir=Path("store/tokens"),
    tokens_key="k",
    pairs_dir=Path("store/nursery/pairs"),
)
MADE = ("store/tokenizer", "store/tokens", "store/nursery")


class TwoNodes(Storages):
    """Both nodes' leads in this process, one after the other."""

    def on_each(self, work: Callable[[], Any]) -> list[Any]:
        found = []
        for node in ("one", "two"):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(node)
                found.append(work())
        return found


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storages:
    """Two nodes that made the same."""
    monkeypatch.chdir(tmp_path)
    for node in ("one", "two"):
        for directory in MADE:
            make(Path(node, directory), "the same")
    return TwoNodes(leads=(0, 1), hosts=("a", "b"))


def make(directory: Path, content: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "file.bin").write_text(content, encoding="utf-8")
    files.write_manifest(directory, fingerprint="key")


def test_the_same_on_both_passes(nodes: Storages) -> None:
    check_same_corpus(nodes, [ENTRIES, ENTRIES])
    check_same_corpus(nodes, [replace(ENTRIES, pairs_dir=None)] * 2)  # of another kind of text
    check_same_benchmarks(nodes, ["f", "f"])


@pytest.mark.parametrize("key", ["tokenizer_key", "tokens_key"])
def test_another_text_or_tokenizer_is_told(key: str, nodes: Storages) -> None:
    changes: Any = {key: "another"}
    with pytest.raises(DataError, match="node 1, host b: corpus: got another text or tokenizer"):
        check_same_corpus(nodes, [ENTRIES, replace(ENTRIES, **changes)])


@pytest.mark.parametrize("directory", MADE)
def test_what_was_made_otherwise_is_named_with_its_file(directory: str, nodes: Storages) -> None:
    make(Path("two", directory), "another")
    with pytest.raises(RunError, match=f"node 1, host b: {directory}/file.bin: got "):
        check_same_corpus(nodes, [ENTRIES, ENTRIES])


def test_other_benchmarks_are_told() -> None:
    nodes = Storages(leads=(0, 1, 2), hosts=("a", "b", "c"))
    with pytest.raises(DataError, match="node 2, host c: evaluation: got other minimal pairs"):
        check_same_benchmarks(nodes, ["f", "f", "g"])


def test_one_storage_is_not_looked_at() -> None:
    check_same_corpus(Storages(), [ENTRIES])
