"""`state.json` says how a run ended, and never hides what ended it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from babyllama_ds.errors import RunError, Stopped, TrainingError
from babyllama_ds.pipeline.running import _state_kept
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.storages import Storages


def status(run_dir: Path) -> str:
    state: str = json.loads((run_dir / "state.json").read_text())["status"]
    return state


def in_the_way(path: Path) -> None:
    """What no file can take the place of."""
    path.unlink(missing_ok=True)
    path.mkdir()


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
