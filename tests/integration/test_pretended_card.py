"""Steps and evaluations on a card that is not there (`pretended`): no tensor of the CPU comes among
those of the card, and the host waits once.

Steps wait for the gradient's norm, evaluations for their sums (docs/decisions/host-overhead.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pretended import card

ROOT = Path(__file__).resolve().parents[2]
STEPS = ROOT / "tests" / "pretended" / "steps.py"

pytestmark = [
    pytest.mark.skipif(card.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch speaks for real cards"),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Any]]:
    """What was found in each case, in a process that believes in the card."""
    library = card.build(tmp_path_factory.mktemp("card"))
    own = ("DS_ACCELERATOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in own}
    done = subprocess.run(
        [sys.executable, str(STEPS), str(library)],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("name"): line for line in lines}


def test_the_card_refuses_and_counts(cases: Mapping[str, Mapping[str, Any]]) -> None:
    """An `item`, a boolean mask (its places and the index), pageable memory, a copy back."""
    assert cases["planted"] == {"waits": {"steps.py": 5, "synchronize": 1}}
    assert "Expected all tensors to be on the same device" in cases["mixed"]["error"]


def test_what_is_computed_for_the_card_stays_on_it(
    cases: Mapping[str, Mapping[str, Any]],
) -> None:
    assert cases["filling the card"] == {"waits": {}}


def test_a_classifier_learns_without_a_wait_and_answers_with_one(
    cases: Mapping[str, Mapping[str, Any]],
) -> None:
    assert cases["classifier, learning"] == {"waits": {}}
    assert cases["classifier"] == {"waits": {"classifier.py": 1}}


@pytest.mark.parametrize(
    ("kind", "where"),
    [("step", "lean.py"), ("evaluation", "cross_entropy.py"), ("sentences", "sentences.py")],
)
def test_the_host_waits_once(kind: str, where: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
    of_kind = {name: found for name, found in cases.items() if name.startswith(kind)}
    assert of_kind
    assert of_kind == {name: {"waits": {where: 1}} for name in of_kind}
