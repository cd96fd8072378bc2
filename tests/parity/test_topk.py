"""The KL over the k most likely tokens and one bucket, against float64 code with autograd.

The reference forms all logits, takes every softmax and the bucket's q as they are defined, and has
autograd find the gradients of hidden states, head and bias.

Shapes: N positions, D hidden size, V vocabulary, P rows of a head (P ≥ V), K tokens kept.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from babyllama_ds.losses.distillation import distillation_loss
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.topk import TopKTargets, top_k_targets
from references.topk import (
    COUNTS,
    MEANS,
    TEMPERATURES,
    D,
    N,
    Outcome,
    V,
    make_case,
    make_targets,
    mixture,
    ours,
    reference,
    relative_error,
)


def assert_close(got: Outcome, expected: Outcome, tolerance: float) -> None:
    errors = got.errors(expected)
    assert all(error <= tolerance for error in errors.values()), errors


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


# -- the targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean_of", MEANS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_targets_are_the_largest_probabilities_of_the_mixture(temperature, mean_of, dtype) -> None:
    case = make_case().to(dtype)
    expected, _ = mixture(case, temperature, mean_of).topk(9, -1)
    targets = make_targets(case, 9, temperature, mean_of)
    assert targets.token_ids_NK.dtype == torch.int32
    assert targets.log_probs_NK.dtype == dtype
    assert not targets.log_probs_NK.requires_grad
    torch.testing.assert_close(
        targets.log_probs_NK.double().exp(), expected, rtol=1e-5 if dtype.itemsize == 4 else 1e-12,
        atol=0,
    )  # fmt: skip
    p = mixture(case, temperature, mean_of).gather(1, targets.token_ids_NK.long())
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=0)


def test_targets_do_not_depend_on_chunks_and_come_from_inference_mode() -> None:
    case = make_case()
    whole = make_targets(case, 9, 2.0)
    with torch.inference_mode():
        parts = top_k_targets(
            make_case().teachers, k=9, temperature=2.0, mean_of="logits", vocab_size=V
        )
    assert torch.equal(parts.token_ids_NK, whole.token_ids_NK)
    assert relative_error(parts.log_probs_NK, whole.log_probs_NK) < 1e-14
    assert ours(case, parts, 0.3, 2.0).kl_sum.item() == pytest.approx(
        ours(case, whole, 0.3, 2.0).kl_sum.item(), rel=1e-13
    )


# -- values and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 9, V - 1])
@pytest.mark.parametrize("mean_of", MEANS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_values_and_gradients(alpha, temperature, mean_of, k, dtype) -> None:
    case = make_case().to(dtype)
    targets = make_targets(case, k, temperature, mean_of)
    p = mixture(case, temperature, mean_of)
    expected = reference(case, p, targets.token_ids_NK, alpha, temperature)
    assert_close(ours(case, targets, alpha, temperature), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_tokens", [1, 93, 94, 95, None])
def test_any_chunk_size(chunk_tokens) -> None:
    case = make_case()
    targets = make_targets(case, 9, 2.0)
    expected = reference(case, mixture(case, 2.0, "logits"), targets.token_ids_NK, 0.3, 2.0)
    assert_close(ours(case, targets, 0.3, 2.0, chunk_tokens=chunk_tokens), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean_of", MEANS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_all_tokens_kept_is_the_exact_loss(temperature, mean_of, dtype) -> None:
    case = make_case().to(dtype)
    exact = ours(case, case.teachers, 0.3, temperature, mean_of=mean_of)
    got = ours(case, make_targets(case, V, temperature, mean_of), 0.3, temperature)
    assert_close(got, exact, TOLERANCE[dtype])


def test_the_error_shrinks_as_more_tokens_are_kept() -> None:
    """And the KL never exceeds the exact one: merging outcomes loses information."""
    case = make_case()
    exact = ours(case, case.teachers, 0.0, 1.0)
    got = [ours(case, make_targets(case, k, 1.0), 0.0, 1.0) for k in (1, 2, 4, 8, 16, 32, 64, V)]
    losses = [outcome.kl_sum.item() for outcome in got]
    assert all(a < b for a, b in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(exact.kl_sum.item(), rel=1e-12)
    errors = [relative_error(outcome.gradients[1], exact.gradients[1]) for outcome in got]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[0] > 0.1
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck(temperature) -> None:
    """Against finite differences of our own values, free of any derivation."""
    case = make_case()
    small = replace(case, hidden=case.hidden[:6], labels=case.labels[:6], valid=case.valid[:6])
    targets = make_targets(case, 3, temperature)
    targets = TopKTargets(targets.token_ids_NK[:6], targets.log_probs_NK[:6])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return distillation_loss(
            hidden,
            Head(weight, bias),
            small.labels,
            small.valid,
            targets,
            alpha=0.3,
            temperature=temperature,
            mean_of="logits",
            vocab_size=V,
            chunk_tokens=4,
            **COUNTS,
        ).loss

    leaves = [t.requires_grad_() for t in (small.hidden, small.weight, small.bias)]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


# -- what is hard to compute -----------------------------------------------------------------------


@pytest.mark.parametrize("far", [80.0, -80.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_student_and_teachers_80_apart(temperature, far) -> None:
    """−80: the student gives the whole tail e^−80 (at T 0.5: e^−160, in fp32 no number at all);
    +80: it gives one token of the tail everything, and the k as little."""
    case = make_case()
    ids = make_targets(case, 9, temperature).token_ids_NK
    kept = torch.zeros(V, dtype=torch.bool).index_fill(0, ids[0].long(), True)
    case.hidden = case.hidden[:1].expand(N, D).clone()
    case.teachers = [replace(t, hidden_ND=t.hidden_ND[:1].expand(N, -1)) for t in case.teachers]
    case.bias[:V] = torch.where(kept, 0.0, -80.0)
    if far > 0:
        case.bias[:V] = 0.0
        case.bias[int((~kept).nonzero()[0])] = 80.0
    case = case.to(torch.float32)
    targets = make_targets(case, 9, temperature)
    p = mixture(case, temperature, "logits")
    expected = reference(case, p, targets.token_ids_NK, 0.3, temperature)
    # Logits of 80 are rounded to 5e-6, and T = 0.5 doubles that.
    assert_close(ours(case, targets, 0.3, temperature), expected, 2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teachers_that_leave_the_tail_nothing(temperature) -> None:
    """A sure ensemble: the k have all of p, the tail's part is 0 and no 0 · log 0."""
    case = make_case()
    case.teachers = [replace(t, hidden_ND=t.hidden_ND * 1e3) for t in case.teachers]
    targets = make_targets(case, 9, temperature)
    left = 1 - targets.log_probs_NK.exp().sum(-1)
    assert (left <= 0).any()
    p = mixture(case, temperature, "logits")
    expected = reference(case, p, targets.token_ids_NK, 0.3, temperature)
    assert_close(ours(case, targets, 0.3, temperature), expected, 1e-9)


