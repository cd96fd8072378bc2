"""Buffers in fp32 outlive a cast of their module; nothing else does."""

from __future__ import annotations

import torch
from torch import nn

from babyllama_ds.engine.precision import float_buffers_kept


def test_only_fp32_buffers_are_restored() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_buffer("fine", torch.tensor([1 / 3]))
    module[0].register_buffer("hidden", torch.tensor([1 / 7]), persistent=False)
    module[0].register_buffer("coarse", torch.tensor([1 / 3], dtype=torch.float64))
    module[0].register_buffer("whole", torch.tensor([7]))
    with float_buffers_kept(module):
        module.bfloat16()
    assert torch.equal(module[0].fine, torch.tensor([1 / 3]))
    assert torch.equal(module[0].hidden, torch.tensor([1 / 7]))
    assert module[0].coarse.dtype == torch.bfloat16
    assert torch.equal(module[0].whole, torch.tensor([7]))
    assert module[0].weight.dtype == torch.bfloat16
