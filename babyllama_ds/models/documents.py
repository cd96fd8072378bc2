"""Windows of several documents: where these begin enters; what keeps them apart in a model leaves.

A piece is what one document has in one window. Attention within documents means that a model gives
each position what it would give it if the piece were a sequence of its own: it attends to earlier
positions of its piece alone, and counts positions from the piece's beginning.

    FlashAttention   its kernels of variable length: the pieces, one after another, as one sequence
                     of the whole micro-batch; no mask exists, and nothing is computed across pieces
    others           positions that begin anew, from which transformers makes a causal mask of one
                     block a piece, [B, 1, S, S]

transformers would look at the positions of every forward pass for sequences that begin anew, and
wait for the device to know. It is told instead, by their type (`sequences_of`): positions of pieces
are int32, all others int64.

Shapes: B windows, S positions, N = B * S, P pieces of all windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from babyllama_ds.errors import ModelError, first_line
from babyllama_ds.models.probe import probe_tokens


@dataclass(frozen=True)
class Pieces:
    """The pieces that a micro-batch's windows are made of."""

    positions_BS: Tensor
    """Each position's place in its piece, from 0 (int32, which says that they are pieces')."""
    bounds_P1: Tensor
    """Where each piece begins among all N positions, then N (int32)."""
    longest: int
    """Positions of the longest piece."""

    @classmethod
    def of(
        cls, begins_BS: NDArray[np.bool_], send: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> Pieces:
        """From where pieces begin: each window's first position, and others. `send` brings them to
        a device.
        """
        assert begins_BS[:, 0].all(), "a window begins with a piece"
        steps_S = np.arange(begins_BS.shape[1])
        begun_BS = np.maximum.accumulate(np.where(begins_BS, steps_S, 0), axis=1)
        positions_BS = (steps_S - begun_BS).astype(np.int32)
        bounds_P1 = np.append(np.flatnonzero(begins_BS), begins_BS.size).astype(np.int32)
        return cls(
            positions_BS=send(torch.from_numpy(positions_BS)),
            bounds_P1=send(torch.from_numpy(bounds_P1)),
            longest=int(np.diff(bounds_P1).max()),
        )

    @property
    def cuts_BT(self) -> Tensor:  # noqa: N802 - named by its shape
        """Whether a position and the next one, [B, S - 1] of them, are of two documents."""
        return self.positions_BS[:, 1:] == 0


def sequences_of(position_ids_BS: Tensor) -> Tensor | None:
    """Which sequence of its window each position is of, from 1; none: each window is one.

    What transformers' `find_packed_sequence_indices` finds by looking at the positions: the engine
    puts this in its place. Under torch.compile, too, it depends on no value.
    """
    if position_ids_BS.dtype != torch.int32:
        return None
    return (position_ids_BS == 0).cumsum(-1)


def model_inputs(model: nn.Module, input_ids_BS: Tensor, pieces: Pieces | None) -> dict[str, Any]:
    """What a transformers model is called with; its outputs are `[1, N, …]` or `[B, S, …]`."""
    if pieces is None:
        return {"input_ids": input_ids_BS}
    if not takes_lengths(model):
        return {"input_ids": input_ids_BS, "position_ids": pieces.positions_BS}
    # As transformers has it for packed sequences (`modeling_flash_attention_utils`). Given the
    # bounds, it need not look for them in the positions, for which it would wait for the device.
    return {
        "input_ids": input_ids_BS.view(1, -1),
        "position_ids": pieces.positions_BS.view(1, -1),
        "cu_seq_lens_q": pieces.bounds_P1,
        "cu_seq_lens_k": pieces.bounds_P1,
        "max_length_q": pieces.longest,
        "max_length_k": pieces.longest,
    }


def takes_lengths(model: nn.Module) -> bool:
    """Whether the model's attention kernel is told the lengths of pieces, instead of a mask."""
    config: Any = getattr(model, "config", None)
    return varies_in_shape(str(getattr(config, "_attn_implementation", "")))


def varies_in_shape(kernel: str) -> bool:
    """Whether what this attention kernel gets of pieces has another shape in each micro-batch."""
    return kernel.startswith("flash_attention")


# -- does a model keep them apart? -----------------------------------------------------------------

_PROBE_TOKENS, _PROBE_CUT = 8, 3
_ROUNDING = 1e-4
"""Relative, in fp32."""
_MUCH_LESS = 0.1
"""In bf16 what is left may be rounding: there it is to be little beside what other positions do."""

States = Callable[[Tensor, Pieces | None], Tensor]


@torch.no_grad()
def check_documents(model: nn.Module, states: States, *, where: str) -> None:
    """A model keeps documents apart: tried with two of them in a window.

    `states` is its backbone (`parts.split_causal_lm`).

    Raises:
        ModelError: it takes no positions, or looks across the boundary all the same.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        packed, apart, joined = _tried(model, states)
    except (TypeError, ValueError) as error:
        refusal = f"whose forward pass refuses positions ({first_line(error)})"
        raise _crosses(model, where, refusal) from error
    finally:
        for module, training in modes.items():
            module.training = training
    error_size, crossing = ((each - apart).abs().max().item() for each in (packed, joined))
    allowed = _ROUNDING * apart.abs().max().item()
    if next(model.parameters()).dtype != torch.float32:
        allowed = max(allowed, _MUCH_LESS * crossing)
    if not error_size <= allowed:
        raise _crosses(model, where, "that looks across the boundary of documents all the same")


def _tried(model: nn.Module, states: States) -> tuple[Tensor, Tensor, Tensor]:
    """States of two documents as pieces of a window, each by itself, and as one document."""
    device = next(model.parameters()).device
    probe_BS = probe_tokens(model, _PROBE_TOKENS)
    begins_BS = np.isin(np.arange(_PROBE_TOKENS), (0, _PROBE_CUT))[None]
    pieces = Pieces.of(begins_BS, lambda tensor: tensor.to(device))
    alone = [states(probe_BS[:, :_PROBE_CUT], None), states(probe_BS[:, _PROBE_CUT:], None)]
    return (
        states(probe_BS, pieces).float(),
        torch.cat(alone, dim=1).float(),
        states(probe_BS, None).float(),
    )


def _crosses(model: nn.Module, where: str, how: str) -> ModelError:
    return ModelError.of(
        where,
        got=f"a {type(model).__name__} {how}",
        expected="a model that keeps documents apart by their positions, for "
        "windows.attention=document",
        hint="set windows.attention=window, or use another model",
    )