STORED = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("ids_dtype", [torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("stored", STORED, ids=["fp32", "fp16", "bf16"])
def test_targets_stored_narrowly(stored, ids_dtype) -> None:
    """Log-probabilities of about −2 are off by 2^-11 and 2^-8 of that, and sums exceed 1."""
    case = make_case()
    targets = make_targets(case, 110, 1.0)
    narrow = TopKTargets(targets.token_ids_NK.to(ids_dtype), targets.log_probs_NK.to(stored))
    if stored != torch.float32:
        assert (narrow.log_probs_NK.double().exp().sum(-1) > 1).any()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[stored]
    got, expected = (ours(case, each, 0.0, 1.0) for each in (narrow, targets))
    assert relative_error(got.kl_sum, expected.kl_sum) < tolerance
    assert relative_error(got.gradients[1], expected.gradients[1]) < tolerance


def test_what_lies_at_positions_not_valid_has_no_effect() -> None:
    """Not even ids out of range or repeated; the cross-entropy there is still counted."""
    case = make_case()
    case.labels[-3] = 5  # labelled but not valid
    targets = make_targets(case, 9, 2.0)
    expected = ours(case, targets, 0.3, 2.0)
    spoilt = replace(case, hidden=case.hidden.clone())
    spoilt.hidden[-1] = torch.nan
    ids, log_probs = targets.token_ids_NK.clone(), targets.log_probs_NK.clone()
    ids[-7:], log_probs[-7:] = 10**6, torch.nan
    got = ours(spoilt, TopKTargets(ids, log_probs), 0.3, 2.0)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-13)
    assert all(
        relative_error(a, b) < 1e-13 for a, b in zip(got.gradients, expected.gradients, strict=True)
    )
