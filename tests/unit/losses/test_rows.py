"""Losses of single rows, worked out by hand on a vocabulary of two tokens."""

from __future__ import annotations

import math

import pytest
import torch

from babyllama_ds.losses.rows import Factors, Mixture, row_losses

# Odds of 3 : 1, 1 : 1 and 9 : 1 for the first token.
THREE_TO_ONE = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
EVEN = torch.tensor([[5.0, 5.0]], dtype=torch.float64)
NINE_TO_ONE = torch.tensor([[math.log(9.0) - 2.0, -2.0]], dtype=torch.float64)
LABEL = torch.tensor([[0]])
ONE = torch.ones(1, 1, dtype=torch.float64)


def work() -> list[torch.Tensor]:
    return [torch.full((1, 2), math.nan, dtype=torch.float64) for _ in range(3)]


def mixture(temperature: float = 1.0, mean_of: str = "logits", shares=(1.0,)) -> Mixture:
    return Mixture(shares=shares, temperature=temperature, mean_of=mean_of)


def test_cross_entropy_and_its_gradient() -> None:
    student = THREE_TO_ONE.clone()
    ce, kl = row_losses(
        student, [], LABEL, mixture(shares=()), Factors(ce_C1=2 * ONE, kl_C1=ONE), work()
    )
    assert ce.item() == pytest.approx(math.log(4 / 3))
    assert kl.item() == 0
    assert student.tolist()[0] == pytest.approx([2 * (0.75 - 1), 2 * 0.25])


def test_kl_goes_from_the_teacher_to_the_student() -> None:
    _, kl = row_losses(THREE_TO_ONE.clone(), [EVEN], LABEL, mixture(), None, work())
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_temperature_divides_the_logits_of_both() -> None:
    student = NINE_TO_ONE.clone()  # at T = 2: 3 to 1
    factors = Factors(ce_C1=0 * ONE, kl_C1=ONE)
    ce, kl = row_losses(student, [EVEN], LABEL, mixture(2.0), factors, work())
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert ce.item() == pytest.approx(math.log(10 / 9))
    assert student.tolist()[0] == pytest.approx([0.75 - 0.5, 0.25 - 0.5])


@pytest.mark.parametrize(
    ("mean_of", "first"),
    [("logits", 3 / 4), ("probabilities", (9 / 10 + 1 / 2) / 2)],
)
def test_mean_of_logits_is_geometric_and_of_probabilities_arithmetic(mean_of, first) -> None:
    student = EVEN.clone()
    mix = mixture(mean_of=mean_of, shares=(0.5, 0.5))
    factors = Factors(ce_C1=0 * ONE, kl_C1=ONE)
    row_losses(student, [NINE_TO_ONE, EVEN], LABEL, mix, factors, work())
    assert student.tolist()[0] == pytest.approx([0.5 - first, first - 0.5])


def test_without_factors_the_logits_are_left_alone() -> None:
    student = THREE_TO_ONE.clone()
    row_losses(student, [EVEN], LABEL, mixture(2.0), None, work())
    assert torch.equal(student, THREE_TO_ONE)


def test_a_token_no_teacher_can_reach_counts_nothing() -> None:
    sure = torch.tensor([[0.0, -1e5]])
    spaces = [torch.empty(1, 2) for _ in range(3)]
    student = torch.zeros(1, 2)
    mix = mixture(mean_of="probabilities")
    factors = Factors(ce_C1=torch.zeros(1, 1), kl_C1=torch.ones(1, 1))
    _, kl = row_losses(student, [sure], LABEL, mix, factors, spaces)
    assert kl.item() == pytest.approx(math.log(2))
    assert student.tolist()[0] == [-0.5, 0.5]
