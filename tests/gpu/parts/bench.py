"""`make bench` on this card: its keys, as measured by tests/benchmarks/bench.py.

The workload is the one called `gpu` where the benchmark has it, else its default one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.measures import Measure, told
from gpu.parts.runs import environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROUNDS = {True: 2, False: 5}


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    sys.path.insert(0, str(BENCHMARKS))
    from scenario import SIZES

    sizes = "small" if small else ("gpu" if "gpu" in SIZES else "default")
    yield told("workload", sizes)
    with tempfile.TemporaryDirectory(prefix="babyllama-proof-") as folder:
        out = Path(folder) / "bench.json"
        words = ["--sizes", sizes, "--rounds", str(ROUNDS[small]), "--out", str(out)]
        words += ["--no-compiled"] if small else []
        subprocess.run(
            [sys.executable, str(BENCHMARKS / "bench.py"), *words], env=environment(), check=True
        )
        result = json.loads(out.read_text(encoding="utf-8"))
    for key, value in result["keys"].items():
        yield told(key, value)
    for row, facts in result["rows"].items():
        yield told(f"{row}: tokens/s", facts["tokens_per_s"])
