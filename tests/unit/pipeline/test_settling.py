"""What is settled of `auto` is the same on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.pipeline import settling
from babyllama_ds.pipeline.settling import Settling
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.storages import Storages

TRAINING = TrainingSpec(batch_windows=8, micro_batch=2, epochs=1.0, learning_rate=1e-3)
WITHOUT = ("none", "no C++ compiler here")
WITH = ("student", "90 s of matrix products, it pays from 60 s on")


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a rank settles, by its own choice and the other's; and what is kept."""
    (tmp_path / "environment.json").write_text("{}")
    parts = SimpleNamespace(
        job=SimpleNamespace(deepspeed=SimpleNamespace(compile="auto")),
        device=SimpleNamespace(type="cpu"),
        device_kind="cpu",
        shapes_vary=lambda: False,
    )
    speed = SimpleNamespace(products_s=lambda *_: 90.0)
    one = Settling(cast(Any, parts), RunDirectory(tmp_path), Storages(), cast(Any, speed))

    def settle(*of_ranks: tuple[str, str], own: int) -> tuple[str, Any]:
        monkeypatch.setattr(settling, "choose_compiled", lambda *_, **__: of_ranks[own])
        monkeypatch.setattr(ranks, "gather_objects", lambda _: list(of_ranks))
        _, compiled = one.settle("student", nn.Module(), TRAINING, cast(Any, None), None)
        return compiled, json.loads((tmp_path / "settled.json").read_text())

    return settle


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("of_ranks", [(WITH, WITHOUT), (WITHOUT, WITH)], ids=["second", "first"])
def test_a_rank_without_a_compiler_leaves_all_of_them_without(
    of_ranks: tuple[tuple[str, str], ...], own: int, settled: Any
) -> None:
    """Of two nodes one lacks it: its ranks would fail in their first step, the others wait."""
    compiled, kept = settled(*of_ranks, own=own)
    assert compiled == "none"
    assert kept == {"student on 1 cpu ranks": {"compile": "none"}}


def test_where_all_have_one_all_compile(settled: Any) -> None:
    assert settled(WITH, WITH, own=1)[0] == "student"
