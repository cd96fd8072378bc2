"""A causal language model split in two: the backbone, and the head that losses apply.

Enters: any transformers causal LM. Leaves: the backbone as a function of token ids (and of the
documents in them, where these are kept apart), and the head.

    plain    logits = head(final hidden states), as in LLaMA and GPT-2: the losses form the logits
             themselves, chunk by chunk
    logits   families that cap, scale or otherwise change their logits (Gemma 2, Granite, Cohere):
             the "backbone" is the whole model, its states are its logits, and the head is the
             identity; correct, but slower, and all [B, S, V] logits exist at once

Which of the two is found by trying it, and remembered with the model.

Shapes: B windows, S positions, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from babyllama_ds.errors import ModelError
from babyllama_ds.losses.heads import Head
from babyllama_ds.models.documents import Pieces, model_inputs
from babyllama_ds.models.probe import probe_tokens

log = logging.getLogger(__name__)


class Backbone(Protocol):
    """Token ids [B, S] to final hidden states [B, S, D]."""

    def __call__(self, input_ids_BS: Tensor, pieces: Pieces | None = None, /) -> Tensor:
        """The states of every position; `pieces`: each sees its own document alone."""


HeadKind = Literal["plain", "logits"]

_KNOWN_PLAIN = ("llama", "gpt2")
"""Families that are not tried before the first use, being what this stack builds."""

_PROBE = "_babyllama_head"
_PROBE_TOKENS = 8


def split_causal_lm(model: nn.Module) -> tuple[Backbone, Head]:
    """The backbone and the head of `model`; both see later changes of its weights.

    The first call for a model of another family than these runs a few tokens through it, unless
    `check_plain_head` has.
    """
    head_module: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    probed: _Probed | None = getattr(model, _PROBE, None)
    if probed is None and not _is_known_plain(model, head_module):
        probed = _probe(model)
    if probed is not None and probed.kind == "logits":
        parameter = next(model.parameters())
        identity = Head.identity(probed.num_rows, parameter.dtype, parameter.device)
        return lambda input_ids, pieces=None: _own_logits(model, input_ids, pieces), identity
    weight: Tensor = head_module.weight  # type: ignore[assignment]
    head = Head(weight, getattr(head_module, "bias", None))
    return lambda input_ids, pieces=None: final_states(model, input_ids, pieces), head


def check_plain_head(model: nn.Module, *, where: str) -> HeadKind:
    """Which kind of head `model` has; one that is not plain is said in the log.

    Families that scale or cap their logits, or project hidden states before the head, would
    otherwise be distilled from wrong logits without a sign of it.

    Raises:
        ModelError: logits that are not finite.
    """
    probed = _probe(model)
    if not probed.finite:
        raise ModelError.of(
            where,
            got="logits that are not finite",
            expected="a model with finite weights",
            hint="its weights are damaged, or its training had diverged",
        )
    if probed.kind == "logits":
        log.info(
            "%s: the logits of %s are more than its head's product with the hidden states: "
            "taken from the model itself, which is slower",
            where,
            type(model).__name__,
        )
    return probed.kind


def check_backbone(model: nn.Module, *, where: str) -> None:
    """`model` has a backbone that gives its final states, for a classifier on them.

    Raises:
        ModelError: transformers has none of it (Llama 4).
    """
    if model.base_model is model:
        raise ModelError.of(
            where,
            got=f"{type(model).__name__}, of which transformers has no backbone without the head",
            expected="a model that gives the states that a classifier is put on",
            hint="measure it without fine-tuning; a job's teachers are left out of a suite with "
            "`teachers: false`",
        )


def final_states(model: nn.Module, input_ids_BS: Tensor, pieces: Pieces | None = None) -> Tensor:
    """The hidden states [B, S, D] before the head, of any family."""
    backbone: nn.Module = model.base_model  # type: ignore[assignment]
    inputs = model_inputs(model, input_ids_BS, pieces)
    states: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
    return states if pieces is None else states.view(*input_ids_BS.shape, -1)


def _own_logits(model: nn.Module, input_ids_BS: Tensor, pieces: Pieces | None = None) -> Tensor:
    inputs = model_inputs(model, input_ids_BS, pieces)
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits if pieces is None else logits.view(*input_ids_BS.shape, -1)


# -- which kind ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probed:
    kind: HeadKind
    num_rows: int
    """Tokens that the model gives logits for."""
    finite: bool
    """Whether all logits were; of others not much can be told, and nothing is remembered."""


def _is_known_plain(model: nn.Module, head: nn.Module) -> bool:
    family = getattr(getattr(model, "config", None), "model_type", None)
    return family in _KNOWN_PLAIN and isinstance(head, nn.Linear)


# A model that nobody has checked may come to its first call under torch.compile.
@_disable_dynamo
@torch.no_grad()
def _probe(model: nn.Module) -> _Probed:
    """Whether head(backbone(x)) is what the model itself computes, remembered in the model."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        probe_BS = probe_tokens(model, _PROBE_TOKENS)
        theirs_BSV = _own_logits(model, probe_BS)
        ours_BSV = _head_of_backbone(model, probe_BS)
    finally:
        for module, training in modes.items():
            module.training = training
    finite = bool(theirs_BSV.isfinite().all())
    # To the bit: it is the same product, and a cap at 30 hardly moves the logits of a new model.
    plain = ours_BSV is not None and torch.equal(ours_BSV.nan_to_num(), theirs_BSV.nan_to_num())
    probed = _Probed("plain" if plain else "logits", theirs_BSV.shape[-1], finite)
    if finite:
        setattr(model, _PROBE, probed)
    return probed


def _head_of_backbone(model: nn.Module, probe_BS: Tensor) -> Tensor | None:
    """Logits by backbone and head; None where they are not what a loss could multiply."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return None
    states_BSD = final_states(model, probe_BS)
    if states_BSD.shape[-1] != head.in_features:
        return None
    logits_BSV: Tensor = head(states_BSD)
    return logits_BSV
