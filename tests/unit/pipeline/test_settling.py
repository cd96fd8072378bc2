"""What is settled of `auto` is the same on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.losses.heads import Head
from babyllama_ds.pipeline import settling
from babyllama_ds.pipeline.settling import Settling
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.storages import Storages
from babyllama_ds.teachers.cache.tiers import Room
from babyllama_ds.teachers.ensemble import Ensemble, Member

TRAINING = TrainingSpec(batch_windows=8, micro_batch=2, epochs=1.0, learning_rate=1e-3)
WITHOUT = ("none", "no C++ compiler here")
WITH = ("student", "90 s of matrix products, it pays from 60 s on")
SETUP: Any = SimpleNamespace(
    job=SimpleNamespace(deepspeed=SimpleNamespace(compile="auto")),
    device=SimpleNamespace(type="cpu"),
    device_kind="cpu",
    shapes_vary=lambda: False,
)
SPEED: Any = SimpleNamespace(products_s=lambda *_: 90.0)


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a rank settles, by its own choice and the other's; and what is kept."""
    (tmp_path / "environment.json").write_text("{}")
    one = Settling(SETUP, RunDirectory(tmp_path), Storages(), SPEED)

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


def test_a_later_start_does_as_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory or rates are others by then; and every node remembers it."""
    (tmp_path / "environment.json").write_text("{}")
    asked, kept = [], []

    class Nodes(Storages):
        def on_each(self, work: Any) -> list[Any]:
            kept.append("on each")
            return [work()]

    nodes = Nodes(leads=(0, 1), hosts=("a", "b"))
    one = Settling(SETUP, RunDirectory(tmp_path), nodes, SPEED)

    def choose(which: str, **_: Any) -> tuple[str, str]:
        asked.append(which)
        return ("student" if which == "auto" else which), "it pays"

    monkeypatch.setattr(settling, "choose_compiled", choose)
    auto = TRAINING.model_copy(update={"micro_batch": "auto"})
    for found in (4, 2):
        monkeypatch.setattr(one, "_find_micro_batch", lambda *_, found=found: found)
        training, compiled = one.settle("student", nn.Module(), auto, cast(Any, None), None)
        assert (training.micro_batch, compiled) == (4, "student")
    assert asked == ["auto", "student"]
    assert kept == ["on each"] * 2
    known = {"student on 1 cpu ranks": {"micro_batch": 4, "compile": "student"}}
    assert json.loads((tmp_path / "settled.json").read_text()) == known
    assert json.loads((tmp_path / "environment.json").read_text()) == {"settled": known}


GIB = 2**30


@pytest.mark.parametrize(
    ("cache", "host_free", "expected"),
    [
        # 40 windows of 12 tokens: states 8 and 16 wide in fp32, less two teachers' weights
        ("hidden", GIB, 40 * 12 * (8 + 16) * 4 - 61 * (8 + 16) * 4),
        ("hidden", 0, 0),  # read from files
        ("topk", GIB, 40 * 12 * 64 * (4 + 2) - 61 * (8 + 16) * 4),
        ("none", GIB, 0),
    ],
)
def test_a_trial_spares_what_the_cache_will_take(
    cache: Any, host_free: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is filled after the trial, from the same memory, in the shape that the trial finds."""
    loss = DistillationSpec(cache=cache)
    setup = SimpleNamespace(
        job=SimpleNamespace(
            distillation=loss,
            windows=SimpleNamespace(length=12),
            stage_seed=lambda _: 1,
            training_key="{}.training".format,
        ),
        device=torch.device("cpu"),
        dtype=torch.float32,
        within_documents=False,
        windows=lambda *_, **__: SimpleNamespace(num_distinct=40),
        deepspeed_config=lambda *_: {},
        micro_batch=lambda *_: 8,
    )
    happened: list[str] = []

    def live_ensemble(*_: Any, **__: Any) -> Ensemble:
        happened.append("teachers are loaded")
        return Ensemble([Member(name, frozen(width), 1.0) for name, width in (("a", 8), ("b", 16))])

    def frozen(width: int) -> Any:
        module = nn.Linear(width, 61, bias=False)
        head = Head(module.weight)
        return SimpleNamespace(module=module, head=head, destroy=lambda: None)

    def measure_room(*_: Any) -> Room:
        happened.append("room is measured")
        return Room(device=None, device_total=0, host=host_free, disk=0)

    def find_micro_batch(*_: Any, cache_bytes: int, **__: Any) -> int:
        assert cache_bytes == expected
        return 4

    monkeypatch.setattr(settling, "live_ensemble", live_ensemble)
    monkeypatch.setattr(settling, "measure_room", measure_room)
    monkeypatch.setattr(settling, "find_micro_batch", find_micro_batch)
    monkeypatch.setattr(
        settling, "objective_of", lambda *_, **__: SimpleNamespace(release=lambda: None)
    )
    one = Settling(cast(Any, setup), RunDirectory(tmp_path), Storages(), cast(Any, None))
    corpus = SimpleNamespace(tokenizer=range(61))
    teachers = {"a": tmp_path, "b": tmp_path}
    found = one._find_micro_batch("student", nn.Linear(1, 1), TRAINING, cast(Any, corpus), teachers)
    assert found == 4
    assert happened == ["room is measured", "teachers are loaded"][cache == "none" :]
