"""A run that is killed and started again ends with the student of one that was not.

How far two undisturbed runs differ is measured beside it: on CUDA not every kernel repeats itself
to the bit, and what a resumed run may differ by is that.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.measures import Measure, at_most, holds, told
from gpu.parts.runs import Runs, difference

FACTOR = 2.0
"""Times the difference of two undisturbed runs, where there is one."""


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    with tempfile.TemporaryDirectory(prefix="babyllama-proof-") as folder:
        runs = Runs(Path(folder), device, small=small)
        whole = runs.to_end("whole")
        again = difference(whole, runs.to_end("again"))
        yield told("two undisturbed runs: relative difference of weights", again)
        step = runs.killed("killed", after_step=10 if small else 120)
        yield told("killed after step", float(step))
        resumed = difference(whole, runs.to_end("killed"))
        went_on = re.findall(r"going on from .*step-(\d+)", runs.said("killed"))
        yield holds("went on from a checkpoint", bool(went_on), f"steps {', '.join(went_on)}")
        name = "killed and continued: relative difference of weights"
        yield at_most(name, resumed, FACTOR * again)
