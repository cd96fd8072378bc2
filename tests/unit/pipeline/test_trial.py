"""What a trial counts; that it measures is tried whole (`integration/test_plan_measure.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from babyllama_ds.corpus.prepare import Corpus, CorpusEntries
from babyllama_ds.pipeline.parts import Parts
from babyllama_ds.pipeline.trial import _Trial
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.stopping import StopRequest


@pytest.mark.parametrize(
    ("limit", "counted"),
    [("{max_pairs_per_task: 2}", 2), ("{max_pairs_per_task: 7}", 7), ("{}", 4)],
)
def test_pairs_of_milestones_are_counted_by_their_own_limit(
    limit: str, counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be more than finished models are measured on."""
    pair = {"sentence_good": "the dogs sleep", "sentence_bad": "the dogs sleeps"}
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "task.jsonl").write_text(9 * (json.dumps(pair) + "\n"))
    entries = CorpusEntries(
        tokenizer_dir=tmp_path,
        tokenizer_key="t",
        tokens_dir=tmp_path,
        tokens_key="t",
        pairs_dir=tmp_path / "pairs",
    )
    nothing = cast(Any, None)
    corpus = Corpus(entries=entries, tokenizer=nothing, shards=nothing, byte_lengths=nothing)
    asked = ["evaluation.max_pairs_per_task=4", f"evaluation.milestones={limit}"]
    job = load_job(find_job("nursery"), ["student.milestones=[9]", *asked])
    monkeypatch.setattr(_Trial, "_stage", lambda *_: (None, tmp_path))
    monkeypatch.setattr(_Trial, "_evaluation", lambda *_: None)
    parts = Parts(job, torch.device("cpu"))
    pace = _Trial(parts, corpus, nothing, tmp_path / "scratch", StopRequest(), 1.0).run()
    assert (pace.num_pairs, pace.num_milestone_pairs) == (4, counted)
