"""The machine: its card, driver and versions; what it multiplies and copies in a second."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from babyllama_ds.engine.matmul_rate import measure_matmul_rates
from babyllama_ds.environment import describe_environment
from gpu.measures import Measure, at_most, told

COPIED_BYTES = {"cuda": 2**32, "cpu": 2**26}
TIMES = 10
LONG = 65_536
BF16_SUM = 2**-8 + 2**-11
"""One rounding of the sum, and what a sum in fp32 loses before: matrix units add sixteen products
at a time, 4,096 times here, and may cut off rather than round, 2^-23 of the sum at most each."""


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    yield from _described(describe_environment(device))
    if device.type == "cuda":
        yield told("card", _nvidia_smi())
    yield told("square bf16 products, TFLOP/s", measure_matmul_rates([], device).square / 1e12)
    yield told("copies on the device, GB/s (read and written)", _copy_rate(device) / 1e9)
    yield _bf16_sums(device)


def _described(environment: dict[str, Any]) -> Iterator[Measure]:
    yield told("commit", str(environment["commit"]))
    for room in ("versions", "hardware"):
        for name, value in environment[room].items():
            if value is not None:
                yield told(name, str(value))


def _nvidia_smi() -> str:
    keys = "name,driver_version,memory.total,clocks.sm,clocks.max.sm"
    words = ["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        return f"nvidia-smi: {error}"
    return "; ".join((done.stdout or done.stderr).strip().splitlines())


def _copy_rate(device: torch.device) -> float:
    """Bytes per second, each counted when it is read and when it is written."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    _wait(device)
    started = time.perf_counter()
    for _ in range(TIMES):
        target.copy_(source)
    _wait(device)
    return 2 * TIMES * source.numel() / (time.perf_counter() - started)


def _bf16_sums(device: torch.device) -> Measure:
    """cuBLAS may sum parts of a long product in bf16 (`allow_bf16_reduced_precision_reduction`)."""
    error = long_sums_error(lambda one, other: (one.to(device) @ other.to(device).T).cpu())
    return at_most("long bf16 products, relative error", error, BF16_SUM)


def long_sums_error(multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The largest relative error of long inner products: `multiply(left_MK, right_NK)` in bf16.

    They lie about 2^14, where a bf16 number's half step is the largest part of it, 2^-8.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(64, LONG, generator=generator).bfloat16() for _ in range(2))
    exact = left.double() @ right.double().T
    return float(((multiply(left, right).double() - exact) / exact).abs().max())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
