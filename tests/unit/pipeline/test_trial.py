"""What a trial counts of a job, beside what it times."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from babyllama_ds.pipeline.parts import Parts
from babyllama_ds.pipeline.trial import _Trial
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job


@pytest.mark.parametrize(
    ("asked", "of_models", "of_milestones"),
    [
        (["milestones={}"], 12, 12),
        (["milestones={max_pairs_per_task: 4}"], 12, 7),
        (["milestones={max_pairs_per_task: 4}", "max_pairs_per_task=2"], 4, 7),
        (["milestones={}", "max_pairs_per_task=2"], 4, 4),
        (["milestones=null"], 12, 0),
    ],
)
def test_pairs_of_milestones_may_be_more_than_those_of_models(
    asked: list[str], of_models: int, of_milestones: int, tmp_path: Path
) -> None:
    """Of a task of nine pairs and one of three."""
    pair = json.dumps({"sentence_good": "a b", "sentence_bad": "b a"}) + "\n"
    for name, number in (("long", 9), ("short", 3)):
        (tmp_path / f"{name}.jsonl").write_text(number * pair)
    overrides = ["student.milestones=[9]", *(f"evaluation.{one}" for one in asked)]
    trial: Any = SimpleNamespace(
        parts=Parts(load_job(find_job("nursery"), overrides), torch.device("cpu")),
        corpus=SimpleNamespace(entries=SimpleNamespace(pairs_dir=tmp_path)),
        _stage=lambda *_: (None, tmp_path),
        _evaluation=lambda *_: None,
    )
    pace = _Trial.run(cast(_Trial, trial))
    assert (pace.num_pairs, pace.num_milestone_pairs) == (of_models, of_milestones)
