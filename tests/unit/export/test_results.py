"""The results of a run for the record: few files, done or not, and no weights."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from babyllama_ds import cli
from babyllama_ds.errors import RunError
from babyllama_ds.export.results import collect_results
from babyllama_ds.files import write_json
from babyllama_ds.store import STORE_LOST

NAMES = {"report.json", "report.md", "report.html", "job.yaml", "metrics.jsonl.gz"}


def test_what_is_there(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "results"
    collect_results(run_dir, target)
    assert {path.name for path in target.iterdir()} == NAMES
    report = json.loads((target / "report.json").read_text())
    assert report["name"] == "nursery-1"
    assert report["unfinished"] is None
    assert (target / "job.yaml").read_bytes() == (run_dir / "job.yaml").read_bytes()
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    assert gzip.decompress((target / "metrics.jsonl.gz").read_bytes()) == metrics


def test_the_same_bytes_each_time(run_dir: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        collect_results(run_dir, tmp_path / name)
    for name in NAMES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    packed = (tmp_path / "one" / "metrics.jsonl.gz").read_bytes()
    assert packed[4:8] == bytes(4)  # RFC 1952's time of the file: not now


def test_nothing_is_written_into_the_run(run_dir: Path, tmp_path: Path) -> None:
    """It may be another's, on a disk that is read-only here."""

    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    shutil.rmtree(run_dir / "report")
    before = everything()
    collect_results(run_dir, tmp_path / "results")
    assert everything() == before


def test_of_a_run_without_its_store(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the report cannot say any more, and why: not as if it had never been made."""
    (run_dir.parent / "store").rename(run_dir.parent / "elsewhere")
    collect_results(run_dir, tmp_path / "results")
    missing = json.loads((tmp_path / "results" / "report.json").read_text())["unfinished"][
        "missing"
    ]
    lost = "a link to {}, which is not there: " + STORE_LOST
    assert missing == [
        f"teacher gpt2 ({lost.format('../../store/teachers/gpt2')})",
        f"teacher llama ({lost.format('../../store/teachers/llama')})",
        f"what its text comes to ({lost.format('../store/tokens/k1')})",
    ]
    assert f"{run_dir / 'tokens'}: a link to ../store/tokens/k1" in caplog.text


def test_of_a_run_that_was_stopped(run_dir: Path, tmp_path: Path) -> None:
    """Before its first logged step, too."""
    write_json(run_dir / "state.json", {"status": "stopped", "reason": "SIGTERM", "at": "step 3"})
    (run_dir / "metrics.jsonl").unlink()
    assert cli.main(["export", str(run_dir), "--results", str(tmp_path / "results")]) == 0
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    assert report["unfinished"]["why"] == "SIGTERM, step 3"
    assert not (tmp_path / "results" / "metrics.jsonl.gz").exists()


def test_beside_other_places(run_dir: Path, tmp_path: Path) -> None:
    words = ["--results", str(tmp_path / "results"), "--to", str(tmp_path / "model")]
    assert cli.main(["export", str(run_dir), *words]) == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_what_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="got no such directory, expected the directory of a run"):
        collect_results(tmp_path / "nothing", tmp_path / "results")
    with pytest.raises(RunError, match=r"got no job\.yaml"):
        collect_results(tmp_path, tmp_path / "results")
    with pytest.raises(RunError, match="got a place inside the run"):
        collect_results(run_dir, run_dir / "results")
    collect_results(run_dir, tmp_path / "results")
    with pytest.raises(RunError, match="nothing is written over"):
        collect_results(run_dir, tmp_path / "results")
