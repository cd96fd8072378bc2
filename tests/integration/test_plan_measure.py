"""`plan --measure` on a tiny job: everything is measured, and nothing but the text is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_job_is_tried_out(
    tiny_job: Callable[..., Path], run_alone: Callable[..., Any], tmp_path: Path
) -> None:
    job, runs = tiny_job(tmp_path / "job"), tmp_path / "runs"
    words = ["plan", job, "--measure", "--seconds", 1, "--json", "--runs", runs]
    ended = run_alone(*words, "--within", 0.01)
    assert ended.code == 2, ended.err
    assert "--within, tiny-1 on this machine" in ended.err
    plan = json.loads(ended.out)
    measured = plan["measured"]
    stages = ("teachers/gpt2", "teachers/llama", "student", "control")
    assert tuple(measured["stages"]) == stages
    milestones = ("milestones of student", "milestones of control")
    assert tuple(measured["evaluations"]) == (*stages, *milestones)
    for stage in measured["stages"].values():
        parts = stage["parts"]
        assert parts["steps"] == 24 * stage["step_s"] > 0
        assert parts["evaluations"] > 0
        assert parts["checkpoints"] > 0
        assert parts["export"] > 0
        assert parts["start"] >= 0
    assert min(measured["before"].values()) > 0
    assert min(measured["evaluations"].values()) > 0
    assert plan["corpus"]["source"] == "store"
    # The prepared text, for a run to find, and nothing else.
    assert [path.name for path in runs.iterdir()] == ["store"]
    kinds = {path.name for path in (runs / "store").iterdir() if path.is_dir()}
    assert kinds == {"tokenizers", "tokens"}
