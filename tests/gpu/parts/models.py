"""Small models for parts of the proof, of the package's own builder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from babyllama_ds.engine.proof.models import small_model
from babyllama_ds.spec.models import Gpt2Model, LlamaModel


def make_model(
    kind: str, *, width: int, length: int, kernel: str = "sdpa", num_kv_heads: int = 4
) -> nn.Module:
    """Two layers of four heads, of so many positions, always with the same weights."""
    common: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": width,
        "num_heads": 4,
        "intermediate_size": 2 * width,
        "max_positions": length,
        "initializer_range": 0.05,
    }
    if kind == "gpt2":
        spec: Gpt2Model | LlamaModel = Gpt2Model(kind="gpt2", dropout=0.0, **common)
    else:
        spec = LlamaModel(kind="llama", num_kv_heads=num_kv_heads, **common)
    model = small_model(spec)
    model.set_attn_implementation(kernel)  # type: ignore[operator]
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters alone, and those as values of bf16: rotary frequencies stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model
