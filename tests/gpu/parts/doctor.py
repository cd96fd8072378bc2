"""What `babyllama-ds doctor --compile` finds: ZeRO-2 on all cards and on CPU ranks, too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from babyllama_ds.doctor.examine import examine
from gpu.measures import Measure


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    with tempfile.TemporaryDirectory() as folder:
        found = examine(Path(folder) / "runs", device.type, compiled=not small)
    for finding in found:
        yield Measure(
            check=finding.check,
            found=finding.found + (f" (remedy: {finding.remedy})" if finding.remedy else ""),
            allowed="no failure",
            passed=finding.status != "failure",
        )
