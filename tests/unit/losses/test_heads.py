from __future__ import annotations

import pytest
import torch

from babyllama_ds.losses.heads import Head, logits, logits_into


def test_logits_are_hidden_times_weight_plus_bias_without_the_padding_rows() -> None:
    hidden = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    head = Head(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [9.0, 9.0]]),
        torch.tensor([0.0, 10.0, 0.0, 9.0]),
    )
    expected = torch.tensor([[1.0, 12.0, 3.0], [0.0, 9.0, -1.0]])
    assert torch.equal(logits(hidden, head, vocab_size=3), expected)


def test_without_bias() -> None:
    got = logits(torch.ones(1, 2), Head(torch.eye(2)), vocab_size=2)
    assert torch.equal(got, torch.ones(1, 2))


def test_logits_are_differentiable_and_padding_gets_no_gradient() -> None:
    weight = torch.eye(3, 2).requires_grad_()
    logits(torch.ones(1, 2), Head(weight), vocab_size=2).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))


def test_a_vocabulary_larger_than_the_head_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        Head(torch.eye(2)).rows(3)


def test_an_identity_head_hands_on_what_it_gets() -> None:
    states = torch.arange(6.0).view(2, 3).requires_grad_()
    head = Head.identity(3, torch.float32, torch.device("cpu"))
    got = logits(states, head, vocab_size=2)
    assert torch.equal(got, states[:, :2])
    got.sum().backward()
    assert torch.equal(states.grad, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))


def test_an_identity_heads_weight_tells_shape_and_dtype_and_spoils_products() -> None:
    head = Head.identity(3, torch.bfloat16, torch.device("cpu"))
    assert (head.weight_PD.shape, head.weight_PD.dtype) == ((3, 3), torch.bfloat16)
    assert head.weight_PD.untyped_storage().nbytes() == 2
    assert (torch.ones(1, 3, dtype=torch.bfloat16) @ head.weight_PD.T).isnan().all()


@pytest.mark.parametrize("bias", [None, torch.ones(2, requires_grad=True)])
def test_detached_is_the_same_head_outside_autograd(bias: torch.Tensor | None) -> None:
    head = Head(torch.eye(2, requires_grad=True), bias, states_are_logits=True).detached()
    assert not head.weight_PD.requires_grad
    assert torch.equal(head.weight_PD, torch.eye(2))
    assert (head.bias_P is None) == (bias is None)
    assert bias is None or not head.bias_P.requires_grad
    assert head.states_are_logits


def test_identity_heads_hand_their_states_on_without_the_padding() -> None:
    states = torch.arange(12.0).view(3, 4)
    head = Head.identity(4, states.dtype, torch.device("cpu"))
    got = logits_into(torch.empty(3, 2), states, head)
    assert torch.equal(got, states[:, :2])
