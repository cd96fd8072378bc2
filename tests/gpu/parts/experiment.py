"""A job of the user's, run on this card as `make distill` would: `--job JOB KEY=VALUE …`.

What is measured of its models is in its report; here stands whether it went to its end. Its runs
stay in the folder that RUNS names (default: runs), so that it goes on where it was cut off.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from gpu.measures import Measure, holds
from gpu.parts.runs import environment


def measure(device: torch.device, *, small: bool, job: Sequence[str]) -> Iterator[Measure]:
    words = [sys.executable, "-m", "babyllama_ds.cli", "run", *job]
    words += [f"deepspeed.device={device.type}", "--runs", os.environ.get("RUNS", "runs")]
    code = subprocess.run(words, env=environment(), check=False).returncode
    yield holds(f"{job[0]} ran to its end", code == 0, f"status {code}")
