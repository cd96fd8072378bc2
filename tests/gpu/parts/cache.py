"""A cache of the teachers' states gives the same student from every memory, to the bit.

In the card's memory (`cache_tier: device`), in the host's, and in files; without a cache the
teachers run live, in other batches perhaps, which is told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.measures import Measure, at_most, holds, told
from gpu.parts.runs import Runs, difference

READ = {
    "device": "read in the device's memory",
    "host": "read in the host's memory",
    "disk": "read in files",
}


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    with tempfile.TemporaryDirectory(prefix="babyllama-proof-") as folder:
        runs = Runs(Path(folder), device, small=small)
        cached = ["distillation.cache=hidden"]
        students = {}
        for tier, words in READ.items():
            overrides = [*cached, f"distillation.cache_tier={tier}"]
            students[tier] = runs.to_end(tier, overrides)
            if tier == "device" and device.type == "cpu":
                words = READ["host"]  # one memory
            yield holds(f"{tier}: read from there", words in runs.said(tier), words)
        again = difference(
            students["disk"], runs.to_end("again", [*cached, "distillation.cache_tier=disk"])
        )
        yield told("two runs from files: relative difference of weights", again)
        for tier in ("device", "host"):
            apart = difference(students["disk"], students[tier])
            yield at_most(f"{tier} and files: relative difference of weights", apart, 2 * again)
        live = difference(students["disk"], runs.to_end("live"))
        yield told("without a cache: relative difference of weights", live)
