"""The distillation loss as it is defined: plain code with autograd, and cases to try it on.

The reference forms every logit of every model, writes each softmax and each divergence as it is
defined in its paper, and knows nothing of chunks, tiles or ratios. Compared are the loss, all sums,
and the gradients of hidden states, head and bias; on any device, in any dtype.

Shapes: N positions, D hidden size, V vocabulary, P rows of a head (P ≥ V), K teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babyllama_ds.losses.distillation import TeacherStates, distillation_loss
from babyllama_ds.losses.divergences import FORWARD_KL, Divergence
from babyllama_ds.losses.heads import Head
from references.errors import relative_error

N, D, V, P = 94, 31, 123, 128
WIDTHS, VOTES = (17, 40, 31), (1.0, 2.5, 0.7)
MEANS = ("logits", "probabilities")
TEMPERATURES = (0.5, 1.0, 2.0)
COUNTS = {"ce_count": 77, "kl_count": 5}
BETA, SKEW = 0.3, 0.1
DIVERGENCES = {
    "forward_kl": FORWARD_KL,
    "reverse_kl": Divergence("reverse_kl"),
    "jensen_shannon": Divergence("jensen_shannon", BETA),
    "skewed_forward_kl": Divergence("skewed_forward_kl", SKEW),
    "skewed_reverse_kl": Divergence("skewed_reverse_kl", 1 - SKEW),
}
OTHERS = [name for name in DIVERGENCES if name != "forward_kl"]


# -- a problem, in float64 -------------------------------------------------------------------------


@dataclass
class Case:
    """Padded heads, a bias, labels missing, a window's end padded, teachers of several widths."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    valid: Tensor
    teachers: list[TeacherStates]
    vocab_size: int

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Case:
        def cast(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().to(device, dtype)

        return Case(
            cast(self.hidden),
            cast(self.weight),
            cast(self.bias),
            self.labels.to(device),
            self.valid.to(device),
            [
                TeacherStates(
                    cast(t.hidden_ND), Head(cast(t.head.weight_PD), cast(t.head.bias_P)), t.weight
                )
                for t in self.teachers
            ],
            self.vocab_size,
        )


def make_case(
    *,
    num_teachers: int = 3,
    votes: tuple[float, ...] = VOTES,
    biased: bool = True,
    seed: int = 0,
    sizes: tuple[int, int, int, int] = (N, D, V, P),
    widths: tuple[int, ...] = WIDTHS,
) -> Case:
    """In float64, on the CPU; `sizes` are N, D, V and P."""
    num_positions, width, vocab_size, num_rows = sizes
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * std

    labels = torch.randint(0, vocab_size, (num_positions,), generator=rng)
    valid = torch.ones(num_positions, dtype=torch.bool)
    labels[9::10] = labels[3:6] = -100
    valid[-7:] = False
    labels[-8:] = -100
    return Case(
        hidden=normal(num_positions, width),
        weight=normal(num_rows, width, std=3 / width**0.5),
        bias=normal(num_rows) if biased else None,
        labels=labels,
        valid=valid,
        teachers=[
            TeacherStates(
                normal(num_positions, d),
                Head(
                    normal(num_rows + k, d, std=3 / d**0.5),
                    normal(num_rows + k) if biased else None,
                ),
                vote,
            )
            for k, (d, vote) in enumerate(
                zip(widths[:num_teachers], votes[:num_teachers], strict=True)
            )
        ],
        vocab_size=vocab_size,
    )


# -- the reference ---------------------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    m = BETA * p + (1 - BETA) * q
    return BETA * kl(p, m) + (1 - BETA) * kl(q, m)


PLAIN = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": jensen_shannon,
    "skewed_forward_kl": lambda p, q: kl(p, SKEW * p + (1 - SKEW) * q),
    "skewed_reverse_kl": lambda p, q: kl(q, (1 - SKEW) * p + SKEW * q),
}


@dataclass
class Outcome:
    loss: Tensor
    ce_sum: Tensor
    soft_sum: Tensor
    z_sum: Tensor | None
    gradients: tuple[Tensor, ...]

    def errors(self, right: Outcome) -> dict[str, float]:
        """‖got − right‖ / ‖right‖ of each number and each whole gradient."""
        names = ("hidden", "weight", "bias")[: len(self.gradients)]
        pairs = {
            "loss": (self.loss, right.loss),
            "ce_sum": (self.ce_sum, right.ce_sum),
            "soft_sum": (self.soft_sum, right.soft_sum),
            **{n: (a, b) for n, a, b in zip(names, self.gradients, right.gradients, strict=True)},
        }
        if right.z_sum is not None:
            pairs["z_sum"] = (self.z_sum, right.z_sum)
        return {name: relative_error(*pair) for name, pair in pairs.items()}


def leaves_of(case: Case) -> list[Tensor]:
    given = (t for t in (case.hidden, case.weight, case.bias) if t is not None)
    return [t.detach().clone().requires_grad_() for t in given]


def plain_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int = V
) -> Tensor:
    logits = hidden @ weight[:vocab_size].T
    return logits if bias is None else logits + bias[:vocab_size]


def reference(
    case: Case,
    kind: str,
    *,
    alpha: float,
    temperature: float,
    mean_of: str,
    z_loss: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Outcome:
    """In float64; or logits in the case's dtype and everything after them in `dtype`."""
    if dtype == torch.float64:
        case = case.to(dtype)
    leaves = leaves_of(case)
    bias = leaves[2] if case.bias is not None else None
    z = plain_logits(leaves[0], leaves[1], bias, case.vocab_size).to(dtype)
    ts = [
        plain_logits(t.hidden_ND, t.head.weight_PD, t.head.bias_P, case.vocab_size).to(dtype)
        for t in case.teachers
    ]
    votes = [t.weight for t in case.teachers]
    if mean_of == "logits":
        mean = sum(v * t for v, t in zip(votes, ts, strict=True)) / sum(votes)
        p = F.softmax(mean / temperature, -1)
    else:
        each = [v * F.softmax(t / temperature, -1) for v, t in zip(votes, ts, strict=True)]
        p = sum(each) / sum(votes)
    q = F.softmax(z / temperature, -1)
    soft_sum = PLAIN[kind](p, q)[case.valid].sum()
    ce_sum = F.cross_entropy(z, case.labels, ignore_index=-100, reduction="sum")
    z_sum = z.logsumexp(-1).square()[case.labels != -100].sum()
    loss = alpha * ce_sum / COUNTS["ce_count"]
    loss = loss + (1 - alpha) * temperature**2 * soft_sum / COUNTS["kl_count"]
    loss = loss + z_loss * z_sum / COUNTS["ce_count"]
    gradients = torch.autograd.grad(loss, leaves)
    return Outcome(loss.detach(), ce_sum, soft_sum, z_sum if z_loss else None, gradients)


def ours(case: Case, kind: str, *, targets: Any = None, **settings: Any) -> Outcome:
    leaves = leaves_of(case)
    result = distillation_loss(
        leaves[0],
        Head(leaves[1], leaves[2] if case.bias is not None else None),
        case.labels,
        case.valid,
        case.teachers if targets is None else targets,
        vocab_size=case.vocab_size,
        divergence=DIVERGENCES[kind],
        **COUNTS,
        **{"chunk_tokens": 17, **settings},
    )
    gradients = torch.autograd.grad(result.loss, leaves)
    return Outcome(result.loss.detach(), result.ce_sum, result.kl_sum, result.z_sum, gradients)
