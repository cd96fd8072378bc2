"""Cores, cards, memory and bf16: what the machine says, and what it may say wrongly."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from babyllama_ds.doctor import devices as module

GIB = 2**30


def pretend_memory(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(module, "available_host_bytes", lambda: int(gib * 2**30))


def test_a_cpu_machine_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_memory(monkeypatch, 7.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    host, gpu = module.devices("cpu")
    assert (host.status, host.found) == ("ok", "6 cores, 7.5 GiB of memory available")
    assert (gpu.status, gpu.found) == ("ok", "none in use: jobs run on the CPU")


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_memory(monkeypatch, 1.9)
    host, _ = module.devices("cpu")
    assert host.status == "warning"
    assert "1.9 GiB" in host.found
    assert host.remedy


@pytest.mark.parametrize(("free", "status"), [(70, "ok"), (30, "warning")])
def test_cards(free: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cards(monkeypatch, capability=(9, 0), free=free)
    _, *cards = module.devices("cuda")
    assert [card.check for card in cards] == ["gpu 0", "gpu 1"]
    assert {card.status for card in cards} == {status}
    assert cards[1].found == f"Card, compute capability 9.0, {free}.0 of 80.0 GiB free"


def pretend_cards(
    monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int], free: int = 80
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 80 * GIB))


# -- the loss's kernel ----------------------------------------------------------------------------


def test_a_cpu_needs_no_loss_kernel() -> None:
    assert module.loss_kernel("cpu") == []


@pytest.mark.parametrize(
    ("why", "status", "found"),
    [
        (None, "ok", "Triton can start it"),
        ("Failed to find C compiler.", "warning", "slower: Failed to find C compiler."),
    ],
)
def test_a_loss_kernel_that_cannot_be_started_is_a_warning(
    why: str | None, status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "why_no_kernel", lambda: why)
    (finding,) = module.loss_kernel("cuda")
    assert finding.status == status
    assert finding.found.endswith(found)
    assert why is None or "python3-dev" in finding.remedy


# -- shared memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free_mib", "status", "found"),
    [
        (64, "failure", "64 MiB free in /dev/shm, 128 needed by 2 ranks"),
        (128, "warning", "128 MiB free in /dev/shm, 1,024 advised for NCCL"),
        (1024, "ok", "1,024 MiB free in /dev/shm"),
    ],
)
def test_shared_memory_of_several_cards(
    free_mib: int, status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cards(monkeypatch, capability=(9, 0))
    monkeypatch.setattr(module, "free_shared_bytes", lambda: free_mib * 2**20)
    (finding,) = module.shared_memory("cuda")
    assert (finding.status, finding.found) == (status, found)
    assert (finding.remedy is None) == (status == "ok")


def test_only_several_cards_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_shared_bytes", lambda: 0)
    assert module.shared_memory("cpu") == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert module.shared_memory("cuda") == []


# -- bf16 ------------------------------------------------------------------------------------------


def test_bf16_products_are_right() -> None:
    (found,) = module.bf16("cpu")
    assert found.status == "ok"
    assert found.found.startswith("supported; a 64×256×64 product has a relative error of 0.00")


def summed_in_bf16(left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros(len(left), right.shape[1], dtype=torch.bfloat16)
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[None, k]
    return total


@pytest.mark.parametrize(
    "broken", [summed_in_bf16, lambda a, b: (a @ b) * float("nan"), lambda a, b: (a @ b) * 1.02]
)
def test_wrong_products_are_a_failure(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_multiply", broken)
    (found,) = module.bf16("cpu")
    assert found.status == "failure"
    assert "allowed 0.0039" in found.found
    assert found.remedy


def test_a_card_without_bf16_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cards(monkeypatch, capability=(7, 5))
    found = module.bf16("cuda")
    assert [each.check for each in found] == ["bf16 on gpu 0", "bf16 on gpu 1"]
    assert {each.status for each in found} == {"failure"}
