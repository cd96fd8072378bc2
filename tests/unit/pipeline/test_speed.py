"""Measuring products is the first thing that needs room: a machine where there is none is told."""

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


@pytest.mark.parametrize(
    ("width", "largest"), [(64, 3 * 2 * 2048**2), (40_000, 2 * (2 * 838 * 40_000 + 40_000**2))]
)
def test_a_machine_without_room_for_the_first_products_is_told(
    width: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.")

    monkeypatch.setattr(module, "measure_matmul_rates", full)
    job = load_job(
        find_job("nursery"),
        [f"student.model.hidden_size={width}", f"student.model.intermediate_size={width}"],
    )
    setup: Any = SimpleNamespace(
        job=job, models=lambda: [], device=torch.device("cpu"), micro_batch=lambda *_: 64
    )
    corpus: Any = SimpleNamespace(tokenizer=range(300))
    with pytest.raises(NoRoomError) as caught:
        Speed(setup).facts(corpus)
    (problem,) = caught.value.problems
    assert problem.where == "deepspeed.device"
    assert problem.got.startswith("no memory left (CUDA out of memory.")
    assert problem.hint is not None
    assert f"of up to {largest:,} bytes" in problem.hint
    assert "another program" in problem.hint
