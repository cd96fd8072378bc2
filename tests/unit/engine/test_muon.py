"""Muon's step against torch's own, and which parameters are its."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from babyllama_ds import ranks
from babyllama_ds.engine import muon
from babyllama_ds.engine.muon import MOMENTUM, AdamWWithMuon, Matrix, layer_matrices, orthogonalised
from babyllama_ds.spec.training import Muon, TrainingSpec

SHAPES = [(12, 12), (40, 24), (24, 40), (7, 3), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_to_about_one(shape: tuple[int, int]) -> None:
    """By the polynomial of the iteration, applied to each singular value in float64."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.max() < 1.3
    assert values.min() > 0.3
    expected = left @ values.diag() @ right
    (ours,) = orthogonalised(matrix[None], torch.float32)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5)


def test_no_gradient_is_no_step() -> None:
    assert not orthogonalised(torch.zeros(2, 4, 6), torch.bfloat16).any()


class Linears(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def spec(**changes: Any) -> TrainingSpec:
    values = {"batch_windows": 4, "epochs": 1.0, "learning_rate": 1e-2, "weight_decay": 0.3}
    return TrainingSpec(**{**values, "muon": Muon(learning_rate=5e-2, momentum=0.9), **changes})


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_a_step_is_torchs(shape: tuple[int, int], tiny_model: Callable[..., Any]) -> None:
    """A matrix that one rank owns whole, in the middle of its slice."""
    generator = torch.Generator().manual_seed(2)
    theirs = nn.Parameter(torch.randn(shape, generator=generator))
    before, size = 5, theirs.numel()
    ours = nn.Parameter(torch.zeros(before + size + 3))
    ours.data[before : before + size] = theirs.detach().flatten()
    optimizer = AdamWWithMuon(Linears(tiny_model("llama")), spec())
    (group, *_) = optimizer.param_groups
    group["params"] = [ours]
    optimizer.param_groups = [group]
    optimizer.state[ours][MOMENTUM] = torch.zeros_like(ours)
    optimizer._dtype = torch.bfloat16
    optimizer._matrices[ours] = [
        Matrix(theirs.shape, inputs_first=False, shared=False, start=0, at=before, length=size)
    ]
    torchs = torch.optim.Muon([theirs], lr=5e-2, momentum=0.9, weight_decay=0.3)
    for _ in range(4):
        theirs.grad = torch.randn(shape, generator=generator)
        ours.grad = torch.zeros_like(ours)
        ours.grad[before : before + size] = theirs.grad.flatten()
        group["lr"] = 5e-2
        torchs.step()
        optimizer.step()
    torch.testing.assert_close(
        ours.detach()[before : before + size].view(shape), theirs.detach(), rtol=1e-6, atol=1e-6
    )
    assert not ours[:before].any()
    assert not ours[before + size :].any()


@pytest.mark.parametrize("together", [1, 3 * 40 * 24, 2**24])
def test_matrices_worked_on_together_are_each_as_if_alone(
    together: int, muon_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several of each shape, in turns, with rows that are outputs or inputs."""
    monkeypatch.setattr(muon, "TOGETHER", together)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=generator) for shape in 4 * SHAPES]
    gradients = [torch.randn(shape, generator=generator) for shape in 4 * SHAPES]
    optimizer, ours, matrices = muon_of(spec(), weights, gradients)
    optimizer.param_groups[0]["lr"] = 5e-2
    optimizer.step()
    for one, weight, gradient in zip(matrices, weights, gradients, strict=True):
        outputs, inputs = reversed(one.shape) if one.inputs_first else one.shape
        expected = weight * (1 - 5e-2 * 0.3)
        expected -= 5e-2 * max(1, outputs / inputs) ** 0.5 * alone(gradient)
        found = one.owned(ours.detach()).view(one.shape)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def alone(gradient: Tensor) -> Tensor:
    return orthogonalised(gradient[None], torch.float32)[0]


def test_rates_follow_the_schedule_and_keep_their_ratio(tiny_model: Callable[..., Any]) -> None:
    optimizer = AdamWWithMuon(Linears(tiny_model("llama")), spec())
    ratios = [group.get("of_rate", 1.0) for group in optimizer.param_groups]
    assert ratios == [5.0, 1.0, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrices_of_layers_and_nothing_else(
    kind: str, tied: bool, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[weight]: inputs_first for weight, inputs_first in layer_matrices(Linears(model))}
    layers = {"llama": "model.layers.", "gpt2": "transformer.h."}[kind]
    expected = {n for p, n in names.items() if n.startswith(layers) and p.dim() == 2}
    assert set(found) == expected
    assert set(found.values()) == {kind == "gpt2"}
    groups = AdamWWithMuon(Linears(model), spec()).param_groups
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(names)


def test_a_matrix_that_ranks_share(tiny_model: Callable[..., Any], monkeypatch: Any) -> None:
    """Two ranks, one after another: what one has of the update, the other is given."""
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(4)
    whole = torch.randn(6, 4, generator=generator)
    gradient = torch.randn(6, 4, generator=generator)
    cut = 10
    pieces = [(0, cut), (cut, 24 - cut)]
    parts: list[Tensor] = []

    def give(tensor: Tensor) -> None:
        tensor.copy_((gradient * (1 - 0.9) + 0.9 * (1 - 0.9) * gradient).flatten())

    monkeypatch.setattr(dist, "all_reduce", give)
    for start, length in pieces:
        ours = nn.Parameter(whole.flatten()[start : start + length].clone())
        optimizer = AdamWWithMuon(Linears(tiny_model("llama")), spec())
        (group, *_) = optimizer.param_groups
        group |= {"params": [ours], "lr": 5e-2}
        optimizer.param_groups = [group]
        optimizer.state[ours][MOMENTUM] = torch.zeros_like(ours)
        optimizer._matrices[ours] = [
            Matrix(whole.shape, inputs_first=False, shared=True, start=start, at=0, length=length)
        ]
        ours.grad = gradient.flatten()[start : start + length].clone()
        optimizer.step()
        parts.append(ours.detach())
    expected = whole * (1 - 5e-2 * 0.3)
    expected -= 5e-2 * (6 / 4) ** 0.5 * alone(gradient)
    torch.testing.assert_close(torch.cat(parts).view(6, 4), expected, rtol=1e-5, atol=1e-6)


def test_ranks_meet_over_the_matrices_that_they_share(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks own a third each of 30 numbers: of the second matrix two have a part, of the
    first and the third one. Who has none takes part in its sum too, or the others would wait."""
    sizes, third = (6, 12, 8, 4), 10
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    parameters = [nn.Parameter(torch.zeros(2, size // 2)) for size in sizes]
    owned = [
        [
            max(0, min(start + size, third * (rank + 1)) - max(start, third * rank))
            for rank in range(3)
        ]
        for start, size in zip(starts, sizes, strict=True)
    ]
    assert owned == [[6, 0, 0], [4, 8, 0], [0, 2, 6], [0, 0, 4]]
    lengths = [list(of_rank) for of_rank in zip(*owned, strict=True)]
    monkeypatch.setattr(ranks, "gather_objects", lambda mine: mine in lengths and lengths)
    optimizer = AdamWWithMuon(Linears(tiny_model("llama")), spec())
    optimizer._inputs_first = dict.fromkeys(parameters, False)
    for rank in range(3):
        for parameter, start, of_ranks in zip(parameters, starts, owned, strict=True):
            first, length = max(start, third * rank), of_ranks[rank]
            of_weight = SimpleNamespace(numel=length, start=first - start)
            of_slice = SimpleNamespace(numel=length, start=first - third * rank)
            mapping = SimpleNamespace(lp_fragment_address=of_weight, hp_fragment_address=of_slice)
            parameter._hp_mapping = mapping if length else None  # type: ignore[attr-defined]
        found = list(optimizer._owned(parameters))
        assert [one.shape.numel() for one in found if one.shared] == [12, 8]
        whole = [one.shape.numel() for one in found if not one.shared]
        assert whole == {0: [6], 1: [], 2: [4]}[rank]
        assert sum(one.length for one in found) == third
        places = {0: [(0, 0, 6), (6, 0, 4)], 1: [(0, 4, 8), (8, 0, 2)], 2: [(0, 2, 6), (6, 0, 4)]}
        assert [(one.at, one.start, one.length) for one in found if one.length] == places[rank]
