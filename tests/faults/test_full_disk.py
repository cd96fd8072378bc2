"""A disk that fills while a model is written: nothing of it stays in the way, and the run goes on.

One rank, in this process. The disk is a limit on the size of files; what a full one would have left
no room for is seen in what lies there.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.errors import RunError
from babyllama_ds.pipeline import stages

pytestmark = pytest.mark.usefixtures("process_as_it_was")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_model_that_has_no_room_leaves_none_of_it(
    tmp_path: Path, begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, export = tmp_path / "runs", stages.export_model

    def without_room(*given: Any, **named: Any) -> None:
        with largest_file(8_000):
            export(*given, **named)

    # The teacher's model has no room; then, after the teacher's, the student's.
    ways = iter((without_room, export, without_room, export))
    monkeypatch.setattr(stages, "export_model", lambda *a, **k: next(ways)(*a, **k))
    for _ in range(2):
        with pytest.raises(RunError, match="while writing a model"):
            begin()
        assert [path for path in runs.rglob("*") if ".tmp" in path.name] == []
        assert json.loads((runs / "tiny-1" / "state.json").read_text())["status"] == "failed"
    assert (begin() / "student" / "manifest.json").exists()
