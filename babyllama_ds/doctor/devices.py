"""What there is to compute with: cores, cards, their memory and what they share; is bf16 right, and
can the loss's kernel be started?"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from babyllama_ds.doctor.findings import Finding, failure, ok, warning
from babyllama_ds.engine.distributed import BF16_CAPABILITY, Device
from babyllama_ds.engine.shared_memory import (
    ADVISED_BYTES,
    REMEDY,
    free_shared_bytes,
    needed_shared_bytes,
)
from babyllama_ds.losses.rows import KERNEL_REMEDY, why_no_kernel
from babyllama_ds.memory import available_host_bytes

LOW_MEMORY_GIB = 2.0
PRODUCT = (64, 256)
"""Rows and inner length of the product that tries bf16 out."""
BF16_ERROR = 2**-8
"""Relative error allowed. Summed in fp32 and rounded once, an element is off by 2^-9 of itself at
most; summed in bf16 by several times as much."""


def devices(device: Device) -> list[Finding]:
    """Cores and host memory; each card with its memory."""
    found = [host()]
    if device == "cuda":
        found += [_card(index) for index in range(torch.cuda.device_count())]
    else:
        found.append(ok("gpu", "none in use: jobs run on the CPU"))
    return found


def shared_memory(device: Device) -> list[Finding]:
    """Room for NCCL's buffers, where several cards of this machine may talk to each other."""
    cards = torch.cuda.device_count() if device == "cuda" else 0
    free, needed = free_shared_bytes(), needed_shared_bytes(device, cards)
    if free is None or not needed:
        return []
    found = f"{free / 2**20:,.0f} MiB free in /dev/shm"
    if free < needed:
        least = f", {needed / 2**20:,.0f} needed by {cards} ranks"
        return [failure("shared memory", f"{found}{least}", remedy=REMEDY)]
    if free < ADVISED_BYTES:
        return [warning("shared memory", f"{found}, 1,024 advised for NCCL", remedy=REMEDY)]
    return [ok("shared memory", found)]


def bf16(device: Device) -> list[Finding]:
    """One bf16 product on every device, against float64."""
    places = _places(device)
    return [_bf16_on(place, name) for place, name in places]


def loss_kernel(device: Device) -> list[Finding]:
    """Whether the loss's kernel can be started on the cards."""
    if device == "cpu":
        return []
    if (why := why_no_kernel()) is not None:
        found = f"the loss goes without its kernel, which is slower: {why}"
        return [warning("loss kernel", found, remedy=KERNEL_REMEDY)]
    return [ok("loss kernel", "Triton can start it")]


def host() -> Finding:
    """Cores and memory of the machine."""
    cores = len(os.sched_getaffinity(0))
    free = available_host_bytes() / 2**30
    found = f"{cores} cores, {free:.1f} GiB of memory available"
    if free < LOW_MEMORY_GIB:
        return warning(
            "host", found, remedy="end other programs; a small job needs some 2 GiB for two ranks"
        )
    return ok("host", found)


def _card(index: int) -> Finding:
    free, total = (count / 2**30 for count in torch.cuda.mem_get_info(index))
    major, minor = torch.cuda.get_device_capability(index)
    found = (
        f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, "
        f"{free:.1f} of {total:.1f} GiB free"
    )
    if free < total / 2:
        return warning(
            f"gpu {index}", found, remedy="other programs use this card: nvidia-smi names them"
        )
    return ok(f"gpu {index}", found)


def _places(device: Device) -> Iterator[tuple[torch.device, str]]:
    if device == "cpu":
        yield torch.device("cpu"), "bf16"
        return
    for index in range(torch.cuda.device_count()):
        yield torch.device("cuda", index), f"bf16 on gpu {index}"


def _bf16_on(place: torch.device, name: str) -> Finding:
    if place.type == "cuda" and torch.cuda.get_device_capability(place)[0] < BF16_CAPABILITY:
        return failure(
            name,
            "the card has no bf16 arithmetic",
            remedy="use a card of compute capability 8.0 or newer, or run on the CPU "
            "(deepspeed.device=cpu)",
        )
    rows, inner = PRODUCT
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).bfloat16()
    right = torch.randn(inner, rows, generator=generator).bfloat16()
    exact = left.double() @ right.double()
    product = _multiply(left.to(place), right.to(place)).cpu().double()
    error = float((product - exact).abs().max() / exact.abs().max())
    found = f"a {rows}×{inner}×{rows} product has a relative error of {error:.4f}"
    if not error <= BF16_ERROR:
        return failure(
            name,
            f"{found}, allowed {BF16_ERROR:.4f}",
            remedy="the device or its libraries are broken: do not train on it",
        )
    return ok(name, f"supported; {found}")


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    return left @ right
