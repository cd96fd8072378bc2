"""Whether torch.compile is used: the job's word, the machine and the work enter, a choice leaves.

What is measured and where the rule of `auto` comes from: docs/decisions/compiling.md.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

from babyllama_ds.engine.distributed import Device
from babyllama_ds.errors import JobError, MachineError

Compiled = Literal["none", "student", "all"]
"""What torch.compile is given: nothing, the model in training, or the frozen teachers too."""

REPAID_AFTER_S = 60
"""Seconds of matrix products from which `auto` compiles. They are a quarter of a step on a CPU;
compiling the layers of a model takes 20 s at the most and saves a ninth of each step or more."""


def choose_compiled(
    asked: Literal["auto", "none", "student", "all"],
    *,
    device: Device,
    products_s: float,
    shapes_vary: bool = False,
) -> tuple[Compiled, str]:
    """What is compiled in a training, and why, for the log.

    `products_s`: seconds that its matrix products take at the rate measured on this machine.
    `shapes_vary`: a model's inputs have another shape in every micro-batch, so that it would be
    compiled anew each time.

    Raises:
        JobError: compiling is asked for by name and shapes vary.
        MachineError: compiling is asked for by name and what it takes is not there.
    """
    if asked == "none":
        return "none", "the job says so"
    if shapes_vary:
        if asked != "auto":
            raise JobError.of(
                "deepspeed.compile",
                got=asked,
                expected="none, since FlashAttention is told the lengths of documents "
                "(windows.attention=document), which are others in every micro-batch",
                hint="set deepspeed.compile=none, or the models' attention to sdpa",
            )
        return "none", "the lengths of documents are others in every micro-batch"
    lacking = what_compiling_lacks(device)
    if asked != "auto":
        if lacking is not None:
            raise MachineError.of(
                "deepspeed.compile",
                got=f"{lacking} on this machine, for {asked!r}",
                expected="what torch.compile builds its code with",
                hint="install it (Debian, Ubuntu: apt install g++ python3-dev; "
                "pip install triton), or set deepspeed.compile=none",
            )
        return asked, "the job says so"
    if lacking is not None:
        return "none", f"{lacking} here"
    work = f"{products_s:,.0f} s of matrix products"
    if products_s < REPAID_AFTER_S:
        return "none", f"{work} are too few, it pays from {REPAID_AFTER_S:,} s on"
    # On a CPU the teachers' own kernels (`models.fused`) are as fast as the compiler's.
    gaining: Compiled = "student" if device == "cpu" else "all"
    return gaining, f"{work}, it pays from {REPAID_AFTER_S:,} s on"


def what_compiling_lacks(device: Device) -> str | None:
    """What torch.compile would miss; none if nothing. What it builds is loaded by Python, against
    whose headers it is compiled; Triton builds its launchers in C."""
    if not _is_there("CXX", ["g++", "clang++"]):
        return "no C++ compiler"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "no headers of Python (Python.h)"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "no Triton"
    if device == "cuda" and not _is_there("CC", ["gcc", "clang"]):
        return "no C compiler"
    return None


def _is_there(variable: str, usual: list[str]) -> bool:
    """Whether the compiler that the variable names, flags aside, or else a usual one is found."""
    named = shlex.split(os.environ.get(variable, ""))[:1]
    return any(shutil.which(each) for each in named or usual)
