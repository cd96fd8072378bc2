"""Activations of any family: a configuration and a micro-batch enter; what autograd keeps leaves.

The model's own forward pass runs on shapes: on tensors of the true sizes and without storage
(torch's `FakeTensorMode`), and every storage that autograd is handed is counted once. So nothing of
a family has to be known here. Stood in for by what they keep are fused attention, by q, k, v, their
output, a mask and a sum of exponentials for each head and position; and on a card dropout, by a
boolean for each number, and `FusedRMSNorm`, by its input and a number for each row. (Means and
deviations of layer norms are counted in the states' type, as a CPU keeps them; a card has fp32.)

A micro-batch of several windows is reckoned from those of two and three: each adds as much.

Shapes: B windows, S positions, H heads, D a head's width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils

from babyllama_ds.models.documents import Pieces, model_inputs, sequences_of
from babyllama_ds.models.families import missing_kernels
from babyllama_ds.models.fused import FusedRMSNorm, fuse
from babyllama_ds.models.recomputing import recompute_layers

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


class NotTracedError(Exception):
    """The family's forward pass asks for values, which shapes have not."""


def kept_bytes(
    config: PretrainedConfig,
    *,
    windows: int,
    length: int,
    eager: bool,
    element_bytes: int,
    on_cpu: bool,
    documents: bool,
    checkpointed: bool,
) -> int:
    """Bytes that the backbone's forward pass leaves for its backward pass, weights left out.

    `documents`: whether a mask keeps these apart. A family without fused attention has plain
    products, whatever `eager` says.

    Raises:
        NotTracedError: the model cannot run on shapes.
    """
    family = _Family(json.dumps(config.to_dict(), sort_keys=True, default=str), config)
    eager = eager or "sdpa" in missing_kernels(config)
    shape = (length, eager, element_bytes, on_cpu, documents, checkpointed)
    if windows == 1:  # of which more can be looked at in another order without a copy
        return _kept(family, 1, *shape)
    two, three = (_kept(family, number, *shape) for number in (2, 3))
    return two + (windows - 2) * (three - two)


@dataclass(frozen=True)
class _Family:
    """A configuration that can be looked up by what it says."""

    text: str
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=256)
def _kept(
    family: _Family,
    windows: int,
    length: int,
    eager: bool,
    element_bytes: int,
    on_cpu: bool,
    documents: bool,
    checkpointed: bool,
) -> int:
    """Kept itself: a plan asks again and again while it looks for what fits."""
    try:
        with FakeTensorMode(), _stood_in(on_cpu=on_cpu):
            model: nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(family.config),
                attn_implementation="eager" if eager else "sdpa",
                dtype=_DTYPES[element_bytes],
            )
            fuse(model)
            if checkpointed:
                recompute_layers(model)
            return _saved_by(model.train(), windows, length, documents=documents)
    except Exception as error:  # whatever a family's code runs into
        raise NotTracedError(str(error)) from error


def _saved_by(model: nn.Module, windows: int, length: int, *, documents: bool) -> int:
    weights = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor  # held: no number comes twice
        return tensor

    ids_BS = torch.zeros(windows, length, dtype=torch.long)
    pieces = Pieces(ids_BS.int(), torch.zeros(2, dtype=torch.int32), length) if documents else None
    backbone: Any = model.base_model
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(**model_inputs(model, ids_BS, pieces), use_cache=False)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


# -- what stands in --------------------------------------------------------------------------------


@contextmanager
def _stood_in(*, on_cpu: bool) -> Iterator[None]:
    functions: Any = nn.functional
    own = functions.scaled_dot_product_attention

    def attention(
        query_BHSD: Tensor,
        key_BHSD: Tensor,
        value_BHSD: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **named: Any,
    ) -> Tensor:
        if on_cpu and dropout_p:  # plain products, torch's own
            named = {**named, "attn_mask": attn_mask, "dropout_p": dropout_p}
            plain: Tensor = own(query_BHSD, key_BHSD, value_BHSD, **named)
            return plain
        attended: Tensor = _FusedAttention.apply(  # type: ignore[no-untyped-call]
            query_BHSD, key_BHSD, value_BHSD, attn_mask
        )
        return attended

    with ExitStack() as stack:
        stack.enter_context(_replaced(functions, "scaled_dot_product_attention", attention))
        # As the engine has it (`documents.sequences_of`): the values of positions are not asked.
        found = "find_packed_sequence_indices"
        stack.enter_context(_replaced(masking_utils, found, sequences_of))
        if not on_cpu:
            stack.enter_context(_replaced(functions, "dropout", _dropout))
            stack.enter_context(_replaced(FusedRMSNorm, "forward", _on_card))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _FusedAttention(torch.autograd.Function):
    """What is kept of a fused kernel; it computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, query_BHSD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, mask: Tensor | None
    ) -> Tensor:
        attended_BHSD = torch.empty_like(query_BHSD)  # in the order of the query's dimensions
        log_sums_BHS = query_BHSD.new_empty(query_BHSD.shape[:3], dtype=torch.float32)
        masks = [] if mask is None else [mask.to(query_BHSD.dtype)]
        ctx.save_for_backward(query_BHSD, key_BHSD, value_BHSD, attended_BHSD, log_sums_BHS, *masks)
        return attended_BHSD


def _on_card(_: FusedRMSNorm, hidden_states: Tensor) -> Tensor:
    normed: Tensor = _Normed.apply(hidden_states)  # type: ignore[no-untyped-call]
    return normed


class _Normed(torch.autograd.Function):
    """What is kept of a card's RMSNorm: its input, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states, states.new_empty(states.shape[:-1], dtype=torch.float32))
        return torch.empty_like(states)


class _Dropped(torch.autograd.Function):
    """What is kept of a card's dropout: a boolean for each number."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(states, dtype=torch.bool))
        return torch.empty_like(states)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001 - torch's names
    if not (p and training):
        return input
    dropped: Tensor = _Dropped.apply(input)  # type: ignore[no-untyped-call]
    return dropped
