"""The k most likely tokens of the ensemble, packed, found again, and their error measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.errors import ModelError
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.topk import TopKTargets, top_k_targets
from babyllama_ds.losses.voters import TeacherStates
from babyllama_ds.models.build import load_model
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.cache import topk
from babyllama_ds.teachers.cache.opening import CacheContext
from babyllama_ds.teachers.cache.remembered import remembered_ensemble
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput
from babyllama_ds.teachers.cache.topk import (
    SAMPLE_WINDOWS,
    TopKEnsemble,
    packed,
    record_bytes,
    unpacked,
)
from babyllama_ds.training.batches import micro_batch


def loss(**changes: Any) -> DistillationSpec:
    return DistillationSpec.model_validate({"cache": "topk", "cache_top_k": 9, **changes})


@pytest.fixture
def teachers(teacher_of: Callable[..., Teacher]) -> list[Teacher]:
    return [teacher_of("llama", seed=1), teacher_of("gpt2", seed=2, weight=2.5, n_embd=36)]


def opened(
    spec: DistillationSpec, teachers: list[Teacher], seen: TeacherInput, context: CacheContext
) -> TopKEnsemble:
    found = remembered_ensemble(spec, teachers, seen, context)
    assert isinstance(found, TopKEnsemble)
    return found


def targets_of(ensemble: TopKEnsemble, seen: TeacherInput, numbers: list[int]) -> TopKTargets:
    numbers_B = np.array(numbers, np.int64)
    tokens_BS = torch.from_numpy(seen.windows.numbered(numbers_B))
    real = torch.ones(len(numbers), dtype=torch.bool)
    return ensemble.targets(micro_batch(tokens_BS, real, numbers_B, numbers_B[:0]))


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [61, 2**16, 2**16 + 1, 200_000])
@pytest.mark.parametrize("k", [1, 5, 8])
def test_packing_keeps_every_id_and_every_bit(vocab_size: int, k: int) -> None:
    draw = torch.Generator().manual_seed(k)
    ids_NK = torch.randint(0, vocab_size, (6, k), generator=draw, dtype=torch.int32)
    ids_NK[0, 0], ids_NK[5, -1] = vocab_size - 1, 0
    log_probs_NK = -10 * torch.rand(6, k, generator=draw)
    records_BR = packed(TopKTargets(ids_NK, log_probs_NK), 2, vocab_size)
    assert records_BR.shape == (2, record_bytes(k, 3, vocab_size))
    found = unpacked(records_BR, k=k, num_positions=3, vocab_size=vocab_size)
    assert torch.equal(found.token_ids_NK, ids_NK)
    assert torch.equal(found.log_probs_NK, log_probs_NK)


@pytest.mark.parametrize(("vocab_size", "id_type"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_a_record_is_these_bytes(vocab_size: int, id_type: str) -> None:
    """What one release wrote, another reads; and nodes compare what they have byte for byte."""
    ids_NK = np.array([[3, 60_000, 17], [0, vocab_size - 1, 5]])
    log_probs_NK = np.array([[-0.5, -1.25, -3], [-2, -2.5, -7]], "<f4")
    targets = TopKTargets(torch.from_numpy(ids_NK), torch.from_numpy(log_probs_NK))
    content = log_probs_NK.tobytes() + ids_NK.astype(id_type).tobytes()
    assert packed(targets, 1, vocab_size).numpy().tobytes() == content + bytes(-len(content) % 8)


def test_a_token_costs_a_few_hundred_bytes() -> None:
    assert record_bytes(64, 128, 16_000) == 128 * 384


# -- targets ---------------------------------------------------------------------------------------


def reference(
    teachers: list[Teacher], tokens_BS: Tensor, spec: DistillationSpec, dtype: torch.dtype
) -> Tensor:
    """p [N, V] of the ensemble at the job's temperature, from whole logits, in float64."""
    logits = []
    for teacher in teachers:
        model = load_model(
            str(teacher.model_dir), attention="sdpa", where="test", dtype=dtype
        ).eval()
        with torch.no_grad():
            logits.append(model(input_ids=tokens_BS).logits.double().flatten(0, 1))
    weights = [teacher.weight / sum(t.weight for t in teachers) for teacher in teachers]
    if spec.mean_of == "logits":
        mean = sum(w * t for w, t in zip(weights, logits, strict=True)) / spec.temperature
        return torch.softmax(mean, -1)
    soft = [torch.softmax(t / spec.temperature, -1) for t in logits]
    return sum(w * p for w, p in zip(weights, soft, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tier", ["disk", "host"])
def test_they_are_the_ensembles_most_likely_tokens(
    mean_of: str,
    temperature: float,
    tier: Literal["disk", "host"],
    teachers: list[Teacher],
    seen: TeacherInput,
    context: CacheContext,
) -> None:
    spec = loss(mean_of=mean_of, temperature=temperature)
    ensemble = opened(spec, teachers, seen, replace(context, tier=tier))
    numbers = [7, 79, 41, 2]
    found = targets_of(ensemble, seen, numbers)
    tokens_BS = torch.from_numpy(seen.windows.numbered(np.array(numbers)))
    p_NV = reference(teachers, tokens_BS, spec, torch.bfloat16)
    expected = p_NV.topk(9).values.log()
    assert found.token_ids_NK.shape == found.log_probs_NK.shape == (40, 9)
    # Which of two near equals comes first is open: probabilities are compared, not ids.
    assert torch.allclose(found.log_probs_NK.double(), expected, atol=1e-5)
    at_ids = p_NV.gather(-1, found.token_ids_NK.long()).log()
    assert torch.allclose(found.log_probs_NK.double(), at_ids, atol=1e-5)


def test_in_the_same_shape_they_are_the_live_ones_to_the_bit(
    teachers: list[Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    numbers = [33, 4, 60]
    tokens_BS = torch.from_numpy(seen.windows.numbered(np.array(numbers)))
    states = []
    for teacher in teachers:
        model = teacher.load()
        hidden_ND = model.hidden_states(tokens_BS).flatten(0, 1)
        states.append(TeacherStates(hidden_ND, model.head, teacher.weight))
    live = top_k_targets(states, k=9, temperature=2.0, mean_of="logits", vocab_size=61)
    found = targets_of(opened(loss(), teachers, seen, context), seen, numbers)
    assert torch.equal(found.token_ids_NK, live.token_ids_NK)
    assert torch.equal(found.log_probs_NK, live.log_probs_NK)


def test_the_windows_of_the_next_pass_are_read_ahead(
    teachers: list[Teacher],
    seen: TeacherInput,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ensemble = opened(loss(), teachers, seen, context)
    expected: list[NDArray[np.int64]] = []
    monkeypatch.setattr(ensemble._records, "expect", expected.append)
    tokens_BS = torch.from_numpy(seen.windows.numbered(np.array([5, 2])))
    real_B = torch.ones(2, dtype=torch.bool)
    ensemble.targets(micro_batch(tokens_BS, real_B, np.array([5, 2]), np.array([7, 3])))
    assert [numbers.tolist() for numbers in expected] == [[7, 3]]


@pytest.mark.parametrize("ranks_of_each", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_with_a_split_teacher_among_them_ranks_go_in_step(
    ranks_of_each: tuple[int, int],
    teachers: list[Teacher],
    seen: TeacherInput,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is enough: whoever has no shard to make is needed for its passes."""
    in_step: list[bool] = []
    monkeypatch.setattr(topk, "open_cache", lambda wanted, *_: in_step.append(wanted.in_step))
    split = [
        replace(teacher, tensor_parallel=number)
        for teacher, number in zip(teachers, ranks_of_each, strict=True)
    ]
    opened(loss(), split, seen, context)
    assert in_step == [2 in ranks_of_each]


def test_at_the_end_the_records_are_freed(
    teachers: list[Teacher],
    seen: TeacherInput,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are files held open, or much of the device's memory."""
    ensemble = opened(loss(), teachers, seen, context)
    closed: list[bool] = []
    monkeypatch.setattr(ensemble._records, "close", lambda: closed.append(True))
    ensemble.destroy()
    assert closed == [True]


def test_they_are_computed_once(
    teachers: list[Teacher],
    counted: Callable[[Teacher], Any],
    seen: TeacherInput,
    context: CacheContext,
) -> None:
    opened(loss(), teachers, seen, context)
    again = [counted(teacher) for teacher in teachers]
    opened(loss(alpha=0.1), [one.teacher for one in again], seen, context)
    assert [one.loads for one in again] == [0, 0]
    opened(loss(cache_top_k=8), [one.teacher for one in again], seen, context)
    assert [one.loads for one in again] == [1, 1]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_logits_that_are_not_finite_name_the_teacher_and_are_not_kept(
    value: str, teachers: list[Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    sound, plain = teachers

    def load() -> FrozenModel:
        model = plain.load()
        # Hidden states do not pass the head: theirs are finite, in every window.
        model._model.lm_head.weight = nn.Parameter(  # type: ignore[union-attr]
            with_row(model.head.weight_PD, 17, float(value)), requires_grad=False
        )
        return model

    def published() -> list[Path]:
        return sorted(context.store.root.rglob("manifest.json"))

    before = published()
    with pytest.raises(ModelError) as caught:
        opened(loss(), [sound, replace(plain, load=load)], seen, context)
    (problem,) = caught.value.problems
    assert problem.where == f"teachers/{plain.name}"
    assert problem.got == "logits that are not finite, in windows 0, 1, 2"
    assert problem.hint is not None
    assert problem.hint.startswith(f"the weights of {plain.name} are damaged")
    assert published() == before
    # Nothing of it is found by a later run: the mended teacher is asked for every window.
    found = targets_of(opened(loss(), teachers, seen, context), seen, [0, 1, 2])
    assert found.log_probs_NK.isfinite().all()


def test_only_the_windows_with_such_logits_are_named(teacher_of: Callable[..., Teacher]) -> None:
    """The states are finite, and their product with the head is not in one window of three."""
    head = Head(torch.full((61, 4), 1e30))
    hidden_ND = torch.ones(9, 4)
    hidden_ND[4] = 1e30
    states = [TeacherStates(torch.ones(9, 4), head), TeacherStates(hidden_ND, head)]
    teachers = [teacher_of("llama", seed=1), teacher_of("gpt2", seed=2)]
    with pytest.raises(ModelError) as caught:
        topk._check_logits(teachers, states, np.array([40, 7, 12]), 61)
    (problem,) = caught.value.problems
    assert problem.where == "teachers/gpt2-2"
    assert problem.got == "logits that are not finite, in windows 7"


def with_row(weight_VD: Tensor, row: int, value: float) -> Tensor:
    """A copy, with one token's row of another value."""
    changed_VD = weight_VD.detach().clone()
    changed_VD[row] = value
    return changed_VD


# -- the error -------------------------------------------------------------------------------------


@pytest.fixture
def student(tiny_model: Callable[..., Any]) -> nn.Module:
    model: nn.Module = tiny_model("llama", seed=9, attention_dropout=0.5).train()
    return model


def sampled(seen: TeacherInput) -> list[int]:
    return [i * seen.num_windows // SAMPLE_WINDOWS for i in range(SAMPLE_WINDOWS)]


def by_hand(
    student: nn.Module,
    teachers: list[Teacher],
    seen: TeacherInput,
    spec: DistillationSpec,
    sample: list[int],
) -> tuple[float, float, float]:
    """Exact KL, top-k KL, cosine of gradients: from whole logits, in float64, by autograd."""
    tokens_BS = torch.from_numpy(seen.windows.numbered(np.array(sample)))
    p_NV = reference(teachers, tokens_BS, spec, torch.float32)
    double = student.double().eval()
    with torch.no_grad():
        hidden_ND = double.model(tokens_BS).last_hidden_state.flatten(0, 1)  # type: ignore[operator,union-attr]
    head_VD = double.lm_head.weight.detach()  # type: ignore[union-attr]
    kls, grads = [], []
    for k in (None, spec.cache_top_k):
        leaf_ND = hidden_ND.clone().requires_grad_()
        q_NV = torch.softmax(leaf_ND @ head_VD.T / spec.temperature, -1)
        p, q = (p_NV, q_NV) if k is None else _bucketed(p_NV, q_NV, k)
        kl = (p * (p.log() - q.log())).sum()
        kl.backward()
        kls.append(kl.item() / len(leaf_ND))
        grads.append(leaf_ND.grad)
    cosine = torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0)  # type: ignore[union-attr]
    return kls[0], kls[1], cosine.item()


def _bucketed(p_NV: Tensor, q_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids_NK = p_NV.topk(k).indices
    p_NK, q_NK = p_NV.gather(-1, ids_NK), q_NV.gather(-1, ids_NK)
    return (
        torch.cat([p_NK, 1 - p_NK.sum(-1, keepdim=True)], -1),
        torch.cat([q_NK, 1 - q_NK.sum(-1, keepdim=True)], -1),
    )


@pytest.mark.parametrize(("k", "mean_of"), [(4, "logits"), (30, "logits"), (4, "probabilities")])
def test_the_error_is_that_of_whole_distributions(
    k: int,
    mean_of: str,
    student: nn.Module,
    teachers: list[Teacher],
    seen: TeacherInput,
    context: CacheContext,
) -> None:
    spec = loss(cache_top_k=k, mean_of=mean_of)
    precise = replace(seen, dtype=torch.float32)
    teachers = [_in_fp32(teacher) for teacher in teachers]
    ensemble = opened(spec, teachers, precise, context)
    facts = ensemble.closing_facts(student)["topk"]
    assert student.training
    exact, approximate, cosine = by_hand(student, teachers, precise, spec, sampled(seen))
    assert facts["k"] == k
    assert facts["windows"] == 64
    assert facts["exact_kl"] == pytest.approx(exact, rel=1e-4)
    assert facts["topk_kl"] == pytest.approx(approximate, rel=1e-4)
    assert facts["relative_kl_error"] == pytest.approx((exact - approximate) / exact, rel=1e-2)
    assert facts["gradient_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert facts["topk_kl"] < facts["exact_kl"]
    assert facts["gradient_cosine"] < 1


def test_of_fewer_windows_than_the_sample_has_each_counts_once(
    student: nn.Module,
    teachers: list[Teacher],
    seen: TeacherInput,
    context: CacheContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topk, "SAMPLE_WINDOWS", 100)
    precise = replace(seen, dtype=torch.float32)
    teachers = [_in_fp32(teacher) for teacher in teachers]
    facts = opened(loss(), teachers, precise, context).closing_facts(student)["topk"]
    assert facts["windows"] == 80
    exact, _, _ = by_hand(student, teachers, precise, loss(), list(range(80)))
    assert facts["exact_kl"] == pytest.approx(exact, rel=1e-4)


def _in_fp32(teacher: Teacher) -> Teacher:
    def load() -> FrozenModel:
        model = load_model(str(teacher.model_dir), attention="sdpa", where="test")
        return FrozenModel(model, device=torch.device("cpu"), dtype=torch.float32)

    return replace(teacher, load=load)


def test_with_every_token_there_is_none(
    student: nn.Module, teachers: list[Teacher], seen: TeacherInput, context: CacheContext
) -> None:
    precise = replace(seen, dtype=torch.float32)
    ensemble = opened(loss(cache_top_k=61), [_in_fp32(t) for t in teachers], precise, context)
    facts = ensemble.closing_facts(student)["topk"]
    assert facts["relative_kl_error"] < 1e-5
    assert facts["gradient_cosine"] == pytest.approx(1, abs=1e-6)
