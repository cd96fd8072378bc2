"""The reference: one process, autograd and torch's AdamW; nothing of the engine, nor of DeepSpeed.

Shapes: B windows, S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from babyllama_ds.engine.proof.case import MICRO_WINDOWS, Case, Trace


def train_plainly(case: Case, *, num_ranks: int, dtype: torch.dtype, device: torch.device) -> Trace:
    """All steps of a case on the batches of `num_ranks` ranks.

    Parameters, activations and each micro-batch's gradient are of `dtype`; gradients are summed,
    and weights updated, in `dtype` or fp32, whichever is finer. Micro-batches are those of the
    ranks, so that in bf16 every product is rounded as theirs is.
    """
    module = case.start().to(device)
    masters = _cast_parameters(module, dtype)
    start = {name: master.clone() for name, master in masters.items()}
    adam = _adamw(masters, case)
    trace: Trace = {}
    for batch_BS in case.batches(num_ranks).to(device):
        gradients = _gradients(module, batch_BS, case.accumulation_steps)
        norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
        if not trace:
            trace |= {f"gradient of {name}": each.cpu() for name, each in gradients.items()}
            trace["gradient norm"] = norm.cpu()[None]
        # As torch's clip_grad_norm_ and DeepSpeed: only downwards.
        factor = 1.0 if case.clip_norm is None else min(1.0, case.clip_norm / norm.item())
        for name, master in masters.items():
            master.grad = gradients[name] * factor
        adam.step()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(masters[name])
    for name, master in masters.items():
        trace[f"change of {name}"] = (master - start[name]).cpu()
    return trace


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast parameters, and not buffers (rotary frequencies stay fp32); returns their masters."""
    fine = torch.promote_types(dtype, torch.float32)
    masters = {name: p.detach().to(fine, copy=True) for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return masters


def _adamw(masters: dict[str, Tensor], case: Case) -> torch.optim.AdamW:
    """Norms and biases, which have one dimension, are not decayed."""
    training = case.training(1)
    groups: list[dict[str, Any]] = [
        {"params": [master for master in masters.values() if master.dim() > 1]},
        {"params": [m for m in masters.values() if m.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        foreach=False,
    )


def _gradients(module: nn.Module, batch_BS: Tensor, accumulation_steps: int) -> dict[str, Tensor]:
    """Gradients of the batch's mean loss: those of its micro-batches, summed.

    A micro-batch's loss is divided by the accumulation steps before its backward pass, and the sum
    by the ranks after it, as under ZeRO; the order matters in bf16 where they are no powers of two.
    """
    sums: dict[str, Tensor] = {}
    micro_batches = batch_BS.chunk(len(batch_BS) // MICRO_WINDOWS)
    for micro_BS in micro_batches:
        module.zero_grad()
        (module(micro_BS) / accumulation_steps).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            fine = torch.promote_types(parameter.dtype, torch.float32)
            gradient = parameter.grad.to(fine)
            sums[name] = sums[name] + gradient if name in sums else gradient
    num_ranks = len(micro_batches) // accumulation_steps
    return {name: total / num_ranks for name, total in sums.items()}
