"""transformers' modules with nothing rounded, and what is compared of them and of others.

Shapes: B windows, S positions.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class ExactRMSNorm(LlamaRMSNorm):
    """By the formula: transformers' own computes in fp32 whatever it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        square = (hidden_states * hidden_states).sum(-1, keepdim=True) / hidden_states.shape[-1]
        return self.weight * hidden_states / (square + self.variance_epsilon).sqrt()


def exact(model: nn.Module) -> nn.Module:
    """The same model in fp64 throughout (but for the rotary angles, which all share)."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("sdpa")  # eager attention takes its softmax in fp32
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = ExactRMSNorm
    return model


def logits_and_gradients(
    model: nn.Module, ids_BS: Tensor, *, grad: bool = True
) -> dict[str, Tensor]:
    """The logits, and the gradient of each parameter for one fixed weighting of them."""
    with torch.set_grad_enabled(grad):
        logits = model(input_ids=ids_BS, use_cache=False).logits
    if not grad:
        return {"logits": logits}
    weighting = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weighting.to(logits)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **gradients}
