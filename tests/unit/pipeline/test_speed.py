"""A card that others hold: measuring its products is the first thing that needs room there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from babyllama_ds.errors import NoRoomError
from babyllama_ds.pipeline import speed as module
from babyllama_ds.pipeline.speed import Speed
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job


def test_a_card_that_is_full_before_the_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.")

    monkeypatch.setattr(module, "measure_matmul_rates", full)
    job = load_job(find_job("nursery"), [])
    setup: Any = SimpleNamespace(
        job=job, models=lambda: [], device=torch.device("cpu"), micro_batch=lambda *_: 4
    )
    corpus: Any = SimpleNamespace(tokenizer=range(300))
    with pytest.raises(NoRoomError) as caught:
        Speed(setup).facts(corpus)
    (problem,) = caught.value.problems
    assert problem.where == "deepspeed.device"
    assert problem.got.startswith("no memory left (CUDA out of memory.")
    assert problem.hint is not None
    assert "another program holds the rest" in problem.hint
