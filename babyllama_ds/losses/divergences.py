"""How far the student is from its teachers: divergences other than the forward KL, row by row.

    `reverse_kl`           KL(q ‖ p)                     MiniLLM (arXiv 2306.08543, section 2)
    `jensen_shannon`       β KL(p ‖ m) + (1 − β) KL(q ‖ m),   m = β p + (1 − β) q
                                                         GKD (arXiv 2306.13649, eq. 1)
    `skewed_forward_kl`    KL(p ‖ m),   m = α p + (1 − α) q
    `skewed_reverse_kl`    KL(q ‖ m),   m = (1 − α) p + α q
                                                         DistiLLM (arXiv 2402.03898, section 3.1)

with the teachers' mixture p and the student's q = softmax(u), u = z/T. Each is a sum over tokens
of F(p, q), so that with its slope w = ∂F/∂q, of which a constant of the row makes no difference,

    ∂D/∂u = q (w − Σ q w)

In the ratio d = log p − log q, and a the share of p in m, all that the last three need is one
softplus L = log(1 + exp λ) of λ = d + log(a / (1 − a)):

    log(p/m) = λ − L − log a         a p/m = exp(λ − L)
    log(q/m) = −L − log(1 − a)       (1 − a) q/m = exp(−L)

so that nothing under- or overflows, however sure student and teachers are of other tokens.

log p, log q and q of a tile enter, in the work spaces' dtype; the divergence of each position
leaves, and its gradient with respect to u takes the place of log p.

Shapes: R positions of a tile, V vocabulary, 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DivergenceKind = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"
]


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and the share of the teachers in the m that it is taken to."""

    kind: DivergenceKind = "forward_kl"
    teachers_share: float | None = None
    """a: β of `jensen_shannon`, α of `skewed_forward_kl`, 1 − α of `skewed_reverse_kl`, in (0, 1);
    none for the two that have no m."""


FORWARD_KL = Divergence()
"""KL(p ‖ q), the published one: `rows.py` has it, in fewer passes."""


def divergence_rows(
    divergence: Divergence,
    log_p_RV: Tensor,
    log_q_RV: Tensor,
    q_RV: Tensor,
    spare_RV: Sequence[Tensor],
) -> Tensor:
    """The divergence of each position, `[R, 1]`; `log_p_RV` becomes its gradient with respect to u.

    `log_q_RV` and `spare_RV`, `num_spare` spaces, are overwritten; `q_RV` is not.
    """
    if divergence.kind == "reverse_kl":
        return _reverse_kl(log_p_RV, log_q_RV, q_RV, spare_RV[0])
    share = divergence.teachers_share
    assert share is not None, "a divergence from a mixture of both"
    of_m = {
        "jensen_shannon": _jensen_shannon,
        "skewed_forward_kl": _skewed_forward_kl,
        "skewed_reverse_kl": _skewed_reverse_kl,
    }[divergence.kind]
    return of_m(share, log_p_RV, log_q_RV, q_RV, spare_RV)


def num_spare(kind: DivergenceKind) -> int:
    """How many spaces `divergence_rows` asks for beside what it is given."""
    return 1 if kind == "reverse_kl" else 2


def _reverse_kl(d: Tensor, log_q: Tensor, q: Tensor, spare: Tensor) -> Tensor:
    """F = q log(q/p), w = log(q/p)."""
    w = torch.sub(log_q, d, out=d)
    return _pulled(w, q, spare)


def _jensen_shannon(
    beta: float, d: Tensor, log_q: Tensor, q: Tensor, spaces: Sequence[Tensor]
) -> Tensor:
    """F = β p log(p/m) + (1 − β) q log(q/m), w = (1 − β) log(q/m)."""
    p, spare = torch.exp(d, out=spaces[0]), spaces[1]
    log_p_m, softplus = _ratios(beta, d, log_q, spare)
    of_p_R1 = log_p_m.mul_(p).sum(-1, keepdim=True)
    w = torch.mul(softplus, -1, out=d).sub_(math.log1p(-beta)).mul_(1 - beta)
    return beta * of_p_R1 + _pulled(w, q, spare)


def _skewed_forward_kl(
    alpha: float, d: Tensor, log_q: Tensor, q: Tensor, spaces: Sequence[Tensor]
) -> Tensor:
    """F = p log(p/m), w = −(1 − α) p/m."""
    p, spare = torch.exp(d, out=spaces[0]), spaces[1]
    log_p_m, _ = _ratios(alpha, d, log_q, spare)
    value_R1 = p.mul_(log_p_m).sum(-1, keepdim=True)
    w = log_p_m.exp_().mul_(alpha - 1)
    _pulled(w, q, spare)
    return value_R1


def _skewed_reverse_kl(
    share: float, d: Tensor, log_q: Tensor, q: Tensor, spaces: Sequence[Tensor]
) -> Tensor:
    """F = q log(q/m), w = log(q/m) − α q/m."""
    spare = spaces[0]
    _, softplus = _ratios(share, d, log_q, spare)
    log_q_m = torch.mul(softplus, -1, out=d).sub_(math.log1p(-share))
    value_R1 = torch.mul(log_q_m, q, out=spare).sum(-1, keepdim=True)
    w = log_q_m.sub_(softplus.neg_().exp_())
    _pulled(w, q, spare)
    return value_R1


def _ratios(share: float, log_p: Tensor, log_q: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """log(p/m) in the place of log p, and L in that of log q.

    L = max(λ, 0) + log(1 + exp −|λ|), by operators that round alike at any place of a tensor: with
    torch's own logaddexp numbers would follow the size of a tile, which is the machine's.
    """
    excess = log_p.sub_(log_q).add_(math.log(share) - math.log1p(-share))
    softplus = torch.abs(excess, out=log_q).neg_().exp_().log1p_()
    softplus.add_(torch.clamp(excess, min=0, out=spare))
    return excess.sub_(softplus).sub_(math.log(share)), softplus


def _pulled(w: Tensor, q: Tensor, spare: Tensor) -> Tensor:
    """Σ q w of each row, `[R, 1]`; w becomes q (w − Σ q w)."""
    mean_R1 = torch.mul(w, q, out=spare).sum(-1, keepdim=True)
    w.sub_(mean_R1).mul_(q)
    return mean_R1
