"""Frozen teachers: a model enters, its bf16 inference engine leaves.

On this rank alone, or split over a group of ranks (`tensor_parallel`); either way its windows enter
and their states leave.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from babyllama_ds.engine.precision import float_buffers_kept
from babyllama_ds.engine.tensor_parallel import RankGroup, split
from babyllama_ds.losses.heads import Head
from babyllama_ds.models.build import count_parameters
from babyllama_ds.models.compiled import CompiledLayers
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

    With a `group` the model is split over its ranks. Every method that runs it is then a collective
    of the group, in which each rank brings as many windows, of the same length.
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
        group: RankGroup | None = None,
    ) -> None:
        """`layers` are those whose states `hidden_states_and_layers` gives (`models.layers`).

        With a `group` it is not compiled, the model comes on the CPU, and this is a collective of
        all ranks.

        Raises:
            ModelError: a model whose layers are not found.
        """
        layers = tuple(layers)
        self._tap = LayerTap(model, layers, where=where) if layers else None
        self._group = group
        self.params = count_parameters(model)
        """Parameters of the whole model, a shared one counted once."""
        self._model = model.eval().requires_grad_(False)
        self._engine = (
            _alone(model, device, dtype) if group is None else _split(model, group, dtype)
        )
        self._compiled: CompiledLayers | None = None
        if with_compiler:
            assert group is None, "collectives in every layer are not compiled"
            self._compiled = CompiledLayers(model, training=False)

    @property
    def module(self) -> nn.Module:
        """The causal LM itself; of a split one, what this rank holds of it."""
        return self._model

    @property
    def head(self) -> Head:
        """The output head."""
        return split_causal_lm(self._model)[1]

    @torch.inference_mode()
    def hidden_states(self, input_ids_BS: Tensor, pieces: Pieces | None = None) -> Tensor:
        """Final hidden states [B, S, D], outside autograd; `pieces`: of documents kept apart."""
        if self._group is None:
            states_BSD: Tensor = self._engine(input_ids_BS, pieces)
            return states_BSD
        return self._group.own(self._engine(*self._group.gathered(input_ids_BS, pieces)))

    @torch.inference_mode()
    def hidden_states_and_layers(
        self, input_ids_BS: Tensor, pieces: Pieces | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The same, and the states [B, S, D] of each layer that was asked for."""
        tap, group = self._tap, self._group
        if tap is None:
            return self.hidden_states(input_ids_BS, pieces), {}
        if group is None:
            return tap.collect(lambda: self._engine(input_ids_BS, pieces))
        of_all = group.gathered(input_ids_BS, pieces)
        states, layers = tap.collect(lambda: self._engine(*of_all))
        return group.own(states), {layer: group.own(each) for layer, each in layers.items()}

    @property
    def width(self) -> int:
        """D, the width of its layers."""
        return hidden_width(self._model)

    def destroy(self) -> None:
        """Free the engine and the weights.

        The engine's own `destroy` frees the workspace of injected kernels and fails without one.
        """
        if self._compiled is not None:
            self._compiled.remove()
        del self._engine, self._model, self._tap


def _alone(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    import deepspeed

    model.to(device)
    with float_buffers_kept(model):
        engine: nn.Module = deepspeed.init_inference(HiddenStates(model), dtype=dtype)
    return engine.eval()


def _split(model: nn.Module, group: RankGroup, dtype: torch.dtype) -> nn.Module:
    engine = split(HiddenStates(model), model, group, dtype=dtype)
    # Which kind of head it has is tried now, while the ranks of the group are at one place.
    split_causal_lm(model)
    return engine
