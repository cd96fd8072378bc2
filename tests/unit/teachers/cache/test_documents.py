"""Teachers that keep documents apart: remembered, they give what live ones give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.starts import ON_DISK
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.losses.topk import top_k_targets
from babyllama_ds.models.documents import Pieces
from babyllama_ds.spec.corpus import Phases
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.cache.opening import CacheContext
from babyllama_ds.teachers.cache.remembered import remembered_ensemble
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import MicroBatch, micro_batch

STARTS = np.array([0, 4, 5, 17, 33, 60, 61, 62, 111, 250, 388], ON_DISK)
NUMBERS = np.array([0, 11, 40])


@pytest.fixture
def apart(seen: TeacherInput) -> TeacherInput:
    """The windows of `seen`, in which documents are kept apart."""
    stream = np.fromfile(seen.tokens_dir / "train-00000.bin", "<u2")
    index: dict[str, Any] = {"vocab_size": 61, "splits": {"train": {}}}
    shards = TokenShards(index, {"train": [stream]}, {"train": [STARTS]})
    windows = TrainWindows(
        shards, length=10, offsets=Phases(phases=2), seed=0, within_documents=True
    )
    return replace(seen, windows=windows)


def micro(seen: TeacherInput) -> MicroBatch:
    begins_BS = seen.windows.numbered_begins(NUMBERS)
    return micro_batch(
        torch.from_numpy(seen.windows.numbered(NUMBERS)),
        torch.ones(len(NUMBERS), dtype=torch.bool),
        NUMBERS,
        NUMBERS[:0],
        None if begins_BS is None else Pieces.of(begins_BS),
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_are_the_live_ones_to_the_bit(
    kind: str,
    teacher_of: Callable[..., Teacher],
    seen: TeacherInput,
    apart: TeacherInput,
    context: CacheContext,
) -> None:
    teacher = teacher_of(kind)
    live = Ensemble([Member(teacher.name, teacher.load(), 1.0)])
    loss = DistillationSpec(cache="hidden")
    (whole,) = live.states(micro(seen))
    (expected,) = live.states(micro(apart))
    assert not torch.equal(whole.hidden_ND, expected.hidden_ND)
    # Beside a cache of whole windows, which is another one.
    remembered_ensemble(loss, [teacher], seen, context).destroy()
    (found,) = remembered_ensemble(loss, [teacher], apart, context).states(micro(apart))
    assert torch.equal(found.hidden_ND, expected.hidden_ND)


def test_the_most_likely_tokens_are_those_of_the_live_ones(
    teacher_of: Callable[..., Teacher],
    apart: TeacherInput,
    context: CacheContext,
    tiny_model: Callable[..., Any],
) -> None:
    teachers = [teacher_of("llama", seed=1), teacher_of("gpt2", seed=2)]
    loss = DistillationSpec(cache="topk", cache_top_k=9)
    live = Ensemble([Member(one.name, one.load(), 1.0) for one in teachers])
    expected = top_k_targets(
        live.states(micro(apart)), k=9, temperature=2.0, mean_of="logits", vocab_size=61
    )
    ensemble = remembered_ensemble(loss, teachers, apart, context)
    found: Any = ensemble.targets(micro(apart))
    assert torch.equal(found.token_ids_NK, expected.token_ids_NK)
    assert torch.equal(found.log_probs_NK, expected.log_probs_NK)
    # With all tokens kept there is no error.
    every = DistillationSpec(cache="topk", cache_top_k=61)
    facts = remembered_ensemble(every, teachers, apart, context).closing_facts(
        tiny_model("llama").to(torch.bfloat16)
    )
    assert facts["topk"]["relative_kl_error"] < 1e-3
    assert facts["topk"]["gradient_cosine"] > 0.999
    # A student that is its only teacher gives what it gives, for it sees the same documents.
    twin = tiny_model("llama", seed=1).to(torch.bfloat16)
    facts = remembered_ensemble(every, teachers[:1], apart, context).closing_facts(twin)
    assert facts["topk"]["exact_kl"] < 1e-3


def test_it_is_part_of_the_key(
    teacher_of: Callable[..., Teacher], seen: TeacherInput, apart: TeacherInput
) -> None:
    teacher = teacher_of()
    assert seen.key(teacher) != apart.key(teacher)
