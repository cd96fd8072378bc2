"""How far a result is off."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖, of a whole tensor, since single numbers may be near 0.

    Where nothing is expected but zeros, ‖got‖.
    """
    assert got.shape == exact.shape
    off = torch.linalg.norm(got.double() - exact.double()).item()
    return off / (torch.linalg.norm(exact.double()).item() or 1.0)
