"""torch.compile: a model enters; its layers are compiled, once for all of them.

When this is done, and what it gains: `engine.compiling`, docs/decisions/compiling.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from babyllama_ds.models.layers import layers_of

MOST_MODELS = 64
"""Models that one function is compiled for in one process."""


class CompiledLayers:
    """The layers of one model under torch.compile, from now until `remove`.

    A model's layers are alike: what is compiled for the first, at its first call and for the shapes
    it gets there, serves all of them. Of a family whose layers are not found the backbone is
    compiled, as one. Parameters keep their names, and hooks run as before.

    With `training` those passes are compiled that autograd follows, and evaluation, with its other
    shapes, is not; without, the passes that it does not follow.
    """

    def __init__(self, model: nn.Module, *, training: bool) -> None:
        import torch._dynamo

        # All models of a run come by in one process. After eight of them torch would leave the
        # others uncompiled without a word.
        torch._dynamo.config.recompile_limit = MOST_MODELS
        backbone: nn.Module = model.base_model  # type: ignore[assignment]
        self._modules = list(layers_of(model) or [backbone])
        for module in self._modules:
            module.forward = _compiled(module.forward, training=training)

    def remove(self) -> None:
        """Leave the model as it was."""
        for module in self._modules:
            del module.forward  # the object's own, not that of its class
        self._modules = []


def _compiled(forward: Callable[..., Any], *, training: bool) -> Callable[..., Any]:
    """A layer's forward pass, compiled where autograd follows it (`training`), or does not."""
    fast = torch.compile(forward, dynamic=False)

    @functools.wraps(forward)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() == training else forward)(*args, **kwargs)

    return chosen


def forget_compiled() -> None:
    """Let go of what was compiled, of all models: its guards hold them, and are asked in turn."""
    torch.compiler.reset()
