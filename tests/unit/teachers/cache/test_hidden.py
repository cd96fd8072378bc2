"""A remembered teacher gives what the live one gives, to the bit in the same shape."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.errors import ModelError
from babyllama_ds.models.build import load_model
from babyllama_ds.models.documents import Pieces
from babyllama_ds.teachers.cache import hidden
from babyllama_ds.teachers.cache.hidden import RememberedMember, remember
from babyllama_ds.teachers.cache.opening import CacheContext
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import MicroBatch, micro_batch


def micro(windows: TrainWindows, numbers: list[int], following: list[int]) -> MicroBatch:
    numbers_B = np.array(numbers, np.int64)
    return micro_batch(
        torch.from_numpy(windows.numbered(numbers_B)),
        torch.ones(len(numbers), dtype=torch.bool),
        numbers_B,
        np.array(following, np.int64),
    )


def shuffled_micros(windows: TrainWindows, size: int) -> list[MicroBatch]:
    """Every distinct window once, in passes of `size`, the last one filled with window 0."""
    assert windows.num_distinct is not None
    order = np.random.default_rng(3).permutation(windows.num_distinct)
    order = np.append(order, np.zeros(-len(order) % size, np.int64)).reshape(-1, size).tolist()
    return [micro(windows, a, b) for a, b in zip(order, [*order[1:], []], strict=True)]


@pytest.mark.parametrize("tier", ["host", "disk", "device", "auto"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_the_same_shape_it_is_the_live_teacher_to_the_bit(
    kind: str,
    tier: Literal["host", "disk", "device", "auto"],
    teacher_of: Callable[..., Teacher],
    seen: TeacherInput,
    context: CacheContext,
) -> None:
    teacher = teacher_of(kind, weight=2.5)
    live = Ensemble([Member(teacher.name, teacher.load(), teacher.weight)])
    remembered = Ensemble([remember(teacher, seen, replace(context, tier=tier))])
    for batch in shuffled_micros(seen.windows, seen.forward_windows):
        (one,), (two,) = live.targets(batch), remembered.targets(batch)
        assert two.hidden_ND.dtype == torch.bfloat16
        assert torch.equal(one.hidden_ND, two.hidden_ND)
        assert torch.equal(one.head.weight_PD, two.head.weight_PD)
        assert one.weight == two.weight == 2.5
    remembered.destroy()
    assert remembered.members == ()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_another_shape_it_is_within_the_live_teachers_own_variation(
    kind: str, teacher_of: Callable[..., Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    """Computed in threes and asked for in other shapes, it is as far from the live teacher as the
    live teacher is from itself (at this width a CPU's bf16 kernels do round differently), and as
    close to the exact states."""
    wide = {"llama": {"hidden_size": 384}, "gpt2": {"n_embd": 384}}[kind]
    teacher = teacher_of(kind, **wide)
    frozen = Member("live", teacher.load(), 1.0)
    live = {size: _all(frozen, seen.windows, size) for size in (1, 3, 5, 16)}
    member = remember(teacher, seen, context)
    exact = _exact(teacher, seen.windows)
    spread = max(_distance(one, two) for one in live.values() for two in live.values())
    for size in live:
        ours = _all(member, seen.windows, size)
        assert max(_distance(ours, states) for states in live.values()) <= spread
        assert _distance(ours, exact) <= max(_distance(states, exact) for states in live.values())


def _distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


def _all(member: Any, windows: TrainWindows, size: int) -> torch.Tensor:
    """States [M * S, D] of all windows, in order, asked for in passes of `size`."""
    parts = np.split(np.arange(80), np.arange(size, 80, size))
    passes = [member.states(micro(windows, p.tolist(), [])) for p in parts]
    return torch.cat([states.hidden_ND for states in passes]).double()


def _exact(teacher: Teacher, windows: TrainWindows) -> torch.Tensor:
    from babyllama_ds.models.parts import split_causal_lm

    model = load_model(str(teacher.model_dir), attention="eager", where="test").double().eval()
    with torch.no_grad():
        backbone, _ = split_causal_lm(model)
        return backbone(torch.from_numpy(windows.numbered(np.arange(80)))).flatten(0, 1).double()


def test_records_need_not_be_whole_words(
    teacher_of: Callable[..., Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    """Ten positions of 15 numbers are 300 bytes: a record has four more."""
    teacher = teacher_of("gpt2", n_embd=15)
    live = Member("live", teacher.load(), 1.0)
    remembered = remember(teacher, seen, context)
    batch = micro(seen.windows, [79, 3, 41], [])
    found_ND = remembered.states(batch).hidden_ND
    assert found_ND.shape == (3 * 10, 15)
    assert torch.equal(found_ND, live.states(batch).hidden_ND)


def test_the_windows_of_the_next_pass_are_read_ahead(
    teacher_of: Callable[..., Teacher],
    seen: TeacherInput,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remembered = remember(teacher_of(), seen, context)
    expected: list[NDArray[np.int64]] = []
    monkeypatch.setattr(remembered.records, "expect", expected.append)
    remembered.states(micro(seen.windows, [5, 2, 70], [7, 3]))
    assert [numbers.tolist() for numbers in expected] == [[7, 3]]


def test_at_the_end_the_records_are_freed(
    teacher_of: Callable[..., Teacher],
    seen: TeacherInput,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are files held open, or much of the device's memory."""
    remembered = remember(teacher_of(), seen, context)
    closed: list[bool] = []
    monkeypatch.setattr(remembered.records, "close", lambda: closed.append(True))
    remembered.destroy()
    assert closed == [True]


@pytest.mark.parametrize("number", [1, 2])
def test_for_a_split_teacher_ranks_go_in_step(
    number: int,
    teacher_of: Callable[..., Teacher],
    seen: TeacherInput,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_step: list[bool] = []
    monkeypatch.setattr(hidden, "open_cache", lambda wanted, *_: in_step.append(wanted.in_step))
    remember(replace(teacher_of(), tensor_parallel=number), seen, context)
    assert in_step == [number == 2]


def test_it_is_computed_once_and_the_teacher_is_not_loaded_again(
    teacher_of: Callable[..., Teacher],
    counted: Callable[[Teacher], Any],
    seen: TeacherInput,
    context: CacheContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = counted(teacher_of()), counted(teacher_of())
    with caplog.at_level(logging.INFO, "babyllama_ds"):
        remember(first.teacher, seen, context)
    assert (first.loads, first.passes) == (1, 27)  # 80 windows in threes
    assert "cache of teachers/llama-0: computing 27 of 27 shards" in caplog.text
    remember(second.teacher, seen, context)
    assert (second.loads, second.passes) == (0, 0)


def test_the_cache_of_another_teacher_is_not_used(
    teacher_of: Callable[..., Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    remember(teacher_of(seed=0), seen, context)
    other = replace(teacher_of(seed=1), name="llama-0")
    batch = micro(seen.windows, [5, 2, 70], [])
    live_ND = Member("live", other.load(), 1.0).states(batch).hidden_ND
    assert torch.equal(remember(other, seen, context).states(batch).hidden_ND, live_ND)


def test_the_cache_of_other_data_is_not_used(
    teacher_of: Callable[..., Teacher],
    seen: TeacherInput,
    context: CacheContext,
    other_seen: TeacherInput,
) -> None:
    teacher = teacher_of()
    remember(teacher, seen, context)
    batch = micro(other_seen.windows, [5, 2, 70], [])
    assert not torch.equal(batch.input_ids_BS, micro(seen.windows, [5, 2, 70], []).input_ids_BS)
    live_ND = Member("live", teacher.load(), 1.0).states(batch).hidden_ND
    assert torch.equal(remember(teacher, other_seen, context).states(batch).hidden_ND, live_ND)


def test_only_the_head_is_kept(
    teacher_of: Callable[..., Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    models: list[weakref.ref[FrozenModel]] = []
    plain = teacher_of()

    def load() -> FrozenModel:
        model = plain.load()
        models.append(weakref.ref(model))
        return model

    member: RememberedMember = remember(replace(plain, load=load), seen, context)
    gc.collect()
    assert [model() for model in models] == [None]
    assert member.head.weight_PD.shape == (61, 24)


def test_a_teacher_that_changes_its_logits_is_refused(
    teacher_of: Callable[..., Teacher],
    seen: TeacherInput,
    context: CacheContext,
    tmp_path: Path,
) -> None:
    config = Gemma2Config(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        final_logit_softcapping=3.0,
    )
    Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "gemma2")

    def load() -> FrozenModel:
        path = str(tmp_path / "gemma2")
        model = load_model(path, attention="eager", where="test", dtype=torch.bfloat16)
        return FrozenModel(model, device=torch.device("cpu"), dtype=torch.bfloat16)

    gemma2 = replace(teacher_of(), model_dir=tmp_path / "gemma2", load=load)
    with pytest.raises(ModelError) as caught:
        remember(gemma2, seen, context)
    (problem,) = caught.value.problems
    assert problem.where == "teachers/llama-0"
    assert problem.hint == "set distillation.cache=topk or none"


def test_states_that_are_not_finite_name_the_teacher_and_the_windows(
    teacher_of: Callable[..., Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    plain = teacher_of()
    token = int(seen.windows.numbered(np.array([7]))[0, 4])

    def load() -> FrozenModel:
        model = plain.load()
        states_of = model.hidden_states

        def spoilt(input_ids_BS: Tensor, pieces: Pieces | None = None) -> Tensor:
            # Not by its embedding: kernels of a CPU may spread a NaN over windows beside it.
            states_BSD = states_of(input_ids_BS, pieces)
            return states_BSD.masked_fill((input_ids_BS == token).unsqueeze(-1), float("nan"))

        model.hidden_states = spoilt  # type: ignore[method-assign]
        return model

    holding = {n for n in range(80) if token in seen.windows.numbered(np.array([n]))[0]}
    with pytest.raises(ModelError) as caught:
        remember(replace(plain, load=load), seen, context)
    (problem,) = caught.value.problems
    assert problem.where == "teachers/llama-0"
    assert problem.got.startswith("hidden states that are not finite, in windows ")
    named = {int(number) for number in problem.got.rpartition("windows ")[2].split(", ")}
    assert named
    assert named <= holding
