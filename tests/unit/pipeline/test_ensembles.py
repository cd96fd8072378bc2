"""The memory that a cache will take, told before it is made, against the records themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.errors import MachineError, ModelError
from babyllama_ds.losses.distillation import TopKTargets
from babyllama_ds.pipeline import ensembles
from babyllama_ds.pipeline.ensembles import cache_to_come, frozen_teacher
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.teachers.cache.tiers import Room
from babyllama_ds.teachers.cache.topk import packed

WINDOWS, LENGTH, VOCAB, WIDTHS = 11, 7, 301, (24, 6)
PARAMETERS = 5
"""Of the student."""


def to_come(room: Room, *overrides: str, live_bytes: int = 0) -> int:
    job = load_job(
        find_job("nursery"),
        ["windows.offsets={phases: 2}", *(f"distillation.{one}" for one in overrides)],
    )
    job = job.model_copy(update={"windows": job.windows.model_copy(update={"length": LENGTH})})
    setup: Any = SimpleNamespace(
        job=job,
        dtype=torch.bfloat16,
        windows=lambda _corpus, seed: SimpleNamespace(num_distinct=WINDOWS),
    )
    heads = [SimpleNamespace(weight_PD=torch.empty(VOCAB, width)) for width in WIDTHS]
    live: Any = SimpleNamespace(
        members=[SimpleNamespace(head=head) for head in heads], weight_bytes=lambda: live_bytes
    )
    student = nn.Linear(PARAMETERS, 1, bias=False)
    corpus: Any = SimpleNamespace(tokenizer=range(VOCAB))
    return cache_to_come(setup, student, corpus, live, room)


def room(**changes: Any) -> Room:
    """A CPU's, with more than enough of everything."""
    return Room(**{"device": None, "device_total": 0, "host": 10**9, "disk": 10**12} | changes)


def hidden_bytes(width: int) -> int:
    """Of all windows' states; a record fills whole words of 8 bytes."""
    states_SD = torch.empty(LENGTH, width, dtype=torch.bfloat16)
    return WINDOWS * (states_SD.nbytes + -states_SD.nbytes % 8)


def test_without_a_cache_there_is_none() -> None:
    assert to_come(room(), "cache=none") == 0


def test_hidden_states_of_all_teachers() -> None:
    both = sum(map(hidden_bytes, WIDTHS))
    assert to_come(room(), "cache=hidden") == both
    # The live teachers are gone by then, and their room is free.
    assert to_come(room(), "cache=hidden", live_bytes=100) == both - 100
    assert to_come(room(), "cache=hidden", live_bytes=2 * both) == 0


def test_one_record_of_the_likeliest_for_all_teachers() -> None:
    k = 3
    targets = TopKTargets(
        token_ids_NK=torch.zeros(WINDOWS * LENGTH, k, dtype=torch.int64),
        log_probs_NK=torch.zeros(WINDOWS * LENGTH, k),
    )
    expected = packed(targets, WINDOWS, VOCAB).nbytes
    assert to_come(room(), "cache=topk", f"cache_top_k={k}") == expected


def test_what_lies_elsewhere_takes_none_of_it() -> None:
    """On the disk, or in the host's memory where a card trains."""
    assert to_come(room(), "cache=hidden", "cache_tier=disk") == 0
    card = room(device=10**6, device_total=10**6)
    assert to_come(card, "cache=hidden", "cache_tier=host") == 0
    assert to_come(card, "cache=hidden", "cache_tier=device") == sum(map(hidden_bytes, WIDTHS))


def test_the_second_teachers_has_the_room_that_the_firsts_left() -> None:
    first, second = map(hidden_bytes, WIDTHS)
    spared = 18 * PARAMETERS  # of the student, in training
    card = room(device=first + spared, device_total=0)
    assert to_come(card, "cache=hidden") == first  # the second lies in the host's memory
    card = room(device=first + second + spared, device_total=0)
    assert to_come(card, "cache=hidden") == first + second


def test_a_tier_that_was_asked_for_by_name_must_fit() -> None:
    with pytest.raises(MachineError, match=r"distillation\.cache_tier"):
        to_come(room(host=100), "cache=hidden", "cache_tier=host")


@pytest.mark.parametrize("own", [0, 1])
def test_a_teacher_that_one_rank_cannot_load_is_an_error_of_all(
    own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose host has no memory left, say: by itself it would end without a word, as errors of
    this kind are told by rank 0, and the others with one of the network."""
    error = ModelError.of("teachers/llama", got="no memory", expected="room for it")

    def load(*_: Any, **__: Any) -> nn.Module:
        if own == 1:
            raise error
        return nn.Module()

    of_ranks = [None, ranks._Failure(1, error, "ModelError", str(error))]
    monkeypatch.setattr(ensembles, "load_model", load)
    monkeypatch.setattr(ensembles, "FrozenModel", lambda *_, **__: "a model")
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "max_int", lambda _: 1)
    monkeypatch.setattr(ranks, "gather_objects", lambda _: of_ranks)
    setup: Any = SimpleNamespace(
        attention=lambda *_, **__: "sdpa", device="cpu", dtype=torch.float32, group=lambda _: None
    )
    spec = load_job(find_job("nursery")).teachers[0]
    with pytest.raises(ModelError, match="no memory"):
        frozen_teacher(setup, spec, tmp_path)
