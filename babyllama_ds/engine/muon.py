"""Muon beside AdamW over ZeRO's partitions: fp32 gradients enter, orthogonal steps leave.

For a matrix W of a layer with gradient G (averaged over ranks, clipped), at learning rate r:

    B <- m B + (1 - m) G        U = m B + (1 - m) G        (momentum m, in Nesterov's form)
    W <- (1 - r * weight_decay) W - r * sqrt(max(1, outputs / inputs)) * NS(U)

NS takes the singular values of U to about one by five steps of a quintic Newton-Schulz iteration
(Jordan et al., kellerjordan.github.io/posts/muon, 2024; `torch.optim.Muon` computes the same). All
other parameters, the embedding and the head among them, are AdamW's.

ZeRO gives each rank a slice of all matrices in a row, whose ends may lie inside a matrix. The U of
such a matrix is put together by an all-reduce; each rank orthogonalises what it owns a part of, so
the work is divided by ranks, and so is the momentum, which lies in slices as AdamW's moments do.
Matrices of one shape are orthogonalised together: one by one, small ones would keep a card waiting
for launches longer than for the rest of the step.

DeepSpeed has a Muon of its own. It is not used: docs/training.md says what was measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from babyllama_ds import ranks
from babyllama_ds.spec.training import TrainingSpec

MOMENTUM = "momentum_buffer"
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPSILON = 1e-7
TOGETHER = 2**24
"""Numbers orthogonalised at once, if not more in one matrix."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer, and where this rank's part of it lies."""

    shape: torch.Size
    inputs_first: bool
    """Whether rows are inputs (transformers' `Conv1D`), not outputs."""
    shared: bool
    """Whether several ranks own a part of it."""
    start: int
    """First owned element of the matrix."""
    at: int
    """Where that element lies in the rank's slice."""
    length: int
    """Owned elements; may be none of a shared matrix."""

    def owned(self, flat: Tensor) -> Tensor:
        """This rank's part of the matrix, in a rank's slice of all of them."""
        return flat.narrow(0, self.at, self.length)


class AdamWWithMuon(torch.optim.AdamW):
    """AdamW, and Muon for groups with `muon` set; `cut` says where ZeRO's slices end."""

    def __init__(self, module: nn.Module, training: TrainingSpec) -> None:
        assert training.muon is not None, "AdamW alone would do"
        self._matrices: dict[Tensor, list[Matrix]] = {}
        self._dtype = torch.float32
        self._inputs_first = dict(layer_matrices(module))
        others = [
            parameter
            for parameter in module.parameters()
            if parameter.requires_grad and parameter not in self._inputs_first
        ]
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in self._inputs_first if p.requires_grad],
                "weight_decay": training.weight_decay,
                "muon": True,
                "momentum": training.muon.momentum,
                "of_rate": training.muon.learning_rate / training.learning_rate,
            },
            {
                "params": [p for p in others if p.dim() > 1],
                "weight_decay": training.weight_decay,
                "muon": False,
            },
            {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, "muon": False},
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            fused=True,
        )

    def cut(self, zero: Any) -> None:
        """Learn where the slices of ZeRO's optimizer end. A collective."""
        self._dtype = zero.dtype
        for group, parameters in zip(self.param_groups, zero.bit16_groups, strict=True):
            if group["muon"]:
                self._matrices[group["params"][0]] = list(self._owned(parameters))

    def _owned(self, parameters: list[nn.Parameter]) -> Iterator[Matrix]:
        mapped = [parameter._hp_mapping for parameter in parameters]  # type: ignore[attr-defined]
        lengths = [one.lp_fragment_address.numel if one else 0 for one in mapped]
        of_ranks = list(zip(*ranks.gather_objects(lengths), strict=True))
        for parameter, mapping, everywhere in zip(parameters, mapped, of_ranks, strict=True):
            shared = any(0 < length < parameter.numel() for length in everywhere)
            if shared or mapping is not None:
                yield Matrix(
                    shape=parameter.shape,
                    inputs_first=self._inputs_first[parameter],
                    shared=shared,
                    start=mapping.lp_fragment_address.start if mapping else 0,
                    at=mapping.hp_fragment_address.start if mapping else 0,
                    length=mapping.lp_fragment_address.numel if mapping else 0,
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every group from its gradients. A collective."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._orthogonal_step(group)
        # DeepSpeed, too, steps group by group, by giving each in turn.
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        (weights,) = group["params"]
        momentum, rate = group["momentum"], group["lr"]
        moving: Tensor = self.state[weights][MOMENTUM]
        moving.lerp_(weights.grad, 1 - momentum)
        update = weights.grad.lerp(moving, momentum)
        weights.mul_(1 - rate * group["weight_decay"])
        # Also of matrices that only others own a part of: they wait for this rank.
        wholes = [(one, _whole(one.owned(update), one)) for one in self._matrices[weights]]
        for alike in _batches([(one, whole) for one, whole in wholes if one.length]):
            orthogonal = orthogonalised(torch.stack([whole for _, whole in alike]), self._dtype)
            for (one, _), direction in zip(alike, orthogonal.flatten(1), strict=True):
                outputs, inputs = reversed(one.shape) if one.inputs_first else one.shape
                one.owned(weights).add_(
                    direction.narrow(0, one.start, one.length),
                    alpha=-rate * math.sqrt(max(1, outputs / inputs)),
                )


def _whole(own: Tensor, matrix: Matrix) -> Tensor:
    """The matrix that ranks own parts of. A collective where they are several."""
    if not matrix.shared:
        return own.view(matrix.shape)
    whole = own.new_zeros(matrix.shape.numel())
    whole.narrow(0, matrix.start, matrix.length).copy_(own)
    dist.all_reduce(whole)
    return whole.view(matrix.shape)


def _batches(
    matrices: Sequence[tuple[Matrix, Tensor]],
) -> Iterator[list[tuple[Matrix, Tensor]]]:
    """Matrices of one shape, as many as shall be worked on together."""
    by_shape: defaultdict[torch.Size, list[tuple[Matrix, Tensor]]] = defaultdict(list)
    for one, whole in matrices:
        by_shape[one.shape].append((one, whole))
    for shape, alike in by_shape.items():
        count = max(1, TOGETHER // shape.numel())
        for first in range(0, len(alike), count):
            yield alike[first : first + count]


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """[matrices, rows, columns] with singular values of about one, computed in `dtype`."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    wide = (matrices.mT if tall else matrices).to(dtype)
    # No singular value is above one.
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_STEPS):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide.mT if tall else wide


def orthogonalising_flops(shape: Sequence[int]) -> int:
    """FLOPs of `orthogonalised` for one matrix: three products in each step of the iteration."""
    short, long = sorted(shape)
    return _STEPS * (4 * short**2 * long + 2 * short**3)


def layer_matrices(module: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Weights of linear layers but the head's, each with whether its rows are inputs."""
    models = (part for part in module.modules() if isinstance(part, PreTrainedModel))
    model: Any = next(models)
    kept_out = {model.get_output_embeddings().weight, model.get_input_embeddings().weight}
    for part in module.modules():
        if isinstance(part, nn.Linear | Conv1D):
            weight: Any = part.weight
            if weight not in kept_out:
                yield weight, isinstance(part, Conv1D)
