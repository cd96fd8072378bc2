"""The project's own tests that need a card, or run on one where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.measures import Measure, holds

ROOT = Path(__file__).resolve().parents[3]
FILES = ("tests/gpu/test_syncs.py", "tests/parity/test_triton_rows.py")


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    for path in FILES:
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
        if device.type == "cpu":
            words += ["--collect-only"]
        done = subprocess.run(
            words, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
        )
        print(done.stdout[-6000:], done.stderr[-2000:])
        summary = (done.stdout.strip().splitlines() or ["without a word"])[-1]
        yield holds(path, done.returncode == 0, re.sub(r"\s*=+\s*", "", summary))
