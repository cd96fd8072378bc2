"""Where ranks compute together, one that hangs leaves the others waiting: they say so.

After ten minutes, which no test waits for: the ranks are started with less patience.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.heartbeat import Heartbeat
from babyllama_ds.pipeline import measuring
from babyllama_ds.teachers.cache import opening
from babyllama_ds.training import loop

IMPATIENT = """
import os
import runpy
import sys
from babyllama_ds import heartbeat

class Impatient(heartbeat.Heartbeat):
    def __init__(self, name):
        super().__init__(name, first_s=2.0)
    def __enter__(self):
        print("rank", os.environ["RANK"], "watches", self._name, file=sys.stderr, flush=True)
        return super().__enter__()

heartbeat.Heartbeat = Impatient  # before anything imports it
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_batch_is_a_sign_of_life(
    begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else long work that goes on would be told of as one that hangs."""
    told: dict[str, list[str]] = {}

    class Watched(Heartbeat):
        def beat(self, what: str) -> None:
            told.setdefault(self._name, []).append(what)
            super().beat(what)

    for module in (loop, opening, measuring):
        monkeypatch.setattr(module, "Heartbeat", Watched)
    words = ("distillation.cache=hidden", "windows.offsets={phases: 1}")
    begin(*words, "evaluation.batch_tokens=64")  # of eight windows, two each
    batches = [f"batch {number} of 4" for number in (1, 2, 3, 4)]
    last = [f"{batch} of the evaluation at step 6" for batch in batches]
    assert told["teachers/one"][-5:] == [*last, "the checkpoint of step 6"]
    assert told["evaluation of one"] == told["evaluation of student"] == batches
    assert told["cache of teachers/one"][-1] == "a forward pass"
    told.clear()
    begin(*words, "name=again", "distillation.alpha=0.25")  # the cache is there, and read whole
    shards = told["cache of teachers/one"]
    assert shards == [f"reading shard {number}" for number in range(len(shards))]


@pytest.mark.launch
def test_the_rank_that_waits_for_one_that_hangs_says_so(
    tmp_path: Path,
    smallest_job: Callable[..., Path],
    start: Callable[..., Any],
    rank_environments: list[dict[str, str]],
) -> None:
    """After training, in an evaluation that would take long."""
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    job = smallest_job(tmp_path / "job", evaluation={"batch_tokens": 32})  # a window
    dev = tmp_path / "job" / "town.dev"
    dev.write_text(dev.read_text(encoding="utf-8") * 1500, encoding="utf-8")
    runs = tmp_path / "runs"
    words = [sys.executable, "-u", script, "launcher/run.py"]
    running = start(
        [[*words, f"--local_rank={rank}", job, "--runs", runs] for rank in range(2)],
        rank_environments,
    )
    watched = "rank 0 watches evaluation of one"
    running.wait_until(lambda: watched in running.said(), "an evaluation")
    hanging = running.pid_of("--local_rank=1")
    os.kill(hanging, signal.SIGSTOP)
    warning = re.compile(r"evaluation of one: nothing more in the .* minutes since")
    try:
        running.wait_until(lambda: warning.search(running.said()), "a warning")
    finally:
        os.kill(hanging, signal.SIGCONT)
    running.signal_all(signal.SIGTERM)
    ended = running.end()
    assert ended.code == 128 + signal.SIGTERM
    state = json.loads((runs / "tiny-1" / "state.json").read_text())
    assert state == {"status": "stopped", "reason": "SIGTERM", "at": None}
