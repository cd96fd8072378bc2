"""The KL over the k most likely tokens and one bucket as it is defined, and cases to try it on.

The reference forms all logits, takes every softmax and the bucket's q as they are defined, and has
autograd find the gradients of hidden states, head and bias; on any device, in any dtype.

Shapes: N positions, D hidden size, V vocabulary, P rows of a head (P ≥ V), K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babyllama_ds.losses.distillation import TeacherStates, distillation_loss
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.topk import TopKTargets, top_k_targets
from references.errors import relative_error

N, D, V, P = 94, 31, 123, 128
VOTES = (1.0, 2.5)
MEANS = ("logits", "probabilities")
TEMPERATURES = (0.5, 1.0, 2.0)
COUNTS = {"ce_count": 77, "kl_count": 5}


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    valid: Tensor
    teachers: list[TeacherStates]

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Case:
        return Case(
            self.hidden.to(device, dtype),
            self.weight.to(device, dtype),
            self.bias.to(device, dtype),
            self.labels.to(device),
            self.valid.to(device),
            [
                TeacherStates(
                    t.hidden_ND.to(device, dtype),
                    Head(t.head.weight_PD.to(device, dtype)),
                    t.weight,
                )
                for t in self.teachers
            ],
        )


def make_case(seed: int = 0) -> Case:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * std

    labels = torch.randint(0, V, (N,), generator=rng)
    valid = torch.ones(N, dtype=torch.bool)
    labels[9::10] = -100
    valid[-7:] = False
    labels[-8:] = -100
    return Case(
        hidden=normal(N, D),
        weight=normal(P, D, std=3 / D**0.5),
        bias=normal(P),
        labels=labels,
        valid=valid,
        teachers=[
            TeacherStates(normal(N, d), Head(normal(P + d, d, std=3 / d**0.5)), vote)
            for d, vote in zip((17, 40), VOTES, strict=True)
        ],
    )


# -- the reference ---------------------------------------------------------------------------------


def mixture(case: Case, temperature: float, mean_of: str) -> Tensor:
    """p of every token, [N, V]."""
    all_logits = [t.hidden_ND.double() @ t.head.weight_PD.double()[:V].T for t in case.teachers]
    votes = [t.weight for t in case.teachers]
    if mean_of == "logits":
        mean = sum(v * z for v, z in zip(votes, all_logits, strict=True)) / sum(votes)
        return F.softmax(mean / temperature, -1)
    parts = [v * F.softmax(z / temperature, -1) for v, z in zip(votes, all_logits, strict=True)]
    return sum(parts) / sum(votes)


def buckets(p: Tensor, ids: Tensor) -> Tensor:
    """[N, K + 1]: the probabilities of the k, and of all others together."""
    is_tail = torch.ones_like(p, dtype=torch.bool).scatter(1, ids.long(), False)
    return torch.cat([p.gather(1, ids.long()), torch.where(is_tail, p, 0).sum(1, keepdim=True)], 1)


def kept(targets: TopKTargets, p: Tensor) -> Tensor:
    """p as targets have it: their own probabilities for the k, the rest as it is in the tail."""
    of_targets = targets.log_probs_NK.double().exp()
    tail = p.scatter(1, targets.token_ids_NK.long(), 0)
    tail = tail * ((1 - of_targets.sum(1, keepdim=True)) / tail.sum(1, keepdim=True))
    return tail.scatter(1, targets.token_ids_NK.long(), of_targets)


@dataclass
class Outcome:
    loss: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    gradients: tuple[Tensor, ...]

    def errors(self, right: Outcome) -> dict[str, float]:
        """‖got − right‖ / ‖right‖ of each number and each whole gradient."""
        pairs = {
            "loss": (self.loss, right.loss),
            "ce_sum": (self.ce_sum, right.ce_sum),
            "kl_sum": (self.kl_sum, right.kl_sum),
            **{
                name: (self.gradients[k], right.gradients[k])
                for k, name in enumerate(("hidden", "weight", "bias"))
            },
        }
        return {name: relative_error(*pair) for name, pair in pairs.items()}


def reference(
    case: Case,
    p: Tensor,
    ids: Tensor,
    alpha: float,
    temperature: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> Outcome:
    """In float64; or logits in the case's dtype and everything after them in `dtype`."""
    if dtype == torch.float64:
        case = case.to(dtype)
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves
    z = (hidden @ weight[:V].T + bias[:V]).to(dtype)
    p = p.to(dtype)
    p_buckets, q_buckets = (buckets(each, ids) for each in (p, F.softmax(z / temperature, -1)))
    kl = (torch.special.xlogy(p_buckets, p_buckets) - p_buckets * q_buckets.log()).sum(-1)
    kl_sum = kl[case.valid].sum()
    ce_sum = F.cross_entropy(z, case.labels, ignore_index=-100, reduction="sum")
    loss = alpha * ce_sum / COUNTS["ce_count"]
    loss = loss + (1 - alpha) * temperature**2 * kl_sum / COUNTS["kl_count"]
    return Outcome(loss.detach(), ce_sum, kl_sum, torch.autograd.grad(loss, leaves))


def ours(case: Case, targets: object, alpha: float, temperature: float, **settings) -> Outcome:
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    result = distillation_loss(
        leaves[0],
        Head(leaves[1], leaves[2]),
        case.labels,
        case.valid,
        targets,
        alpha=alpha,
        temperature=temperature,
        mean_of=settings.pop("mean_of", "logits"),
        vocab_size=V,
        **COUNTS,
        **{"chunk_tokens": 17, **settings},
    )
    gradients = torch.autograd.grad(result.loss, leaves)
    return Outcome(result.loss.detach(), result.ce_sum, result.kl_sum, gradients)


def make_targets(case: Case, k: int, temperature: float, mean_of: str = "logits") -> TopKTargets:
    return top_k_targets(
        case.teachers,
        k=k,
        temperature=temperature,
        mean_of=mean_of,
        vocab_size=V,
        chunk_tokens=17,
    )
