"""How far a student's hidden states are from a teacher's: states enter, a sum with a graph leaves.

    `mse`      |W h − t|² / E          TinyBERT (arXiv 1909.10351, eq. 8)
    `cosine`   1 − cos(W h, t)         DistilBERT (arXiv 1910.01108, section 2)

of each valid position, with the student's state h, the teacher's t, and a matrix W that is trained
with the student. The product runs in the model's dtype, what follows in fp32 (fp64 for fp64
models), by ordinary autograd: an [N, E] is small beside the layers' own activations.

Shapes: N positions (batch and time, flattened), D width of the student, E of the teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

MatchingLoss = Literal["mse", "cosine"]


def hidden_distance_sum(
    student_ND: Tensor, weight_ED: Tensor, teacher_NE: Tensor, valid_N: Tensor, loss: MatchingLoss
) -> Tensor:
    """The sum over valid positions. What lies at the others has no effect, even NaN.

    Nothing of `teacher_NE` itself is kept for backward: it may come from inference mode.
    """
    unused_N1 = ~valid_N[:, None]
    projected_NE = linear(student_ND.masked_fill(unused_N1, 0), weight_ED)
    dtype = torch.promote_types(projected_NE.dtype, torch.float32)
    projected_NE, target_NE = projected_NE.to(dtype), teacher_NE.masked_fill(unused_N1, 0).to(dtype)
    if loss == "mse":
        return (projected_NE - target_NE).square().mean(-1).sum()
    cosines_N = cosine_similarity(projected_NE, target_NE, dim=-1)  # of zeros 0, as its gradient
    return (1 - cosines_N).masked_fill(~valid_N, 0).sum()
