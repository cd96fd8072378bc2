"""The loss alone: time and peak memory of value and gradients, ours against the textbook's.

Final hidden states and heads are given; each side makes the loss of `distillation.py` and the
gradients of the student's states and head.

    ours        bf16, chunk by chunk
    textbook    fp32: full logits of all models, their stack and mean, KLDivLoss, autograd
    one         ours with a single teacher, which is what liger can express
    liger       liger-kernel's fused JSD loss at β = 0 (the forward KL), bf16, where installed
    liger-compiled    the same under torch.compile, its default, where a compiler is found

Times are of one process whose sides take turns, memory of a process for each side. A ratio is the
median, over rounds, of the ratio of two sides' times in the same round.

    python tests/benchmarks/loss.py [--rounds N] [--positions N] [--vocab V] [--out loss.json]

Shapes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from babyllama_ds.losses.distillation import TeacherStates, distillation_loss
from babyllama_ds.losses.heads import Head
from babyllama_ds.report.formatting import number, table

ALPHA, TEMPERATURE = 0.5, 2.0
"""Of BabyLlama."""
WINDOW = 128
"""Positions of a window; the KL's divisor is the number of windows."""


@dataclass(frozen=True)
class Sizes:
    """One workload; the default is that of a step of the main benchmark."""

    positions: int = 4096
    vocab_size: int = 8192
    student_width: int = 256
    teacher_widths: tuple[int, ...] = (384, 384)
    chunk_tokens: int | None = None
    device: str = "cpu"


@dataclass
class Inputs:
    """States and heads, scaled so that logits have a standard deviation of 3."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teachers: list[tuple[Tensor, Tensor]]
    labels_N: Tensor
    sizes: Sizes

    @classmethod
    def make(cls, sizes: Sizes, dtype: torch.dtype) -> Inputs:
        """The same numbers for every side, but for rounding."""
        rng = torch.Generator().manual_seed(1)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=rng) * std).to(torch.bfloat16)

        def model(width: int) -> tuple[Tensor, Tensor]:
            states = normal(sizes.positions, width)
            head = normal(sizes.vocab_size, width, std=3 / math.sqrt(width))
            return states.to(sizes.device, dtype), head.to(sizes.device, dtype)

        hidden_ND, weight_VD = model(sizes.student_width)
        labels_N = torch.randint(0, sizes.vocab_size, (sizes.positions,), generator=rng)
        labels_N[WINDOW - 1 :: WINDOW] = -100
        return cls(
            hidden_ND.requires_grad_(),
            weight_VD.requires_grad_(),
            [model(width) for width in sizes.teacher_widths],
            labels_N.to(sizes.device),
            sizes,
        )

    def differentiate(self, loss: Tensor) -> Tensor:
        """Backward; gradients are dropped."""
        loss.backward()
        assert self.hidden_ND.grad is not None
        assert self.weight_VD.grad is not None
        self.hidden_ND.grad = self.weight_VD.grad = None
        return loss.detach()


def ours(inputs: Inputs, num_teachers: int | None = None) -> Tensor:
    """The fused loss."""
    sizes = inputs.sizes
    labelled = sizes.positions - sizes.positions // WINDOW
    result = distillation_loss(
        inputs.hidden_ND,
        Head(inputs.weight_VD),
        inputs.labels_N,
        torch.ones_like(inputs.labels_N, dtype=torch.bool),
        [TeacherStates(states, Head(head)) for states, head in inputs.teachers[:num_teachers]],
        alpha=ALPHA,
        temperature=TEMPERATURE,
        mean_of="logits",
        ce_count=labelled,
        kl_count=sizes.positions // WINDOW,
        vocab_size=sizes.vocab_size,
        chunk_tokens=sizes.chunk_tokens,
    )
    return inputs.differentiate(result.loss)


def textbook(inputs: Inputs) -> Tensor:
    """As the published code computes it."""
    z = inputs.hidden_ND @ inputs.weight_VD.T
    hard = F.cross_entropy(z, inputs.labels_N, ignore_index=-100)
    with torch.no_grad():
        mean = torch.stack([states @ head.T for states, head in inputs.teachers]).mean(dim=0)
    soft = nn.KLDivLoss(reduction="sum")(
        F.log_softmax(z / TEMPERATURE, dim=-1), F.softmax(mean / TEMPERATURE, dim=-1)
    ) / (inputs.sizes.positions // WINDOW)
    return inputs.differentiate(ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft)


def liger(inputs: Inputs, *, compiled: bool = False) -> Tensor:
    """Its soft loss has no T² and is a mean over labelled positions: the weight makes up for it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    states, head = inputs.teachers[0]
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=ALPHA,
        weight_soft_loss=(1 - ALPHA) * TEMPERATURE**2 * (WINDOW - 1),
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
    )
    value = loss(inputs.hidden_ND, inputs.weight_VD, states, head, inputs.labels_N)
    return inputs.differentiate(value)


