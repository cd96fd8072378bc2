"""Machines: a card's name, or `here`, enters; its memory and its speed leave.

Memory and dense bf16 peak (fp32 accumulation, no sparsity) are those of the vendor's data sheets;
where a sheet gives the figure with sparsity alone, half of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from babyllama_ds.engine.distributed import resolve_device
from babyllama_ds.errors import JobError, MachineError
from babyllama_ds.memory import total_host_bytes
from babyllama_ds.spec.deepspeed_file import Device

UTILISATION = 0.2
"""Share of a card's bf16 peak that training is taken to reach: an assumption, not measured. Models
of these sizes are far from filling a large card; `--rate` takes a measured speed instead."""

USABLE = 0.92
"""Share of a card's memory that is left for tensors: the context, communication buffers, and what
the allocator cannot place take the rest."""

HERE = "here"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank runs on."""

    name: str
    device: Device
    memory_bytes: int | None
    """Memory of one card; of the whole machine, shared by its ranks, where the device is the CPU.
    None: no card was named."""
    peak_flops: float | None
    """Dense bf16 FLOP/s of one card; none: not known."""

    def usable_bytes(self, ranks: int) -> int | None:
        """What one of so many ranks may use."""
        if self.memory_bytes is None:
            return None
        return int(self.memory_bytes * USABLE / (ranks if self.device == "cpu" else 1))


# Name: (memory in GiB, dense bf16 TFLOP/s).
CARDS: dict[str, tuple[int, float]] = {
    "A10": (24, 125),
    "A100-40": (40, 312),
    "A100-80": (80, 312),
    "A40": (48, 149.7),
    "A5000": (24, 111.1),
    "A6000": (48, 154.8),
    "B200": (180, 2250),
    "H100": (80, 989),
    "H100-PCIE": (80, 756),
    "H200": (141, 989),
    "L4": (24, 121),
    "L40S": (48, 362),
    "RTX3090": (24, 71),
    "RTX4090": (24, 165.2),
    "RTX5090": (32, 209.5),
}


def find_machine(name: str | None, requested: Literal["auto", "cpu", "cuda"]) -> Machine:
    """The card of that name, this machine (`here`), or nothing in particular (none).

    `requested` is the job's device. A card, and CUDA without one, need not be there.

    Raises:
        JobError: no card of that name is known, or the job is to run on the CPU.
        MachineError: `here` lacks what the job asks for, or its memory cannot be read.
    """
    if name is None:
        device = resolve_device("auto") if requested == "auto" else requested
        return Machine(name="not named", device=device, memory_bytes=None, peak_flops=None)
    if name == HERE:
        return _this_machine(resolve_device(requested))
    if requested == "cpu":
        raise JobError.of(
            "--gpu",
            got=f"{name!r} for a job on the CPU",
            expected="a job whose deepspeed.device is auto or cuda",
            hint=f"--gpu {HERE} plans for this machine's memory",
        )
    wanted = _plain(name)
    for card, (memory_gib, tflops) in CARDS.items():
        if _plain(card) == wanted:
            return Machine(
                name=card, device="cuda", memory_bytes=memory_gib << 30, peak_flops=tflops * 1e12
            )
    raise JobError.of(
        "--gpu",
        got=repr(name),
        expected=f"one of {', '.join(CARDS)}, or {HERE} for this machine",
        hint="for another card name one of its memory, and give its speed with --rate",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|gb?$", "", name.lower())


def _this_machine(device: Device) -> Machine:
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        return Machine(
            name=card.name, device=device, memory_bytes=card.total_memory, peak_flops=None
        )
    try:
        memory_bytes = total_host_bytes()
    except (ValueError, OSError) as error:
        raise MachineError.of(
            "--gpu", got=f"{HERE}, whose memory cannot be read ({error})", expected="a card's name"
        ) from error
    return Machine(name="this CPU", device=device, memory_bytes=memory_bytes, peak_flops=None)
