"""Hostfiles, and hosts that answer over an `ssh` that stands in for the real one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.doctor import hosts as module
from babyllama_ds.doctor.hosts import describe_host, hosts, read_hostfile
from babyllama_ds.errors import MachineError


@pytest.fixture
def hostfile(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "hostfile"
        path.write_text(text)
        return path

    return write


def test_a_hostfile(hostfile: Callable[[str], Path]) -> None:
    path = hostfile("# two of them\n\nnode-1 slots=8\n  10.0.0.2   slots=4  # half\n")
    assert read_hostfile(path) == {"node-1": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1\n", "hostfile:1: got 'node-1', expected NAME slots=N"),
        ("a slots=2\nnode-1 slots=two\n", "hostfile:2: got 'node-1 slots=two'"),
        ("node-1 slots=0\n", "hostfile:1: got 'node-1 slots=0'"),
        ("node-1 slots = 2\n", "hostfile:1: got"),
        ("node-1 slots=2 gpus=2\n", "hostfile:1: got"),
        ("a slots=2\nb slots=2\na slots=2\n", "hostfile:3: got a for the second time"),
        ("# nobody\n", "got no host"),
    ],
)
def test_malformed_lines_are_refused(
    text: str, message: str, hostfile: Callable[[str], Path]
) -> None:
    with pytest.raises(MachineError) as caught:
        read_hostfile(hostfile(text))
    assert message in str(caught.value)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    """DeepSpeed takes it for "no other hosts"."""
    with pytest.raises(MachineError, match=r"got no such file or directory, .*\n.*machine alone"):
        read_hostfile(tmp_path / "none")


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """An `ssh` whose last two words are the host and what is to be done: a Python program."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(text: str) -> None:
        (folder / "ssh").write_text(
            f"#!{sys.executable}\nimport sys\n*options, host, there = sys.argv[1:]\n{text}"
        )
        (folder / "ssh").chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return put


def answer(**changes: Any) -> str:
    return f"print({json.dumps(describe_host('cpu') | changes)!r})"


def test_hosts_that_are_as_this_one(ssh: Callable[[str], None]) -> None:
    ssh("print('a banner')\n" + answer(name="there"))
    first, *rest = hosts({"a": 1, "b": 1}, "cpu", ssh_port=None)
    assert (first.status, first.found) == ("ok", "2 ranks on 2 hosts")
    assert [(one.check, one.status) for one in rest] == [("host a", "ok"), ("host b", "ok")]
    assert "there: 1 slots" in rest[0].found


def test_the_port_and_the_directory_are_passed_on(ssh: Callable[[str], None]) -> None:
    ssh("sys.exit(' '.join([*options, host, there]))")
    (_, found) = hosts({"a": 1}, "cpu", ssh_port=2222)
    assert "-p 2222 a cd" in found.found
    assert str(Path.cwd()) in found.found
    assert sys.executable in found.found


def test_uneven_slots_are_fine(ssh: Callable[[str], None]) -> None:
    ssh(answer(cores=64))
    found = hosts({"a": 2, "b": 1}, "cpu", ssh_port=None)
    assert [one.status for one in found] == ["ok"] * 3
    assert "3 ranks on 2 hosts, not as many on each" in found[0].found


def test_a_host_that_cannot_be_reached(ssh: Callable[[str], None]) -> None:
    ssh(
        "if host == 'gone':\n"
        "    print('ssh: connect to host gone port 22: No route to host', file=sys.stderr)\n"
        "    sys.exit(255)\n" + answer()
    )
    _, here, gone = hosts({"here": 1, "gone": 1}, "cpu", ssh_port=None)
    assert here.status == "ok"
    assert (gone.check, gone.status) == ("host gone", "failure")
    assert "status 255: ssh: connect to host gone port 22: No route to host" in gone.found
    assert "without a password" in (gone.remedy or "")


def test_a_host_that_never_answers(
    ssh: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_LIMIT_S", 0.3)
    ssh("import time; time.sleep(20)")
    assert "no answer within 0.3 s" in hosts({"a": 1}, "cpu", ssh_port=None)[1].found


def test_other_versions_there(ssh: Callable[[str], None]) -> None:
    same = describe_host("cpu")["same"] | {"version of torch": "1.0"}
    ssh(answer(same=same))
    _, found = hosts({"a": 1}, "cpu", ssh_port=None)
    assert found.status == "failure"
    assert found.found.startswith("version of torch is 1.0 there, 2.")


def test_other_processors_there(ssh: Callable[[str], None]) -> None:
    ssh(answer(alike={"CPU capability": "of another kind"}))
    _, found = hosts({"a": 1}, "cpu", ssh_port=None)
    assert found.status == "warning"
    assert "CPU capability is of another kind there" in found.found


@pytest.mark.parametrize(("device", "status"), [("cpu", "warning"), ("cuda", "failure")])
def test_more_slots_than_there_is_to_compute_on(
    device: Any, status: str, ssh: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = describe_host("cpu")["alike"]
    monkeypatch.setattr(module, "compared_hardware", lambda _: alike)
    ssh(answer(cores=2, cards=2))
    _, found = hosts({"a": 3}, device, ssh_port=None)
    assert (found.status, found.remedy) == (status, "slots=2 in the hostfile")
