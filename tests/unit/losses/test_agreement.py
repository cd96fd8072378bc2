"""How teachers, ensemble and student agree: what has no effect, what is held, what is finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from babyllama_ds.losses.agreement import Agreement, finite_positions, measure_agreement
from babyllama_ds.losses.distillation import IGNORED_LABEL, TeacherStates
from babyllama_ds.losses.heads import Head

N, D, V, P = 40, 6, 11, 13


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_labels() -> Tensor:
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(7))
    labels[9::10] = IGNORED_LABEL
    return labels


def make_teachers() -> list[TeacherStates]:
    return [
        TeacherStates(normal(N, width, seed=width), Head(normal(P, width, seed=width)), 1.0 + width)
        for width in (5, 8)
    ]


def compute(**changes: object) -> Agreement:
    arguments: dict[str, object] = {
        "student_hidden_ND": normal(N, D, seed=1),
        "student_head": Head(normal(P, D, seed=2)),
        "labels_N": make_labels(),
        "valid_N": torch.ones(N, dtype=torch.bool),
        "teachers": make_teachers(),
        "mean_of": "logits",
        "vocab_size": V,
        "chunk_tokens": 7,
    }
    return measure_agreement(**{**arguments, **changes})  # type: ignore[arg-type]


def same(one: Agreement, other: Agreement) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


def test_there_is_no_graph_and_nothing_is_changed() -> None:
    hidden = normal(N, D, seed=1).requires_grad_()
    weight = normal(P, D, seed=2).requires_grad_()
    got = compute(student_hidden_ND=hidden, student_head=Head(weight))
    assert not any(tensor.requires_grad for tensor in got)
    assert torch.equal(hidden, normal(N, D, seed=1))
    assert torch.equal(weight, normal(P, D, seed=2))


def test_states_from_inference_mode() -> None:
    with torch.inference_mode():
        teachers = make_teachers()
    assert same(compute(teachers=teachers), compute())


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
def test_what_lies_at_unused_positions_has_no_effect(rubbish: float) -> None:
    unused = torch.zeros(N, dtype=torch.bool)
    unused[[3, 8, 20]] = True
    labels = make_labels().masked_fill(unused, IGNORED_LABEL)
    expected = compute(labels_N=labels, valid_N=~unused)
    spoilt, hidden = make_teachers(), normal(N, D, seed=1)
    for states in (hidden, *(teacher.hidden_ND for teacher in spoilt)):
        states[unused] = rubbish
    got = compute(labels_N=labels, valid_N=~unused, teachers=spoilt, student_hidden_ND=hidden)
    assert same(got, expected)
    assert not same(compute(), expected)


def test_parts_of_a_batch_add_up() -> None:
    valid = torch.ones(N, dtype=torch.bool)
    first = torch.arange(N) < 23
    labels = make_labels()
    parts = [
        compute(valid_N=valid & part, labels_N=labels.masked_fill(~part, IGNORED_LABEL))
        for part in (first, ~first)
    ]
    for got, expected in zip(parts[0].plus(parts[1]), compute(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_student_equal_to_its_only_teacher_agrees() -> None:
    teacher = make_teachers()[0]
    got = compute(
        teachers=[teacher], student_hidden_ND=teacher.hidden_ND, student_head=teacher.head
    )
    assert got.student_hits.item() == got.teacher_hits_K.item() == N
    assert got.student_kl.item() == pytest.approx(0, abs=1e-12)


def test_of_equal_largest_logits_either_is_agreed_with() -> None:
    """bf16 gives equal logits often; which of them is named first is nobody's opinion."""
    tied, sure = torch.zeros(P, 1).double(), torch.zeros(P, 1).double()
    tied[[4, 6]] = 2.0  # the teacher of much weight prefers 6 a little; this one has both
    sure[6] = 1.0
    ones = torch.ones(N, 1).double()
    teachers = [TeacherStates(ones, Head(tied)), TeacherStates(ones, Head(sure), 9.0)]
    assert compute(teachers=teachers).teacher_hits_K.tolist() == [N, N]


def test_equal_teachers_are_no_distance_apart() -> None:
    one, other = make_teachers()
    got = compute(teachers=[one, other, one])  # pairs in order: 0-1, 0-2, 1-2
    assert got.distance_P[1].item() == 0
    assert got.distance_P[0].item() == got.distance_P[2].item() > 1


# -- what is held ---------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        found = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max(self.numel, *found) if found else self.numel
        return result


@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
def test_no_tensor_of_all_positions_times_the_vocabulary(mean_of: str) -> None:
    with LargestTensor() as largest:
        compute(mean_of=mean_of)
    assert largest.numel == max(7 * V, N * 8)
    assert largest.numel < N * V


# -- logits that are not finite -------------------------------------------------------------------


def spoilt_head(value: float, *, token: int) -> Head:
    """A bias of 0 but at one token."""
    bias = torch.zeros(P, dtype=torch.float64)
    bias[token] = value
    return Head(normal(P, 5, seed=5), bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
def test_a_logit_that_is_not_finite_is_seen_in_the_measures(mean_of: str, value: float) -> None:
    """Also where the ensemble's probabilities stay finite: a mean with one logit of −inf."""
    first, second = make_teachers()
    spoilt = TeacherStates(first.hidden_ND, spoilt_head(value, token=3), first.weight)
    got = compute(mean_of=mean_of, teachers=[second, spoilt])
    assert not got.teacher_kl_K[1].isfinite()
    assert got.teacher_ce_K[0].isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_positions_with_finite_logits(value: float) -> None:
    hidden = normal(N, 5, seed=4)
    weight = normal(P, 5, seed=5)
    whole = torch.ones(N, dtype=torch.bool)

    def finite(states: Tensor, head: Head) -> Tensor:
        return finite_positions(TeacherStates(states, head), vocab_size=V)

    assert torch.equal(finite(hidden, Head(weight)), whole)
    assert not finite(hidden, spoilt_head(value, token=10)).any()
    assert finite(hidden, spoilt_head(value, token=V)).all(), "a padding row is no token"
    hidden[[2, 17]] = value
    expected = whole.clone()
    expected[[2, 17]] = False
    assert torch.equal(finite(hidden, Head(weight)), expected)
