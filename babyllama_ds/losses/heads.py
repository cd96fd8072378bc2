"""A model's output head: final hidden states enter, logits leave.

    logits = hidden · Wᵀ + b        over the rows of W that are real tokens

Embeddings are often padded to a round number of rows. A padding row is no token: its logit is
−inf, which is had by leaving the row out. (A logit of 0 would give it probability.)

Shapes: N positions, D hidden size, V vocabulary, P rows of the embedding (P ≥ V).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """A linear output head; the weight may be the embedding itself (tied)."""

    weight_PD: Tensor
    bias_P: Tensor | None = None

    def rows(self, vocab_size: int) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias `[V]` of the real tokens (views, not copies)."""
        assert vocab_size <= self.weight_PD.shape[0], "the vocabulary exceeds the head's rows"
        return (
            self.weight_PD[:vocab_size],
            None if self.bias_P is None else self.bias_P[:vocab_size],
        )


def logits(hidden_ND: Tensor, head: Head, vocab_size: int) -> Tensor:
    """Logits `[N, V]` in the model's own dtype, by ordinary autograd.

    For generation and small evaluations; losses go through `distillation.py`, which never
    holds more than a chunk of these.
    """
    weight_VD, bias_V = head.rows(vocab_size)
    return torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
