"""Peak memory of whole stages beside the estimate of `babyllama-ds plan`.

The estimate should be no less than what was needed, and not much more. Measured by
tests/benchmarks/plan_memory.py, on the card as torch's allocator counts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu.measures import Measure, told
from gpu.parts.runs import environment

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plan_memory.py"
CASES = {False: ("small", "student of 58 M", "published"), True: ("rehearsal",)}
BOUNDS = (0.9, 1.5)
"""Estimate over measured, of a plan that one can go by."""


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    for case in CASES[small]:
        with tempfile.TemporaryDirectory(prefix="babyllama-proof-") as folder:
            out = Path(folder) / "memory.json"
            words = [sys.executable, str(SCRIPT), case, "--device", device.type, "--out", str(out)]
            done = subprocess.run(
                words, env=environment(), capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                last = (done.stderr or done.stdout).strip().splitlines() or ["without a word"]
                yield Measure(check=case, found=last[-1], allowed="is measured", passed=False)
                continue
            for row in json.loads(out.read_text(encoding="utf-8")):
                yield from _judged(case, row, judged=not small)


def _judged(case: str, row: dict[str, Any], *, judged: bool) -> Iterator[Measure]:
    planned, measured = row["planned_bytes"], row["measured_bytes"]
    ratio = planned / max(measured, 1)
    low, high = BOUNDS
    yield told(f"{case}, {row['stage']}: measured GiB", measured / 2**30)
    yield Measure(
        check=f"{case}, {row['stage']}: estimate / measured",
        found=f"{ratio:.2f} ({planned / 2**30:.3g} GiB, peak at {row['peak']})",
        allowed=f"{low} to {high}" if judged else "",
        passed=not judged or low <= ratio <= high,
        value=ratio,
    )
