"""Folders of runs on several hosts, over an `ssh` that runs the command here, in a directory of the
host's own or in one that hosts share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from babyllama_ds.doctor import sharing as module
from babyllama_ds.doctor.sharing import sharing

RUNS = Path("folder of/runs")
Ssh = Callable[[Mapping[str, Path]], None]


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ssh:
    """Hosts and the directories that they find in the place of this one; others do not answer."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(directories: Mapping[str, Path]) -> None:
        there = {host: str(path) for host, path in directories.items()}
        (folder / "ssh").write_text(
            f"#!{sys.executable}\n"
            "import os, shlex, subprocess, sys\n"
            "*options, host, command = sys.argv[1:]\n"
            f"there = {there!r}\n"
            "if host not in there: sys.exit(255)\n"
            "command = command.replace(os.getcwd(), there[host])\n"
            "sys.exit(subprocess.run(['sh', '-c', command]).returncode)\n"
        )
        (folder / "ssh").chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "SEEN_WITHIN_S", 1.0)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return put


def directories(tmp_path: Path, *names: str) -> list[Path]:
    made = [tmp_path / name for name in names]
    for path in made:
        path.mkdir(exist_ok=True)
    return made


def test_one_folder_on_all_hosts(ssh: Ssh, tmp_path: Path) -> None:
    (one,) = directories(tmp_path, "one")
    ssh({"a": one, "b": one, "c": one})
    (found,) = sharing(RUNS, ["a", "b", "c"], ssh_port=None)
    assert (found.status, found.check) == ("ok", "runs on all hosts")
    assert found.found == (
        "folder of/runs is one folder on all 3: right for deepspeed.storage=shared"
    )
    assert not (one / RUNS).exists()  # as it was


def test_a_folder_of_each_host(ssh: Ssh, tmp_path: Path) -> None:
    one, two = directories(tmp_path, "one", "two")
    (two / RUNS).mkdir(parents=True)
    ssh({"a": one, "b": two})
    (found,) = sharing(RUNS, ["a", "b"], ssh_port=None)
    assert found.status == "warning"
    assert found.found == "each of the 2 hosts has a folder of/runs of its own"
    assert "deepspeed.storage=node" in (found.remedy or "")
    assert not list((two / RUNS).iterdir())


def test_a_folder_that_some_share(ssh: Ssh, tmp_path: Path) -> None:
    one, two = directories(tmp_path, "one", "two")
    ssh({"a": one, "b": two, "c": one})
    (found,) = sharing(RUNS, ["a", "b", "c"], ssh_port=None)
    assert found.status == "failure"
    assert found.found == (
        "folder of/runs is shared by some: files of a, c; of b are seen together"
    )


def test_a_host_that_cannot_write(ssh: Ssh, tmp_path: Path) -> None:
    one, two = directories(tmp_path, "one", "two")
    (two / RUNS.parts[0]).write_text("a file in the way")
    ssh({"a": one, "b": two})
    (found,) = sharing(RUNS, ["a", "b"], ssh_port=None)
    assert found.status == "failure"
    assert found.found == "folder of/runs cannot be written, or read again, on b"
    assert not list(one.rglob(".tmp*"))


def test_another_file_of_that_name_is_no_proof(
    ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are new: what another host seems to have must say what that host wrote."""
    one, two = directories(tmp_path, "one", "two")
    (two / RUNS).mkdir(parents=True)
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (two / RUNS / ".tmp-doctor-known-0").write_text("something else")
    ssh({"a": one, "b": two})
    (found,) = sharing(RUNS, ["a", "b"], ssh_port=None)
    assert found.status == "warning"


def test_one_host_has_nothing_to_share(ssh: Ssh) -> None:
    ssh({})
    assert sharing(RUNS, ["a"], ssh_port=None) == []
