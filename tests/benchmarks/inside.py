"""Inside a step: something that takes steps enters; the time of its parts and kernels leaves.

timed       seconds of steps, and the most memory that they took
Marked      the parts of `training.breakdown`, by the device's own clock
profiled    the kernels that take the most time, and how long none ran
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from babyllama_ds.training.breakdown import Breakdown

TRIAL_STEPS = 2
"""Steps by which a turn's length is settled, and variants are compared."""
KERNELS_TOLD = 16

Course = Generator[None, None, dict[str, Any]]
"""Is resumed before each step and once after the last one; what was measured is its value."""


# -- seconds and bytes -----------------------------------------------------------------------------


def timed(device: torch.device, *, warm: int, turns: int, turn_s: float) -> Course:
    """Steps that do not count, a few that settle a turn's length, then the turns.

    The value: `step_s`, a number for each turn (of no turns, that of the trial); `steps` of a
    turn; `memory`, the most held at one time in the turns.
    """
    for _ in range(warm):
        yield
    trial_s = yield from _seconds(device, TRIAL_STEPS)
    steps = max(TRIAL_STEPS, round(turn_s / trial_s))
    forget_peak(device)
    found = []
    for _ in range(turns):
        found.append((yield from _seconds(device, steps)))
    return {"step_s": found or [trial_s], "steps": steps, "memory": peak(device)}


def _seconds(device: torch.device, steps: int) -> Generator[None, None, float]:
    """Seconds of a step, over so many: the device is waited for at both ends and nowhere else."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        yield
    synchronize(device)
    return (time.perf_counter() - started) / steps


def run(course: Course, step: Callable[[], object]) -> dict[str, Any]:
    """Take steps as the course asks for them."""
    while True:
        try:
            next(course)
        except StopIteration as end:
            measured: dict[str, Any] = end.value
            return measured
        step()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Count the most memory from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: torch.device) -> dict[str, int]:
    """The most bytes held at one time since then.

    On a card, of tensors, by torch's allocator, and what it had reserved for them: without the
    CUDA context. On a CPU, the process's resident memory, code and all.
    """
    if device.type == "cuda":
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (each for each in lines if each.startswith("VmHWM:"))
    return {"peak_rss_bytes": int(line.split()[1]) * 1024}


# -- parts -----------------------------------------------------------------------------------------


class Marked(Breakdown):
    """The parts of a step on a CUDA device's own clock: nothing waits for them.

    A mark in the device's queue stands where a part ends. Time in which the device has nothing to
    do counts to the part whose work it waits for.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []

    def settle(self) -> None:
        """Wait for the device, and sum up."""
        synchronize(self._device)
        for (_, before), (name, after) in pairwise(self._marks):
            if name is not None:
                self.seconds[name] += before.elapsed_time(after) / 1000
        self._marks.clear()

    def _turn(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((self._inside[-1] if self._inside else None, event))


# -- kernels ---------------------------------------------------------------------------------------

KINDS = {
    "compiled": r"^triton_",
    "losses": r"^(_row|_log_sum_exp|_mean_logits|_mean_probability)",
    "attention": r"flash|fmha|attention|sdpa|cudnn.*sdp",
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|wgrad|addmm|\bmm\b|bmm|linear",
    "optimizer": r"multi_tensor|adam|lamb",
    "copies and casts": r"memcpy|memset|copy|_to_copy|cast",
    "communication": r"nccl",
    "reductions and norms": r"reduce|norm|softmax|logsumexp|welford",
    "elementwise": r"elementwise|vectorized|unrolled|aten::",
}
"""By their names, the first that fits; all others are `other`."""
NO_KERNEL = re.compile(r"Optimizer\.|ProfilerStep|##|Torch-Compiled Region|CompiledFunction")
"""Names of spans that hold kernels and are none."""


def profiled(
    step: Callable[[], object], device: torch.device, *, steps: int, step_s: float
) -> dict[str, Any]:
    """The kernels of a few steps (on a CPU: operators, their own time), the longest first.

    `step_s` is a step's time when nobody looks: `idle_share` is the part of it in which no kernel
    runs, `idle_share_profiled` the same of the profiled steps, which are slower.
    """
    step()
    synchronize(device)
    on_card = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        for _ in range(steps):
            step()
        synchronize(device)
    if not on_card:
        own = {each.key: each.self_cpu_time_total / 1e6 for each in seen.key_averages()}
        return _table(own, Counter({each.key: each.count for each in seen.key_averages()}), steps)
    kernels = [
        event
        for event in seen.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
        and not event.is_user_annotation()
        and not NO_KERNEL.match(event.name())
    ]
    if not kernels:
        return {"failed": "the profiler saw no kernel"}
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in kernels:
        seconds[event.name()] += event.duration_ns() / 1e9
    times = Counter(event.name() for event in kernels)
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in kernels]
    busy_s, whole_s = covered(spans) / 1e9, (max(b for _, b in spans) - min(spans)[0]) / 1e9
    return {
        "busy_s": busy_s / steps,
        "idle_share": max(0.0, 1 - busy_s / steps / step_s),
        "idle_share_profiled": 1 - busy_s / whole_s,
        **_table(seconds, times, steps),
    }


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length of their union."""
    total, reached = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def kind_of(kernel: str) -> str:
    """What a kernel does, as far as its name tells."""
    return next(
        (kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "other"
    )


def _table(seconds: Mapping[str, float], times: Counter[str], steps: int) -> dict[str, Any]:
    whole = sum(seconds.values())
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, each in seconds.items():
        kinds[kind_of(name)] += each
    longest = sorted(seconds, key=lambda name: -seconds[name])[:KERNELS_TOLD]
    return {
        "kernels_per_step": sum(times.values()) / steps,
        "kinds": {
            kind: {"ms": 1e3 * each / steps, "share": each / whole}
            for kind, each in sorted(kinds.items(), key=lambda item: -item[1])
        },
        "longest": [
            {
                "name": name[:120],
                "times": times[name] / steps,
                "ms": 1e3 * seconds[name] / steps,
                "share": seconds[name] / whole,
            }
            for name in longest
        ],
    }
