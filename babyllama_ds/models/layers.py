"""Hidden states of layers in the middle of a causal LM, kept as a forward pass comes by them.

Layers are counted as transformers counts its hidden states: 0 the embeddings, i the output of
layer i of L, and that of layer L after the final norm. Asked for by its own
`output_hidden_states`, a model would keep all of them; hooks keep those that are named.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from babyllama_ds.errors import ModelError
from babyllama_ds.models.families import PROBE_TOKENS
from babyllama_ds.models.probe import probe_tokens


def num_layers(model: nn.Module) -> int:
    """L, of a transformers model."""
    return int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def hidden_width(model: nn.Module) -> int:
    """D, of a transformers model."""
    return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The layers, in order: the first list of modules of the right length; none without one."""
    depth = num_layers(model)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    return None


class LayerTap:
    """Hooks on the named layers of one model, from now until `remove`.

    Closed, as it is but for the passes of `collect`, a tap keeps nothing.

    Raises:
        ModelError: a model whose layers are not found.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int], *, where: str) -> None:
        self._open = False
        self._kept: dict[int, Tensor] = {}
        blocks, last = _blocks(model, where), num_layers(model)
        self._handles = [self._tapped(model, blocks, layer, last) for layer in sorted(set(layers))]

    def collect(self, run: Callable[[], Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """What `run` gives, and the states [B, S, D] of the named layers in that pass."""
        self._open = True
        self._kept = {}
        try:
            result = run()
        finally:
            self._open = False
        kept, self._kept = self._kept, {}
        return result, kept

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _tapped(
        self, model: nn.Module, blocks: nn.ModuleList, layer: int, last: int
    ) -> RemovableHandle:
        assert 0 <= layer <= last, "a layer that there is not"

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._open:
                self._kept[layer] = inputs[0]

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if self._open:
                self._kept[layer] = output if isinstance(output, Tensor) else output[0]

        if layer == 0:
            return blocks[0].register_forward_pre_hook(before)
        tapped: nn.Module = model.base_model if layer == last else blocks[layer - 1]  # type: ignore[assignment]
        return tapped.register_forward_hook(after)


@torch.no_grad()
def check_layers(
    model: nn.Module, states: Callable[[Tensor], Tensor], layers: Iterable[int], *, where: str
) -> None:
    """The states of the named layers can be had, and are as wide as the model says: tried.

    `states` is the model's backbone (`parts.split_causal_lm`).

    Raises:
        ModelError: they cannot, or are not (of some OPT the last layer's are projected).
    """
    layers = sorted(set(layers))
    tap = LayerTap(model, layers, where=where)
    probe_BS = probe_tokens(model, PROBE_TOKENS)
    try:
        _, kept = tap.collect(lambda: states(probe_BS))
    finally:
        tap.remove()
    for layer in layers:
        shape = tuple(kept[layer].shape) if layer in kept else "no"
        if shape != (*probe_BS.shape, hidden_width(model)):
            raise ModelError.of(
                where,
                got=f"{type(model).__name__}, whose layer {layer} gives states of shape {shape}",
                expected=f"a width of {hidden_width(model)}, as config.json has it",
                hint="match another layer in distillation.hidden_matching",
            )


def _blocks(model: nn.Module, where: str) -> nn.ModuleList:
    found = layers_of(model)
    if found is None:
        raise ModelError.of(
            where,
            got=f"{type(model).__name__}, without a list of its {num_layers(model)} layers",
            expected="a model whose layers' hidden states can be had",
            hint="leave distillation.hidden_matching out",
        )
    return found
