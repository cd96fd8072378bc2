"""A model's output head: final hidden states enter, logits leave.

    logits = hidden · Wᵀ + b        over the rows of W that are real tokens

Embeddings are often padded to a round number of rows. A padding row is no token: its logit is
−inf, which is had by leaving the row out. (A logit of 0 would give it probability.)

Some models do more than that to their logits (they cap, scale or add to them). Of these, the final
hidden states are taken to be the logits that the model itself made, and the head is the identity.

Shapes: N positions, C of a chunk, D hidden size, V vocabulary, P rows of the embedding (P ≥ V).
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
    states_are_logits: bool = False
    """An identity head; its weight tells width and dtype of the states, and nothing else."""

    @classmethod
    def identity(cls, num_rows: int, dtype: torch.dtype, device: torch.device) -> Head:
        """The head of states that are logits already, of P tokens.

        Its weight takes no memory, and being NaN spoils whatever would multiply by it.
        """
        nan = torch.full((), torch.nan, dtype=dtype, device=device)
        return cls(nan.expand(num_rows, num_rows), states_are_logits=True)

    def detached(self) -> Head:
        """The same head, outside autograd."""
        bias_P = None if self.bias_P is None else self.bias_P.detach()
        return Head(self.weight_PD.detach(), bias_P, self.states_are_logits)

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
    if head.states_are_logits:
        return hidden_ND[:, :vocab_size]
    return torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)


def logits_into(buffer_CV: Tensor, hidden_CD: Tensor, head: Head) -> Tensor:
    """Logits of the vocabulary's rows of the head, written into the buffer."""
    vocab_size = buffer_CV.shape[1]
    weight_VD, bias_V = head.rows(vocab_size)
    if head.states_are_logits:
        return buffer_CV.copy_(hidden_CD[:, :vocab_size])
    if bias_V is None:
        return torch.mm(hidden_CD, weight_VD.T, out=buffer_CV)
    return torch.addmm(bias_V, hidden_CD, weight_VD.T, out=buffer_CV)
