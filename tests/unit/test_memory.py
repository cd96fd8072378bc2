"""The host's memory, in and outside a container."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from babyllama_ds import memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, 48 of them free; the folder of its container's limits, none yet."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    pages = {"SC_PHYS_PAGES": 64 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def limit(machine: Path, text: str, *, used: int = 0, files: int = 0) -> None:
    (machine / "memory.max").write_text(f"{text}\n")
    (machine / "memory.current").write_text(f"{used}\n")
    (machine / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")


def test_without_a_container(machine: Path) -> None:
    assert memory.available_host_bytes() == 48 * GIB
    assert memory.total_host_bytes() == 64 * GIB


def test_a_container_without_a_limit(machine: Path) -> None:
    limit(machine, "max", used=5 * GIB)
    assert memory.available_host_bytes() == 48 * GIB
    assert memory.total_host_bytes() == 64 * GIB


def test_a_containers_limit(machine: Path) -> None:
    """Files that were read are given up: they count as free."""
    limit(machine, str(16 * GIB), used=10 * GIB, files=3 * GIB)
    assert memory.available_host_bytes() == 9 * GIB
    assert memory.total_host_bytes() == 16 * GIB


def test_a_limit_above_the_machine(machine: Path) -> None:
    limit(machine, str(999 * GIB))
    assert memory.available_host_bytes() == 48 * GIB
    assert memory.total_host_bytes() == 64 * GIB


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "nothing")
    with pytest.raises(OSError, match="nothing"):
        memory.available_host_bytes()


STEPS = """
import json, resource, sys
from pathlib import Path
import torch
from babyllama_ds import memory

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def step() -> None:
    tensors = [torch.ones(10_000_000) for _ in range(2)]

if sys.argv[1] == "kept":
    memory.keep_freed_memory()
for _ in range(30):
    step()  # until blocks of these sizes have found their places
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = resident()
memory.give_back_freed_memory()
print(json.dumps({"faults": faults, "given_back": held - resident()}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's ways")
def test_freed_memory_is_kept_for_the_next_step_until_it_is_given_back() -> None:
    def run(how: str) -> dict[str, int]:
        words = [sys.executable, "-c", STEPS, how]
        printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        result: dict[str, int] = json.loads(printed)
        return result

    kept, usual = run("kept"), run("usual")
    assert kept["faults"] < 100 < 1000 < usual["faults"]  # 80 MB are 19,531 pages
    assert kept["given_back"] > 60e6 > 10e6 > usual["given_back"]
