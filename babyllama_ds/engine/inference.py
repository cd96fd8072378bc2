"""Frozen teachers: a model enters, its bf16 inference engine leaves.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from babyllama_ds.engine.compiling import compiled
from babyllama_ds.engine.precision import float_buffers_kept
from babyllama_ds.losses.heads import Head
from babyllama_ds.models.documents import Pieces
from babyllama_ds.models.layers import LayerTap, hidden_width
from babyllama_ds.models.parts import split_causal_lm


class HiddenStates(nn.Module):
    """A causal LM without its head: token ids in, final hidden states out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BS: Tensor, pieces: Pieces | None = None) -> Tensor:
        """Final hidden states [B, S, D]."""
        backbone, _ = split_causal_lm(self.model)
        return backbone(input_ids_BS, pieces)


class FrozenModel:
    """A teacher in a `deepspeed.init_inference` engine on this rank's device.

    Without kernel injection or tensor parallelism the engine computes exactly what the module
    does; it neither freezes parameters nor leaves training mode, so both are done here.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        with_compiler: bool = False,
        layers: Iterable[int] = (),
        where: str = "teacher",
    ) -> None:
        """`layers` are those whose states `hidden_states_and_layers` gives (`models.layers`).

        Raises:
            ModelError: a model whose layers are not found.
        """
        import deepspeed

        layers = tuple(layers)
        self._tap = LayerTap(model, layers, where=where) if layers else None
        model.eval().requires_grad_(False).to(device)
        with float_buffers_kept(model):
            self._engine = deepspeed.init_inference(HiddenStates(model), dtype=dtype)
        self._engine.eval()
        self._states: Callable[[Tensor, Pieces | None], Tensor] = self._engine
        self._model = model
        if with_compiler:
            self._states = compiled(self._engine)

    @property
    def head(self) -> Head:
        """The output head."""
        return split_causal_lm(self._model)[1]

    @torch.inference_mode()
    def hidden_states(self, input_ids_BS: Tensor, pieces: Pieces | None = None) -> Tensor:
        """Final hidden states [B, S, D], outside autograd; `pieces`: of documents kept apart."""
        return self._states(input_ids_BS, pieces)

    @torch.inference_mode()
    def hidden_states_and_layers(
        self, input_ids_BS: Tensor, pieces: Pieces | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The same, and the states [B, S, D] of each layer that was asked for."""
        if self._tap is None:
            return self._states(input_ids_BS, pieces), {}
        return self._tap.collect(lambda: self._states(input_ids_BS, pieces))

    @property
    def width(self) -> int:
        """D, of its layers."""
        return hidden_width(self._model)

    def destroy(self) -> None:
        """Free the engine and the weights.

        The engine's own `destroy` frees the workspace of injected kernels and fails without one.
        """
        del self._engine, self._states, self._model, self._tap
