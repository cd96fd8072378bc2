"""A causal language model split in two: the backbone, and the linear head that losses apply.

Enters: any transformers causal LM whose logits are `head(final hidden states)`. Leaves: the
backbone as a function of token ids, and the head's weight and bias.

Shapes: B windows, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from babyllama_ds.errors import ModelError
from babyllama_ds.losses.heads import Head

Backbone = Callable[[Tensor], Tensor]
"""Token ids [B, S] to final hidden states [B, S, D]."""


def split_causal_lm(model: nn.Module) -> tuple[Backbone, Head]:
    """The backbone and the head of `model`; both see later changes of its weights."""
    backbone_module: nn.Module = model.base_model  # type: ignore[assignment]
    head_module: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def backbone(input_ids: Tensor) -> Tensor:
        states: Tensor = backbone_module(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    weight: Tensor = head_module.weight  # type: ignore[assignment]
    return backbone, Head(weight, getattr(head_module, "bias", None))


@torch.no_grad()
def check_plain_head(model: nn.Module, *, where: str) -> None:
    """Prove that head(backbone(x)) is what the model itself computes.

    Families that scale or cap their logits, or project hidden states before the head, would
    otherwise be distilled from wrong logits without a sign of it.

    Raises:
        ModelError: no linear head, logits that differ from the model's own, or are not finite.
    """
    head_module = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head_module, nn.Linear) or model.base_model is model:
        raise _not_plain(where, f"a head of type {type(head_module).__name__}")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    probe_BS = torch.arange(8, device=device)[None] % head_module.out_features
    backbone, _ = split_causal_lm(model)
    ours_BSV = head_module(backbone(probe_BS)).float()
    theirs_BSV = model(input_ids=probe_BS, use_cache=False).logits.float()
    model.train(was_training)
    if not theirs_BSV.isfinite().all():
        raise ModelError.of(
            where,
            got="logits that are not finite",
            expected="a model with finite weights",
            hint="its weights are damaged, or its training had diverged",
        )
    # Relative to the largest: a cap at 30 takes a thousandth of logits around 1.6.
    if (ours_BSV - theirs_BSV).abs().max() > 1e-4 * theirs_BSV.abs().max():
        raise _not_plain(where, "logits that are not the head's product with the hidden states")


def _not_plain(where: str, got: str) -> ModelError:
    return ModelError.of(
        where,
        got=got,
        expected="logits = final hidden states @ head weight (+ bias), as in LLaMA and GPT-2",
        hint="models that scale or cap their logits are not supported yet",
    )
