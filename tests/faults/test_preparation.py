"""The encoding of a corpus, killed in the middle and begun again: the same shards always."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.corpus import shards
from babyllama_ds.corpus.prepare import CorpusEntries, prepare_corpus
from babyllama_ds.spec.loading import load_job
from babyllama_ds.store import Store

SMALL = {"BLOCK_CHARS": 150, "BATCH_BLOCKS": 2, "SHARD_BLOCKS": 4}
# Every batch takes its time, so that a kill comes in the middle.
PREPARE = f"""
import sys, time
from pathlib import Path

from babyllama_ds.corpus import shards
from babyllama_ds.corpus.prepare import prepare_corpus
from babyllama_ds.spec.loading import load_job
from babyllama_ds.store import Store

vars(shards).update({SMALL})
prepare_corpus(load_job(Path(sys.argv[1])), Store(Path(sys.argv[2])), lambda: time.sleep(0.1))
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "babyllama_ds")
    for name, value in SMALL.items():
        monkeypatch.setattr(shards, name, value)


def prepare(job: Path, root: Path) -> CorpusEntries:
    return prepare_corpus(load_job(job), Store(root), lambda: None)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def building(root: Path) -> list[Path]:
    return list((root / "tokens").glob(".building-*"))


@pytest.fixture
def killed(tmp_path: Path, tiny_job: Callable[..., Path], start: Callable[..., Any]) -> Path:
    """A job whose preparation was killed; the store is beside it."""
    job, root = tiny_job(tmp_path), tmp_path / "store"
    running = start([[sys.executable, "-c", PREPARE, job, root]])
    running.wait_until(
        lambda: any(len(list(place.glob("train-*.json"))) >= 3 for place in building(root)),
        "three shards",
    )
    running.signal_all(signal.SIGKILL)
    assert running.end().code == -signal.SIGKILL
    return job


def test_it_goes_on_and_ends_with_the_shards_of_an_undisturbed_one(
    killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "store"
    (place,) = building(root)
    finished = {name: data for name, data in content(place).items() if name.startswith("train-")}
    times = {path.name: path.stat().st_mtime_ns for path in place.glob("train-*.json")}
    entries = prepare(killed, root)
    undisturbed = prepare(killed, tmp_path / "another store")
    assert content(entries.tokens_dir) == content(undisturbed.tokens_dir)
    assert finished.items() < content(entries.tokens_dir).items()
    for name, time_ns in times.items():
        assert (entries.tokens_dir / name).stat().st_mtime_ns == time_ns, "made anew"
    assert building(root) == []
    assert re.search(r"going on with what is there, \d+ shards", caplog.text)


def test_a_shard_damaged_meanwhile_is_told_and_made_anew(
    killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place,) = building(tmp_path / "store")
    path = place / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    entries = prepare(killed, tmp_path / "store")
    assert (
        f"{path} is damaged (its checksum does not hold): its text is encoded anew" in caplog.text
    )
    undisturbed = prepare(killed, tmp_path / "another store")
    assert content(entries.tokens_dir) == content(undisturbed.tokens_dir)


def test_text_changed_meanwhile_is_another_corpus(
    killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "store"
    (begun,) = building(root)
    before = content(begun)
    text = tmp_path / "town.train"
    text.write_text(text.read_text() + "one line more\n")
    entries = prepare(killed, root)
    undisturbed = prepare(killed, tmp_path / "another store")
    assert content(entries.tokens_dir) == content(undisturbed.tokens_dir)
    assert "going on" not in caplog.text
    assert content(begun) == before
