"""The bucketed KL of single rows, worked out by hand, and what its targets may be."""

from __future__ import annotations

import math

import pytest
import torch

from babyllama_ds.losses.factors import Factors
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.topk import TopKTargets, top_k_row_losses, top_k_targets
from babyllama_ds.losses.voters import TeacherStates

# The student gives four tokens 1/2, 1/4, 1/8 and 1/8.
STUDENT = torch.tensor([[4.0, 2.0, 1.0, 1.0]], dtype=torch.float64).log()
LABEL = torch.tensor([[3]])
ONE = torch.ones(1, 1, dtype=torch.float64)


def targets(ids: list[int], probabilities: list[float]) -> TopKTargets:
    return TopKTargets(
        torch.tensor([ids]), torch.tensor([probabilities], dtype=torch.float64).log()
    )


def work() -> list[torch.Tensor]:
    return [torch.full((1, 4), math.nan, dtype=torch.float64) for _ in range(2)]


def test_the_tail_is_one_outcome() -> None:
    _, kl = top_k_row_losses(STUDENT.clone(), targets([1], [0.5]), LABEL, 1.0, None, work())
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))


def test_the_gradient_moves_the_tail_as_one() -> None:
    """Token 1 has too little, by 1/4; the others give that, each by its part of their 3/4."""
    student = STUDENT.clone()
    factors = Factors(ce_C1=0 * ONE, kl_C1=ONE)
    top_k_row_losses(student, targets([1], [0.5]), LABEL, 1.0, factors, work())
    third = (0.75 - 0.5) / 0.75
    assert student.tolist()[0] == pytest.approx([third / 2, -0.25, third / 8, third / 8])


def test_cross_entropy_comes_beside_it() -> None:
    student = STUDENT.clone()
    factors = Factors(ce_C1=2 * ONE, kl_C1=0 * ONE)
    ce, _ = top_k_row_losses(student, targets([3, 0], [0.5, 0.3]), LABEL, 2.0, factors, work())
    assert ce.item() == pytest.approx(math.log(8))
    assert student.tolist()[0] == pytest.approx([1.0, 0.5, 0.25, 2 * (1 / 8 - 1)])


def test_the_temperature_divides_the_students_logits() -> None:
    student = 2 * STUDENT
    _, kl = top_k_row_losses(student, targets([1], [0.5]), LABEL, 2.0, None, work())
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert torch.equal(student, 2 * STUDENT)


def test_probabilities_that_exceed_1_are_divided_by_their_sum() -> None:
    _, kl = top_k_row_losses(STUDENT.clone(), targets([0, 1], [1.5, 0.5]), LABEL, 1, None, work())
    assert kl.item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.25))


@pytest.mark.parametrize("each", [0.25, 0.24, 0.26])
def test_all_tokens_leave_no_tail(each: float) -> None:
    """And what rounding left to a sum of 1, or put on it, is divided by."""
    student = STUDENT.clone()
    every = targets([2, 0, 1, 3], [each] * 4)
    _, kl = top_k_row_losses(student, every, LABEL, 1.0, Factors(ce_C1=0 * ONE, kl_C1=ONE), work())
    assert kl.item() == pytest.approx(0.25 * math.log(0.25**4 / (0.5 * 0.25 / 64)))
    assert student.tolist()[0] == pytest.approx([0.25, 0.0, -0.125, -0.125])


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_work_spaces_of_any_number_of_rows_give_the_same(rows: int) -> None:
    """As of each position by itself."""
    draw = torch.Generator().manual_seed(2)
    logits_CV = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    found = TopKTargets(
        torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [0, 3]]),
        torch.rand(5, 2, generator=draw, dtype=torch.float64).mul(0.5).log(),
    )
    label_C1 = torch.tensor([[0], [1], [2], [3], [0]])
    each_C1 = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    factors = Factors(ce_C1=each_C1, kl_C1=each_C1.flip(0), z_C1=0.1 * each_C1)

    def of(part: slice, spaces: int) -> list[torch.Tensor]:
        gradient_CV = logits_CV[part].clone()
        log_z_C1 = torch.empty_like(each_C1[part])
        one = TopKTargets(found.token_ids_NK[part], found.log_probs_NK[part])
        losses = top_k_row_losses(
            gradient_CV,
            one,
            label_C1[part],
            2.0,
            factors.of(part),
            [torch.full((spaces, 4), math.nan, dtype=torch.float64) for _ in range(2)],
            log_z_C1=log_z_C1,
        )
        return [*losses, log_z_C1, gradient_CV]

    alone = zip(*(of(slice(row, row + 1), 1) for row in range(5)), strict=True)
    for ours, theirs in zip(of(slice(0, 5), rows), alone, strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs))


@pytest.mark.parametrize("k", [0, 5])
def test_more_tokens_than_the_vocabulary_are_our_mistake(k: int) -> None:
    teacher = TeacherStates(torch.ones(2, 3), Head(torch.ones(4, 3)))
    with pytest.raises(AssertionError, match="more tokens"):
        top_k_targets([teacher], k=k, temperature=1.0, mean_of="logits", vocab_size=4)
