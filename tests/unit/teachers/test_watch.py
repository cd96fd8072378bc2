"""Measures by name, and when a teacher gives a warning and when it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from babyllama_ds import ranks
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.losses.agreement import Agreement, measure_agreement
from babyllama_ds.losses.distillation import TeacherStates
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.teachers.watch import (
    SAME_DISTANCE,
    broken_windows,
    measures,
    warnings_of,
)
from babyllama_ds.training.batches import MicroBatch, micro_batch

VOCAB, LENGTH, WINDOWS = 61, 11, 6


def windows() -> MicroBatch:
    """Tokens of which the next is mostly known from the last; the last window is padding."""
    rng = torch.Generator().manual_seed(3)
    tokens_BS = torch.randint(0, VOCAB, (WINDOWS, LENGTH), generator=rng)
    for position in range(1, LENGTH):
        known_B = torch.rand(WINDOWS, generator=rng) < 0.8
        followed_B = (tokens_BS[:, position - 1] * 7 + 1) % VOCAB
        tokens_BS[:, position] = torch.where(known_B, followed_B, tokens_BS[:, position])
    return micro_batch(tokens_BS, torch.arange(WINDOWS) < WINDOWS - 1)


def trained(model: nn.Module, *, steps: int, rate: float = 1e-2) -> nn.Module:
    """A little less ignorant, so that its predictions are sharp enough to differ."""
    micro = windows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        logits_BSV = model(input_ids=micro.input_ids_BS).logits
        loss = cross_entropy(logits_BSV.flatten(0, 1), micro.labels_N)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def measured(teachers: dict[str, nn.Module], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The measures of a training step with these teachers, and an untrained student."""
    micro = windows()
    student = next(iter(teachers.values()))
    with torch.no_grad():
        states = []
        for model in teachers.values():
            backbone, head = split_causal_lm(model.eval().to(dtype))
            states.append(TeacherStates(backbone(micro.input_ids_BS).flatten(0, 1), head))
        sums = measure_agreement(
            states[0].hidden_ND,
            split_causal_lm(student)[1],
            micro.labels_N,
            micro.valid_N,
            states,
            mean_of="logits",
            vocab_size=VOCAB,
        )
    num_windows = WINDOWS - 1
    counts = {"num_labelled": num_windows * (LENGTH - 1), "num_valid": num_windows * LENGTH}
    return measures(sums, list(teachers), **counts)


def warned(teachers: dict[str, nn.Module], dtype: torch.dtype = torch.bfloat16) -> list[str]:
    return warnings_of(measured(teachers, dtype), list(teachers), vocab_size=VOCAB)


# -- measures -------------------------------------------------------------------------------------


def agreement_of_three() -> Agreement:
    numbers = iter(torch.arange(1.0, 20.0))
    trio = [torch.stack([next(numbers) for _ in range(3)]) for _ in range(4)]
    return Agreement(*trio, next(numbers), next(numbers), next(numbers))


def test_sums_are_divided_by_what_they_were_summed_over() -> None:
    got = measures(agreement_of_three(), ["a", "b", "c"], num_labelled=10, num_valid=20)
    assert got == pytest.approx(
        {
            "teacher_ce/a": 0.1,
            "teacher_ce/b": 0.2,
            "teacher_ce/c": 0.3,
            "teacher_kl/a": 4 / 20,
            "teacher_kl/b": 5 / 20,
            "teacher_kl/c": 6 / 20,
            "teacher_agreement/a": 7 / 20,
            "teacher_agreement/b": 8 / 20,
            "teacher_agreement/c": 9 / 20,
            "teacher_distance/a/b": 10 / 20,
            "teacher_distance/a/c": 11 / 20,
            "teacher_distance/b/c": 12 / 20,
            "target_entropy": 13 / 20,
            "student_agreement": 14 / 20,
            "student_kl": 15 / 20,
        }
    )


def test_sums_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "sum_floats", lambda *values: [3 * value for value in values])
    got = measures(agreement_of_three(), ["a", "b", "c"], num_labelled=10, num_valid=20)
    assert got["teacher_ce/a"] == pytest.approx(0.3)
    assert got["student_kl"] == pytest.approx(45 / 20)


def test_a_batch_with_nothing_to_count_has_measures_of_0() -> None:
    nothing = Agreement(*(torch.zeros_like(tensor) for tensor in agreement_of_three()))
    got = measures(nothing, ["a", "b", "c"], num_labelled=0, num_valid=0)
    assert set(got.values()) == {0.0}


# -- worse than chance ----------------------------------------------------------------------------


