"""Leaving the process group leaves nothing behind that could abort the process at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Gloo's threads free Python objects: one that still runs when the interpreter ends aborts the
# process, some of the time ("terminate called without an active exception", status 134).
RANK = """
from pathlib import Path

import torch.distributed

from babyllama_ds import ranks
from babyllama_ds.engine import distributed


def gloo_threads() -> int:
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


distributed.start("cpu")
ranks.broadcast_object("something")
cycle = [torch.distributed.group.WORLD]
cycle.append(cycle)  # as in an engine
del cycle
before = gloo_threads()
distributed.stop()
print(before > 0, gloo_threads())
"""


def test_no_thread_of_gloo_outlives_its_group(
    tmp_path: Path, start: Callable[..., Any], rank_environments: list[dict[str, str]]
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ended = start([[sys.executable, "-u", script]] * 2, rank_environments).end()
    ended.assert_done()
    assert ended.out.splitlines() == ["True 0", "True 0"]
