"""What a step costs the host: what counts as an operator, to which part, and that sides answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import host  # noqa: E402 - found by the line above

CPU = torch.device("cpu")


def test_operators_count_where_they_run_and_views_do_not() -> None:
    parts = host.HostParts(CPU)
    weights = torch.ones(6, requires_grad=True)
    with host.Counted(parts):
        with parts.part("loss"):
            loss = (weights.view(2, 3)[0] * 2).sum()
            with parts.part("teachers"):
                torch.empty(3)
                torch._foreach_add_([torch.empty(2), torch.empty(3)], 1.0)
        torch.zeros(2)
    assert parts.operators == {"loss": 2, "teachers": 1, host.OTHER: 1}
    with host.Counted(parts), parts.part("backward"):
        loss.backward()
    assert parts.operators["backward"] > 2, "not seen below autograd"


def test_a_part_is_its_own_time_on_the_processor() -> None:
    parts = host.HostParts(CPU)
    with parts.part("loss"):
        time.sleep(0.2)
        with parts.part("teachers"):
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
    assert parts.seconds["teachers"] >= 0.05
    assert parts.seconds["loss"] < 0.05, "sleeping costs nothing, and what is inside is not of it"


@pytest.mark.launch
def test_sides_take_turns(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the textbook's trainer needs it")
    sides = ["ours", "plain", "textbook"]
    out = tmp_path / "host.json"
    words = ["--rounds", "1", "--steps", "2", "--layers", "1", "1", "--students", "two teachers"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "host.py", *words, "--sides", *sides, "--out", out],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())["measured"]["two teachers"]
    assert list(measured) == sides
    for side in sides:
        facts = measured[side]
        assert side in done.stdout
        for part in ("data", "teachers", "student forward", "loss", "backward", "optimizer"):
            assert facts["parts_ms"][part] > 0, (side, part)
            assert facts["operators"][part] > 0, (side, part)
    # The same computation: only what DeepSpeed and the update do may differ.
    ours, plain = (measured[side]["operators"] for side in ("ours", "plain"))
    assert {part: ours[part] for part in ("teachers", "student forward", "loss")} == {
        part: plain[part] for part in ("teachers", "student forward", "loss")
    }
