"""Shared memory for NCCL: how much there is, who needs how much, and who is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from babyllama_ds.engine import distributed, shared_memory
from babyllama_ds.errors import MachineError
from babyllama_ds.pipeline import running
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job

MIB = 2**20
OF_DOCKER = 64 * MIB
"""What a container has unless it is told otherwise."""


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


@pytest.mark.skipif(not shared_memory.FOLDER.is_dir(), reason="no /dev/shm on this system")
def test_what_is_free_is_what_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
    free = shared_memory.free_shared_bytes()
    assert free is not None
    assert abs(free - shutil.disk_usage("/dev/shm").free) < 64 * MIB  # others write there too


def test_without_a_folder_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "none")
    assert shared_memory.free_shared_bytes() is None
    shared_memory.check_shared_memory("cuda", 8)


@pytest.mark.parametrize(
    ("device", "local_ranks", "free", "refused"),
    [
        ("cuda", 2, OF_DOCKER, True),
        ("cuda", 8, 511 * MIB, True),
        ("cuda", 8, 512 * MIB, False),
        ("cuda", 2, 1024 * MIB, False),
        ("cuda", 1, 0, False),  # nobody to talk to
        ("cpu", 2, 0, False),  # gloo needs none
    ],
)
def test_who_is_refused(
    device: distributed.Device,
    local_ranks: int,
    free: int,
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_free(monkeypatch, free)
    if not refused:
        shared_memory.check_shared_memory(device, local_ranks)
        return
    with pytest.raises(MachineError) as caught:
        shared_memory.check_shared_memory(device, local_ranks)
    assert str(caught.value) == (
        f"/dev/shm: got {free // MIB} MiB of shared memory free, expected {64 * local_ranks} MiB, "
        f"for NCCL's buffers of {local_ranks} ranks\n"
        "    hint: give the container more: docker run --shm-size=1g, or --ipc=host"
    )


def test_nccl_told_to_spare_it_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_free(monkeypatch, 0)
    monkeypatch.setenv("NCCL_SHM_DISABLE", "1")
    shared_memory.check_shared_memory("cuda", 8)


def test_a_run_is_refused_before_nccl_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks of cards that are not there. They start NCCL as soon as they meet."""
    pretend_free(monkeypatch, OF_DOCKER)
    ended = []
    monkeypatch.setattr(distributed, "resolve_device", lambda _: "cuda")
    monkeypatch.setattr(distributed, "start", lambda *_, **__: pytest.fail("the ranks met"))
    monkeypatch.setattr(distributed, "stop", lambda: ended.append(True))
    monkeypatch.setenv("LOCAL_SIZE", "4")
    with pytest.raises(MachineError, match="expected 256 MiB") as caught:
        running.run_job(load_job(find_job("nursery"), []), runs=tmp_path / "runs")
    assert caught.value.told_by == "each node"
    assert ended == [True]
    assert not (tmp_path / "runs").exists()
