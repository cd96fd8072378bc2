"""Gradient checkpointing: the same gradients to the bit, for fewer saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from babyllama_ds.errors import ModelError
from babyllama_ds.models.fused import fuse
from babyllama_ds.models.recomputing import check_recomputable, recompute_layers

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, attention dropout": ("llama", {"attention_dropout": 0.3}),
    "gpt2": ("gpt2", {}),
    "gpt2, dropout": ("gpt2", DROPOUT),
}


def passes(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Final states, every gradient, and bytes that autograd held for the backward pass."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(3)
    ids_BS = torch.randint(0, 61, (3, 17))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states_BSD = model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights)
    states_BSD.float().square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return states_BSD.detach(), gradients, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_bit(
    name: str, fused: bool, kernel: str, dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    kind, changes = MODELS[name]
    seen = []
    for recomputing in (False, True):
        model = tiny_model(kind, attn_implementation=kernel, **changes).to(dtype).train()
        if fused:
            fuse(model)
        config = model.config.to_dict()
        if recomputing:
            recompute_layers(model)
        assert model.config.to_dict() == config, "it would be saved"
        seen.append(passes(model))
    (states, gradients, held), (again, gradients_again, held_again) = seen
    assert torch.equal(states, again)
    assert list(gradients) == list(gradients_again)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[key]), key
    assert held_again < held / 2


def test_layers_are_computed_twice_in_training_alone(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").train()
    recompute_layers(model)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    passes(model)
    assert len(calls) == 2 * 2
    model.eval()
    passes(model)
    assert len(calls) == 2 * 2 + 2


def test_a_family_without_it_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    check_recomputable(model, where="x")
    model.supports_gradient_checkpointing = False
    where = "student.training.gradient_checkpointing"
    with pytest.raises(
        ModelError, match="got gradient checkpointing of LlamaForCausalLM"
    ) as caught:
        check_recomputable(model, where=where)
    assert caught.value.problems[0].where == where
