"""The encoding of a corpus, killed in the middle and begun again: the same shards always."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from babyllama_ds.corpus import blocks, writing
from babyllama_ds.corpus.prepare import CorpusEntries, prepare_corpus
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.spec.loading import load_job
from babyllama_ds.store import Store

SMALL = {"BLOCK_CHARS": 150, "BATCH_BLOCKS": 2, "SHARD_BLOCKS": 4}
# Every batch takes its time, so that a kill comes in the middle.
PREPARE = f"""
import sys, time
from pathlib import Path

from babyllama_ds.corpus import blocks, writing
from babyllama_ds.corpus.prepare import prepare_corpus
from babyllama_ds.spec.loading import load_job
from babyllama_ds.store import Store

for module in (blocks, writing):
    vars(module).update({SMALL})
prepare_corpus(load_job(Path(sys.argv[1])), Store(Path(sys.argv[2])), lambda: time.sleep(0.1))
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "babyllama_ds")
    for name, value in SMALL.items():
        monkeypatch.setattr(blocks if name == "BLOCK_CHARS" else writing, name, value)


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


@pytest.fixture
def killed_mix(tmp_path: Path, tiny_job: Callable[..., Path], start: Callable[..., Any]) -> Path:
    """The same of a mix of compressed JSON lines and compressed text."""
    job = tiny_job(tmp_path)
    lines = (tmp_path / "town.train").read_text().splitlines()
    rows = [json.dumps({"text": "\n".join(lines[i : i + 3])}) for i in range(0, len(lines), 3)]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (tmp_path / "town.txt.xz").write_bytes(lzma.compress((tmp_path / "town.dev").read_bytes()))
    held_out = {"kind": "tail", "fraction": 0.2}
    sources = [
        {"name": name, "corpus": {"kind": "files", "train": [str(path)], "split": held_out}}
        for name, path in (("rows", tmp_path / "rows.jsonl.gz"), ("town", tmp_path / "town.txt.xz"))
    ]
    corpus = {"kind": "mix", "sources": [{**each, "weight": 1.0} for each in sources]}
    corpus["sources"][1]["repeat"] = True  # type: ignore[index]
    job.write_text(yaml.safe_dump({**yaml.safe_load(job.read_text()), "corpus": corpus}))
    running = start([[sys.executable, "-c", PREPARE, job, tmp_path / "store"]])
    running.wait_until(
        lambda: any(
            len(list(place.glob("train-*.json"))) >= 3 for place in building(tmp_path / "store")
        ),
        "three shards",
    )
    running.signal_all(signal.SIGKILL)
    assert running.end().code == -signal.SIGKILL
    return job


def test_a_mix_of_compressed_tables_and_text_goes_on_as_well(
    killed_mix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place,) = building(tmp_path / "store")
    times = {path.name: path.stat().st_mtime_ns for path in place.glob("train-*.json")}
    entries = prepare(killed_mix, tmp_path / "store")
    undisturbed = prepare(killed_mix, tmp_path / "another store")
    assert content(entries.tokens_dir) == content(undisturbed.tokens_dir)
    for name, time_ns in times.items():
        assert (entries.tokens_dir / name).stat().st_mtime_ns == time_ns, "made anew"
    assert re.search(r"going on with what is there, \d+ shards", caplog.text)
    spans = TokenShards.open(entries.tokens_dir).domains("train")
    assert {span.domain for span in spans} == {"rows", "town"}
    assert len(spans) > 2, "the town repeats"
