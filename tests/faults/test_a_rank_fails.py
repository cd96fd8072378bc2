"""A rank other than 0 that fails by itself says so in `state.json`, before the others notice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = """
import sys
from pathlib import Path

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.pipeline.running import _state_kept
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.storages import Storages

distributed.start("cpu")
try:
    with _state_kept(RunDirectory(Path(sys.argv[1])), Storages()):
        if ranks.rank() == 1:
            raise MemoryError("not one byte")
        ranks.max_int(0)  # for which rank 1 never comes
finally:
    distributed.stop()
"""


def test_its_error_is_the_run_s(
    tmp_path: Path, start: Callable[..., Any], rank_environments: list[dict[str, str]]
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ended = start([[sys.executable, "-u", script, tmp_path]] * 2, rank_environments).end()
    assert ended.code == 1
    assert "RuntimeError" in ended.err  # of rank 0, whose connection broke off
    state = json.loads((tmp_path / "state.json").read_text())
    assert state == {"status": "failed", "error": "MemoryError: not one byte", "rank": 1}
