"""On a GPU: the parts of the proof that are quick; every measure is within its bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "part", ["losses", "modules", "attention", "compiled", "zero2", "teachers", "resume", "cache"]
)
def test_part(part: str) -> None:
    """In a process of its own: a kernel that fails takes the card's context with it."""
    script = Path(__file__).with_name("proof.py")
    done = subprocess.run(
        [sys.executable, script, "--part", part, "--device", "cuda"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"measure"')]
    measures = [json.loads(line)["measure"] for line in lines]
    assert measures
    assert not [measure for measure in measures if not measure["passed"]]
