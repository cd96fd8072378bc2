"""What the elementwise half of the loss is given for each position, by PyTorch's operators (`rows`)
and by the Triton kernel (`triton_rows`) alike.

Shapes: C positions of the chunk, 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_TEACHERS = 8
"""Whose logits the Triton kernel has places for."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What multiplies ∂CE/∂z and T · ∂KL/∂z in each position's gradient; 0 leaves one out."""

    ce_C1: Tensor
    kl_C1: Tensor
    z_C1: Tensor | None = None
    """What multiplies the z-loss; none: there is none."""

    def of(self, rows: slice) -> Factors:
        """The factors of some positions."""
        return Factors(
            ce_C1=self.ce_C1[rows],
            kl_C1=self.kl_C1[rows],
            z_C1=None if self.z_C1 is None else self.z_C1[rows],
        )

    def hard_C1(self, *log_z_C1: Tensor) -> Tensor:  # noqa: N802 - named by its shape
        """What multiplies softmax(z), for CE and z-loss; of log Z, its summands."""
        if self.z_C1 is None:
            return self.ce_C1
        return self.ce_C1 + 2 * self.z_C1 * sum(log_z_C1)
