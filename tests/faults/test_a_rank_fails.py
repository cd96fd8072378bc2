"""A rank that fails by itself says so in `state.json`, whichever it is, before others notice.

Of one that was killed the others say that it is gone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RANK = """
import os
import signal
import sys
from pathlib import Path

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.pipeline.running import _state_kept
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.storages import Storages

folder, victim, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.start("cpu")
try:
    with _state_kept(RunDirectory(folder), Storages()):
        if ranks.rank() == victim and way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank() == victim:
            raise MemoryError("not one byte")
        ranks.max_int(0)  # for which the other never comes
finally:
    distributed.stop()
"""

UNREADABLE = """
import sys
from pathlib import Path
from types import SimpleNamespace

from babyllama_ds import ranks
from babyllama_ds.cli import exit_code_of
from babyllama_ds.engine import distributed
from babyllama_ds.errors import DataError
from babyllama_ds.pipeline.measuring import Measurer
from babyllama_ds.spec.evaluation import EvaluationSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store

folder = Path(sys.argv[1])

def read(*_, **__):
    if ranks.rank() == 1:
        raise DataError.of("a file", got="EIO", expected="a readable file")
    return {}

def nothing(*_, **__):
    return {}

def measure():
    distributed.start("cpu")
    try:
        setup = SimpleNamespace(
            job=SimpleNamespace(
                teachers=(),
                student=SimpleNamespace(model=None),
                evaluation=EvaluationSpec(dev_windows=None),
            ),
            device=None,
            device_kind="cpu",
            attention=lambda *_, **__: "sdpa",
            dev_windows=lambda *_: None,
            **{"benchmarks": nothing, "suites": nothing, sys.argv[2]: read},
        )
        corpus = SimpleNamespace(tokenizer=None)
        Measurer(setup, Store(folder), StopRequest()).measure("student", folder, corpus, "f" * 64)
    finally:
        distributed.stop()

sys.exit(exit_code_of(measure))
"""


Fail = Callable[[int, str], dict[str, Any]]


@pytest.fixture
def fail(
    tmp_path: Path, start: Callable[..., Any], rank_environments: list[dict[str, str]]
) -> Fail:
    """Let a rank of two end in a way; the state that is left."""

    def run(victim: int, way: str) -> dict[str, Any]:
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        # Both are to end with the same status, also where one is killed.
        command = ["sh", "-c", '"$@"; exit 1', "sh", sys.executable, "-u", script]
        ended = start([[*command, tmp_path, victim, way]] * 2, rank_environments).end()
        assert "RuntimeError" in ended.err  # of the other, whose connection broke off
        return dict(json.loads((tmp_path / "state.json").read_text()))

    return run


def test_the_error_of_the_rank_that_failed_is_the_run_s(fail: Fail) -> None:
    state = fail(1, "failed")
    assert state == {"status": "failed", "error": "MemoryError: not one byte", "rank": 1}


@pytest.mark.parametrize("victim", [0, 1])
def test_of_a_rank_that_was_killed_the_other_tells(fail: Fail, victim: int) -> None:
    state = fail(victim, "killed")
    assert state.keys() == {"status", "error"}
    assert state["status"] == "failed"
    assert state["error"].startswith("another rank ended: it was killed, or ran out of memory (")


@pytest.mark.parametrize("what", ["benchmarks", "suites"])
def test_what_one_rank_cannot_read_ends_all_with_its_name(
    what: str, tmp_path: Path, start: Callable[..., Any], rank_environments: list[dict[str, str]]
) -> None:
    """Read again hours after the checks: a disk of another node may be gone by then."""
    script = tmp_path / "rank.py"
    script.write_text(UNREADABLE)
    ended = start([[sys.executable, "-u", script, tmp_path, what]] * 2, rank_environments).end()
    assert ended.err.count("error: a file: got EIO, expected a readable file") == 1
    assert "Traceback" not in ended.err
