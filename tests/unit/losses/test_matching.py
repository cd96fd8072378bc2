"""The distance of hidden states, against the formulas written plainly, with gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from babyllama_ds.losses.matching import hidden_distance_sum

N, D, E = 23, 7, 11
LOSSES = ("mse", "cosine")


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's states, matrix, teacher's states, validity."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    valid_N = torch.ones(N, dtype=torch.bool)
    valid_N[[3, 21, 22]] = False
    return normal(N, D), normal(E, D), normal(N, E), valid_N


def plain(student: Tensor, weight: Tensor, teacher: Tensor, valid: Tensor, loss: str) -> Tensor:
    total = student.new_zeros(())
    for h, t, counts in zip(student, teacher, valid.tolist(), strict=True):
        if counts:
            y = weight @ h
            cosine = (y @ t) / (y @ y).sqrt() / (t @ t).sqrt()
            total = total + (((y - t) ** 2).sum() / E if loss == "mse" else 1 - cosine)
    return total


@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradients(loss) -> None:
    student, weight, teacher, valid = case()
    results = []
    for compute in (hidden_distance_sum, plain):
        leaves = [student.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = compute(*leaves, teacher, valid, loss)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_valid_has_no_effect_even_nan(loss) -> None:
    student, weight, teacher, valid = case()
    clean = hidden_distance_sum(student, weight, teacher, valid, loss)
    student[~valid], teacher[~valid] = math.nan, math.inf
    leaf, matrix = student.requires_grad_(), weight.requires_grad_()
    dirty = hidden_distance_sum(leaf, matrix, teacher, valid, loss)
    dirty.backward()
    assert torch.equal(clean, dirty)
    assert not leaf.grad[~valid].any()
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_valid_is_zero_with_a_graph(loss) -> None:
    student, weight, teacher, valid = case()
    weight.requires_grad_()
    value = hidden_distance_sum(student, weight, teacher, torch.zeros_like(valid), loss)
    value.backward()
    assert value.item() == 0
    assert not weight.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_is_summed_in_fp32_and_judged_by_the_product_alone(loss) -> None:
    student, weight, teacher, valid = (t.bfloat16() if t.is_floating_point() else t for t in case())
    got = hidden_distance_sum(student, weight, teacher, valid, loss)
    assert got.dtype == torch.float32
    right = plain(student.double(), weight.double(), teacher.double(), valid, loss)
    # The product is rounded to 2⁻⁹ of an entry; the error of the mean of N · E of them is less.
    assert got.item() == pytest.approx(right.item(), rel=2**-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_of_inference_mode_can_be_learnt_from(loss) -> None:
    student, weight, _, valid = case()
    with torch.inference_mode():
        teacher = torch.ones(N, E, dtype=torch.float64)
    hidden_distance_sum(student.requires_grad_(), weight, teacher, valid, loss).backward()
    assert student.grad.abs().max() > 0
