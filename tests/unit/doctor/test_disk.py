"""The directory of runs: room, speed and locks, tried out and left as it was."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from babyllama_ds.doctor import disk as module
from babyllama_ds.doctor.findings import Finding

GIB = 2**30


def by_check(runs: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in module.disk(runs)}


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_BYTES", 2**20)


def pretend_free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    usage = SimpleNamespace(free=int(gib * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_sound_disk_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_free(monkeypatch, 123.4)
    monkeypatch.setattr(module, "_write_seconds", lambda _: 0.01)
    found = by_check(tmp_path / "not" / "yet" / "there")
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["disk"].found.startswith("123.4 GiB free in /")
    assert found["write speed"].found == "1 MiB written and synced at 105 MB/s"
    assert found["locks"].found == "a held lock keeps others out"
    assert list(tmp_path.iterdir()) == []


def test_quickly_nothing_is_written_but_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_write_seconds", lambda _: pytest.fail("written"))
    assert [finding.check for finding in module.disk(tmp_path, quick=True)] == ["disk", "locks"]


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    by_check(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_doctor_left_goes(tmp_path: Path) -> None:
    for name, age_s in (("dead", 7200), ("at-work", 60)):
        folder = tmp_path / f".doctor-{name}"
        folder.mkdir()
        (folder / "probe").touch()
        os.utime(folder, (time.time() - age_s,) * 2)
    by_check(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".doctor-at-work"]


def test_what_another_process_wrote_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_free(monkeypatch, 123.4)
    runs = tmp_path / "new" / "runs"

    def write_beside(_: Path) -> float:
        (runs / "run").mkdir()
        return 0.01

    monkeypatch.setattr(module, "_write_seconds", write_beside)
    assert {finding.status for finding in by_check(runs).values()} == {"ok"}
    assert [path.name for path in runs.iterdir()] == ["run"]


@pytest.mark.parametrize(("gib", "status"), [(0.9, "failure"), (9.9, "warning"), (10.1, "ok")])
def test_room(gib: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_free(monkeypatch, gib)
    found = by_check(tmp_path)["disk"]
    assert found.status == status
    assert (found.remedy is None) == (status == "ok")


def test_the_probe_is_written_and_timed(tmp_path: Path) -> None:
    assert module._write_seconds(tmp_path / "probe") > 0
    assert (tmp_path / "probe").stat().st_size == module.PROBE_BYTES


def test_a_slow_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_write_seconds", lambda _: 1.0)
    found = by_check(tmp_path)["write speed"]
    assert (found.status, found.found) == ("warning", "1 MiB written and synced at 1 MB/s")
    assert "--runs" in (found.remedy or "")


def test_a_place_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (found,) = module.disk(tmp_path / "file" / "runs")
    assert (found.check, found.status) == ("disk", "failure")
    assert "Not a directory" in found.found
    assert "--runs DIR" in (found.remedy or "")


def test_locks_that_lock_nothing_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_can_lock", lambda _: True)
    found = by_check(tmp_path)["locks"]
    assert found.status == "failure"
    assert found.found == "a lock that is held was given a second time"


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_failure(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre without `-o flock`, and NFS without its lock daemon, answer."""

    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = by_check(tmp_path)["locks"]
    assert found.status == "failure"
    assert "refuses locks" in found.found
    assert "flock" in (found.remedy or "")
