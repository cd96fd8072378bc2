from __future__ import annotations

import pytest
import torch

from babyllama_ds.losses.heads import Head, logits


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
