"""Keeping what must stay fp32 when DeepSpeed casts a whole module to bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def float_buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore fp32 buffers that the body cast along with the parameters.

    DeepSpeed's inference engine calls `module.bfloat16()`, which rounds LLaMA's rotary
    frequencies (a buffer) to 8 bits: positions beyond a few dozen then point elsewhere than in the
    same model loaded by transformers, which keeps them in fp32, as does the training engine.
    """
    kept = {
        name: buffer.detach().clone()
        for name, buffer in module.named_buffers()
        if buffer.dtype == torch.float32
    }
    yield
    for name, buffer in module.named_buffers():
        if name in kept:
            buffer.data = kept[name].to(buffer.device)