@dataclass(frozen=True)
class Side:
    """What computes, and on what."""

    compute: Callable[[Inputs], Tensor]
    dtype: torch.dtype


SIDES = {
    "ours": Side(ours, torch.bfloat16),
    "textbook": Side(textbook, torch.float32),
    "one": Side(lambda inputs: ours(inputs, 1), torch.bfloat16),
    "liger": Side(liger, torch.bfloat16),
    "liger-compiled": Side(lambda inputs: liger(inputs, compiled=True), torch.bfloat16),
}
RATIOS = {
    "loss_time_ratio": ("ours", "textbook"),
    "liger_loss_time_ratio": ("one", "liger"),
    "liger_compiled_loss_time_ratio": ("one", "liger-compiled"),
}
"""Ours over the other."""


def measure(sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Seconds, peak bytes and losses of each side, and the ratios: ours over the other."""
    names = available()
    times = _times(names, sizes, rounds)
    memory = {name: _peak_bytes_of_a_process(name, sizes) for name in names}
    ratios = {
        key: median(a / b for a, b in zip(times[mine][1], times[other][1], strict=True))
        for key, (mine, other) in RATIOS.items()
        if other in names
    }
    return {
        "keys": {**ratios, "loss_peak_memory_ratio": memory["ours"] / memory["textbook"]},
        "sides": {
            name: {
                "seconds": median(times[name][1]),
                "peak_bytes": memory[name],
                "loss": times[name][0],
            }
            for name in names
        },
        "sizes": asdict(sizes),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }


def available() -> list[str]:
    """The sides that can run here."""
    missing = set()
    if importlib.util.find_spec("liger_kernel") is None:
        missing = {"liger", "liger-compiled"}
    elif shutil.which("c++") is None:
        missing = {"liger-compiled"}
    return [name for name in SIDES if name not in missing]


def _times(names: list[str], sizes: Sizes, rounds: int) -> dict[str, tuple[float, list[float]]]:
    """(loss, seconds of each round) by side, after a round that does not count."""
    inputs = {name: Inputs.make(sizes, SIDES[name].dtype) for name in names}
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number_of_round in range(rounds + 1):
        for name in names if number_of_round % 2 == 0 else reversed(names):
            started = time.perf_counter()
            losses[name] = SIDES[name].compute(inputs[name]).item()  # waits for the device
            if number_of_round:
                seconds[name].append(time.perf_counter() - started)
    return {name: (losses[name], seconds[name]) for name in names}


# -- memory ----------------------------------------------------------------------------------------


def _peak_bytes_of_a_process(name: str, sizes: Sizes) -> int:
    reply = subprocess.run(
        [sys.executable, __file__, "--memory-of", name, "--sizes", json.dumps(asdict(sizes))],
        # What is freed goes back to the system: else memory from before is used again, unseen.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(reply.stdout.splitlines()[-1])


def _peak_bytes(name: str, sizes: Sizes) -> int:
    """What a first computation needs beside its inputs, in this process, which does nothing else.

    A computation of one window before it loads what is loaded but once.
    """
    side = SIDES[name]
    small = Sizes(**{**asdict(sizes), "positions": WINDOW, "chunk_tokens": WINDOW})
    side.compute(Inputs.make(small, side.dtype))
    inputs = Inputs.make(sizes, side.dtype)
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.compute(inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    before = _status_bytes("VmRSS")
    side.compute(inputs)
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


# -- words -----------------------------------------------------------------------------------------


def render(result: dict[str, Any]) -> str:
    """A table of the sides and one of the ratios."""
    sides = [
        [
            name,
            number(1e3 * side["seconds"], 1),
            number(side["peak_bytes"] / 2**20, 1),
            number(side["loss"], 4),
        ]
        for name, side in result["sides"].items()
    ]
    ratios = [[key, number(value, 3)] for key, value in result["keys"].items()]
    return table(["side", "ms", "peak MiB", "loss"], sides) + "\n\n" + table(["ratio", ""], ratios)


def main() -> None:
    """Measure, print, write."""
    default = Sizes()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--positions", type=int, default=default.positions)
    parser.add_argument("--vocab", type=int, default=default.vocab_size)
    parser.add_argument("--student", type=int, default=default.student_width)
    parser.add_argument("--teachers", type=int, nargs="+", default=list(default.teacher_widths))
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.memory_of:
        print(_peak_bytes(words.memory_of, Sizes(**words.sizes)))
        return
    sizes = Sizes(
        positions=words.positions,
        vocab_size=words.vocab,
        student_width=words.student,
        teacher_widths=tuple(words.teachers),
        chunk_tokens=words.chunk_tokens,
        device=words.device,
    )
    result = measure(sizes, rounds=words.rounds)
    print(render(result))
    if words.out:
        words.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
