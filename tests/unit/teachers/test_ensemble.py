"""Targets are each teacher's own hidden states, head and weight; the loss makes logits of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.losses.heads import logits
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import micro_batch

TOKENS = torch.arange(33).view(3, 11)
MICRO = micro_batch(TOKENS, torch.ones(3, dtype=torch.bool))
VOCAB = 61


@pytest.fixture
def teachers(tiny_model: Callable[..., Any]) -> list[Any]:
    """Two families, two widths; and a third, for two are not yet any number."""
    return [
        tiny_model("llama", seed=1),
        tiny_model("gpt2", seed=2, n_embd=36),
        tiny_model("llama", seed=3),
    ]


@pytest.fixture
def ensemble(alone: torch.device, teachers: list[Any]) -> Ensemble:
    return Ensemble(
        [
            Member(name, FrozenModel(model, device=alone, dtype=torch.bfloat16), weight)
            for name, model, weight in zip("abc", teachers, (1.0, 2.5, 0.5), strict=True)
        ]
    )


@torch.no_grad()
def test_targets_are_the_teachers_own(ensemble: Ensemble, teachers: list[Any]) -> None:
    targets = ensemble.targets(MICRO)
    assert [target.weight for target in targets] == [1.0, 2.5, 0.5]
    assert [target.hidden_ND.shape for target in targets] == [(33, 24), (33, 36), (33, 24)]
    for target, teacher in zip(targets, teachers, strict=True):
        expected = teacher(input_ids=TOKENS).logits.flatten(0, 1)
        assert torch.equal(logits(target.hidden_ND, target.head, VOCAB), expected)
        assert not target.hidden_ND.requires_grad
        assert not target.head.weight_PD.requires_grad


def test_their_bytes_are_those_of_all_weights(ensemble: Ensemble, teachers: list[Any]) -> None:
    """In bf16: two bytes each, of what is shared once."""
    weights = {weight for teacher in teachers for weight in teacher.parameters()}
    assert ensemble.weight_bytes() == 2 * sum(weight.numel() for weight in weights)


def test_targets_go_into_a_loss_with_gradients(
    ensemble: Ensemble, tiny_model: Callable[..., Any]
) -> None:
    """Tensors of inference mode may not be saved for a backward pass, and the loss saves none."""
    from babyllama_ds.losses.distillation import distillation_loss
    from babyllama_ds.models.parts import split_causal_lm

    student = tiny_model("llama", seed=3)
    backbone, head = split_causal_lm(student)
    result = distillation_loss(
        backbone(TOKENS).flatten(0, 1),
        head,
        TOKENS.flatten(),
        torch.ones(33, dtype=torch.bool),
        ensemble.targets(MICRO),
        alpha=0.5,
        temperature=2.0,
        mean_of="logits",
        ce_count=33,
        kl_count=3,
        vocab_size=VOCAB,
    )
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    for member in ensemble.members:
        assert member.head.weight_PD.grad is None


def test_destroyed_teachers_are_freed(alone: torch.device, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    weight = weakref.ref(model.lm_head.weight)
    frozen = FrozenModel(model, device=alone, dtype=torch.bfloat16)
    ensemble = Ensemble([Member("a", frozen, 1.0)])
    ensemble.targets(MICRO)
    ensemble.destroy()
    del model  # `frozen` stays: it is told to let go, and is not only forgotten
    gc.collect()
    assert weight() is None
    assert ensemble.members == ()


def test_every_member_is_told_to_free_what_it_holds() -> None:
    """A remembered one has files open, which no collector of garbage closes for it."""
    freed: list[str] = []
    members: list[Any] = [SimpleNamespace(destroy=lambda n=n: freed.append(n)) for n in "abc"]
    ensemble = Ensemble(members)
    ensemble.destroy()
    ensemble.destroy()
    assert freed == ["a", "b", "c"]
