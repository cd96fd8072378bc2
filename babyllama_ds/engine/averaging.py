"""A moving average of weights: a rank's fp32 partitions enter; their average, step by step, leaves.

    a_0 = w_0        a_t = d_t a_{t-1} + (1 - d_t) w_t

w_t are the fp32 master weights after step t, and d_t is the decay; with a ramp, the smaller of it
and (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage with `num_updates`. Polyak and
Juditsky ("Acceleration of stochastic approximation by averaging", 1992) average all weights alike;
the exponential form is that of Tarvainen and Valpola (arXiv 1703.01780, section 2) and of GPT-BERT.

Each rank averages what it owns: under ZeRO the memory, 4 bytes a parameter, is divided by ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from babyllama_ds.spec.training import MovingAverage


class WeightAverage:
    """The average of some tensors that are updated in place."""

    def __init__(self, spec: MovingAverage, weights: Sequence[Tensor]) -> None:
        self._spec = spec
        self._weights = list(weights)
        self.values = [weight.detach().clone() for weight in weights]
        """The average, a tensor for each of the weights."""
        self.updates = 0
        """Steps that are in it."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after another step."""
        self.updates += 1
        torch._foreach_lerp_(self.values, self._weights, 1 - self.decay(self.updates))

    def decay(self, step: int) -> float:
        """d_t of step `step`, counted from 1."""
        if not self._spec.ramp:
            return self._spec.decay
        return min(self._spec.decay, (1 + step) / (10 + step))
