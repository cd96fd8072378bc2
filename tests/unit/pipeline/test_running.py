"""`state.json` says how a run ended, and never hides what ended it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.engine import distributed
from babyllama_ds.errors import MeetingError, RunError, Stopped, TrainingError
from babyllama_ds.pipeline.running import _state_kept, run_job
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.storages import Storages

ROOT = Path(__file__).parents[3]


def status(run_dir: Path) -> str:
    state: str = json.loads((run_dir / "state.json").read_text())["status"]
    return state


def in_the_way(path: Path) -> None:
    """What no file can take the place of."""
    path.unlink(missing_ok=True)
    path.mkdir()


def test_nodes_compare_what_their_own_deepspeed_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path means another file on each node's own disk: what it says has to be the same."""
    own = tmp_path / "own.json"
    shutil.copy(ROOT / "ds_configs" / "zero2_cpu.json", own)
    compared: list[Any] = []

    def start(_: Any, *, same: Any, **__: Any) -> None:
        compared.append(same)
        raise MeetingError.of("the ranks", got="others", expected="these")

    monkeypatch.setattr(distributed, "start", start)
    words = ["deepspeed.device=cpu", f"deepspeed.config={own}"]
    job = load_job(find_job("nursery"), words)
    for bucket in ("20000000", "30000000"):
        own.write_text(own.read_text().replace('t_size": 20000000', f't_size": {bucket}'))
        with pytest.raises(MeetingError):
            run_job(job, runs=tmp_path / "runs")
    first, second = compared
    assert {key for key in first if first[key] != second[key]} == {
        "zero_optimization of deepspeed.config"
    }


def test_the_state_follows_the_run(tmp_path: Path) -> None:
    with _state_kept(RunDirectory(tmp_path), Storages()):
        assert status(tmp_path) == "running"
    assert status(tmp_path) == "done"
    with (
        pytest.raises(TrainingError),
        _state_kept(RunDirectory(tmp_path), Storages()),
    ):
        raise TrainingError.of("student", got="inf", expected="finite numbers")
    assert status(tmp_path) == "failed"
    with pytest.raises(Stopped), _state_kept(RunDirectory(tmp_path), Storages()):
        raise Stopped("SIGTERM")
    assert status(tmp_path) == "stopped"


@pytest.mark.parametrize(
    "seen", [Stopped("SIGTERM"), RuntimeError("connection closed by peer")], ids=repr
)
def test_what_another_rank_said_of_its_failure_stays(tmp_path: Path, seen: Exception) -> None:
    """The launcher's SIGTERM, and a connection that breaks off, come of it."""

    def run() -> None:
        directory = RunDirectory(tmp_path)
        with _state_kept(directory, Storages()):
            directory.set_state("failed", error="no memory left", rank=1)
            raise seen

    with pytest.raises(type(seen)):
        run()
    state = json.loads((tmp_path / "state.json").read_text())
    assert state == {"status": "failed", "error": "no memory left", "rank": 1}


def test_a_state_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> None:
        with _state_kept(RunDirectory(tmp_path), Storages()):
            in_the_way(tmp_path / "state.json")
            raise TrainingError.of("student", got="inf", expected="finite numbers")

    with pytest.raises(TrainingError, match="got inf"):
        run()
    assert "state.json: got " in caplog.text


def test_a_run_whose_state_cannot_be_written_does_not_begin(tmp_path: Path) -> None:
    in_the_way(tmp_path / "state.json")
    with (
        pytest.raises(RunError, match=r"state\.json"),
        _state_kept(RunDirectory(tmp_path), Storages()),
    ):
        pytest.fail("it began")
