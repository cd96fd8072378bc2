"""Gradient checkpointing: a model enters; in training its layers keep no more than their inputs.

The backward pass computes each layer's forward pass again before it goes through it (Chen et al.,
"Training deep nets with sublinear memory cost", arXiv 1604.06174), with the random numbers of the
first time, so dropout has the same masks. Nothing changes in evaluation, or in what is saved.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from babyllama_ds.errors import ModelError


def recompute_layers(model: nn.Module) -> None:
    """Have `model` recompute its layers in the backward pass, by transformers' own means."""
    family: Any = model
    # The second is the first's name before transformers 5.23 or so, and deprecated since.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or family.gradient_checkpointing_enable
    # The other variant runs each layer without autograd first: a backward pass of its own in every
    # layer, which neither `torch.autograd.grad` nor the engine's hooks are made for.
    enable({"use_reentrant": False})


def check_recomputable(model: nn.Module, *, where: str) -> None:
    """The family can do so.

    Raises:
        ModelError: it cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError.of(
            where,
            got=f"gradient checkpointing of {type(model).__name__}",
            expected="a model whose layers transformers can recompute",
            hint="leave gradient_checkpointing off, or lower micro_batch",
        )