def test_a_teacher_worse_than_chance_is_named(tiny_model: Callable[..., Any]) -> None:
    """Random weights are confident, and wrong."""
    good = trained(tiny_model("llama", seed=1), steps=15)
    (warning,) = warned({"good": good, "ignorant": tiny_model("gpt2", seed=2)})
    assert warning == (
        "teacher ignorant is no better than chance: its cross-entropy is not below ln 61 = 4.111 "
        "nats a token, which a uniform guess has"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_uniform_teacher_is_no_better_than_chance(
    dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    uniform = tiny_model("llama", seed=1)
    uniform.lm_head.weight.data.zero_()
    values = measured({"uniform": uniform}, dtype)
    assert values["teacher_ce/uniform"] == pytest.approx(math.log(VOCAB))
    assert values["target_entropy"] == pytest.approx(math.log(VOCAB))
    assert len(warned({"uniform": uniform}, dtype)) == 1


def test_a_teacher_a_little_better_than_chance_gives_no_warning() -> None:
    chance = math.log(VOCAB)
    for ce, warns in ((chance + 0.1, True), (chance, True), (chance - 0.01, False)):
        assert bool(warnings_of({"teacher_ce/a": ce}, ["a"], vocab_size=VOCAB)) is warns


# -- identical ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identical_teachers_are_named(dtype: torch.dtype, tiny_model: Callable[..., Any]) -> None:
    one, twin = (trained(tiny_model("llama", seed=1), steps=15) for _ in range(2))
    other = trained(tiny_model("llama", seed=2), steps=15)
    (warning,) = warned({"one": one, "other": other, "twin": twin}, dtype)
    assert warning == (
        "teachers one and twin are identical: their distributions coincide, so that the ensemble "
        "holds one teacher with the weight of both"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_similar_teachers_give_no_warning(
    dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    """Two seeds, and a teacher one small update further than another."""
    teachers = {
        "one": trained(tiny_model("llama", seed=1), steps=15),
        "later": trained(trained(tiny_model("llama", seed=1), steps=15), steps=1, rate=1e-3),
        "seed": trained(tiny_model("llama", seed=2), steps=15),
    }
    values = measured(teachers, dtype)
    assert values["teacher_distance/one/seed"] > 100 * SAME_DISTANCE
    assert 10 * SAME_DISTANCE < values["teacher_distance/one/later"] < 0.1
    assert warned(teachers, dtype) == []


def test_equal_weights_whose_kernels_round_differently_are_named() -> None:
    """Such are about 1e-6 apart, in fp32; a teacher and itself after one update 0.02."""
    for distance, warns in ((0.0, True), (1e-6, True), (2e-3, False)):
        found = warnings_of({"teacher_distance/a/b": distance}, ["a", "b"], vocab_size=VOCAB)
        assert bool(found) is warns


# -- several warnings, and none -------------------------------------------------------------------


def test_a_teacher_may_be_ignorant_and_two_others_the_same() -> None:
    """One warning does not hide the other."""
    found = warnings_of(
        {"teacher_ce/a": 2.0, "teacher_ce/b": 2.0, "teacher_ce/c": 9.0}
        | {"teacher_distance/a/b": 0.0, "teacher_distance/a/c": 0.9, "teacher_distance/b/c": 0.9},
        ["a", "b", "c"],
        vocab_size=VOCAB,
    )
    assert [warning.split(":")[0] for warning in found] == [
        "teacher c is no better than chance",
        "teachers a and b are identical",
    ]


def test_what_was_not_measured_gives_no_warning() -> None:
    assert warnings_of({}, ["a", "b"], vocab_size=VOCAB) == []


# -- logits that are not finite -------------------------------------------------------------------


def test_broken_windows_are_those_with_logits_that_are_not_finite(
    alone: torch.device, tiny_model: Callable[..., Any]
) -> None:
    """A token with NaN states spoils the windows it stands in; padding does not count.

    Not one with a NaN embedding: kernels of a CPU may spread it over the windows beside.
    """
    micro = windows()
    token = int(micro.input_ids_BS[2, 4])
    micro.input_ids_BS[-1, 0] = token  # in the window that is padding
    members = [
        Member(kind, FrozenModel(tiny_model(kind), device=alone, dtype=torch.bfloat16), 1.0)
        for kind in ("gpt2", "llama")
    ]
    whole, other = Ensemble(members).targets(micro)
    is_it_N1 = (micro.input_ids_BS == token).view(-1, 1)
    broken = replace(other, hidden_ND=other.hidden_ND.masked_fill(is_it_N1, float("nan")))
    got_KB = broken_windows([whole, broken], micro.valid_N, WINDOWS, vocab_size=VOCAB)
    holds_it = (micro.input_ids_BS == token).any(1).tolist()
    assert holds_it[2]
    assert not all(holds_it)
    assert got_KB.tolist() == [[False] * WINDOWS, [*holds_it[:-1], False]]


def test_a_position_breaks_its_own_window_and_no_other(tiny_model: Callable[..., Any]) -> None:
    head = split_causal_lm(tiny_model("llama"))[1]
    valid_N = torch.ones(WINDOWS * LENGTH, dtype=torch.bool)
    for position in range(WINDOWS * LENGTH):
        hidden_ND = torch.zeros(WINDOWS * LENGTH, head.weight_PD.shape[1])
        hidden_ND[position, 1] = float("nan")
        states = [TeacherStates(hidden_ND, head)]
        (got_B,) = broken_windows(states, valid_N, WINDOWS, vocab_size=VOCAB).tolist()
        assert got_B == [window == position // LENGTH for window in range(WINDOWS)]
