"""What a model costs before there is one: exact parameter counts, and FLOPs of its products.

Enters: a `ModelSpec` and the vocabulary's size. Leaves: a `ModelSizes`, read off the model that
transformers builds on the meta device (shapes without storage), and FLOPs by these formulas:

    forward, a token   2 · (weights of all matrix products) + 4 · L · S · A
    backward           2 · forward (one product for the inputs' gradient, one for the weights')

L layers, S tokens in a window, A = heads · head size. The first term is a multiplication and an
addition for each weight; the second is q·kᵀ and the weighted sum of v, over all S × S pairs: the
kernels used here compute the masked half too, or are credited with it (Kaplan et al., arXiv
2001.08361, table 1; PaLM, arXiv 2204.02311, appendix B, which counts alike). What is not a matrix
product (norms, activations, softmax, rotary embedding, the losses' passes over logits, AdamW) is
left out, as is customary; embedding rows are looked up, not multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from babyllama_ds.errors import ModelError
from babyllama_ds.models.build import (
    ATTENTION_DROPOUTS,
    Dropouts,
    count_parameters,
    model_config,
    set_dropouts,
)
from babyllama_ds.spec.models import Gpt2Model, LlamaModel, ModelSpec, PretrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The numbers that parameters, FLOPs and activations follow from."""

    family: str
    """`llama`, `gpt2`, or transformers' name of a loaded model's architecture."""
    params: int
    """Parameters, shared ones counted once."""
    backbone_weights: int
    """Weights of the matrix products before the head."""
    head_rows: int
    """Rows of the head: the vocabulary, padding included."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    dropout: float
    """Probability in residuals and embeddings."""
    attention_dropout: float = 0.0
    """Probability in attention."""

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_size

    @property
    def head_weights(self) -> int:
        """Weights of the head."""
        return self.head_rows * self.hidden_size

    def backbone_flops(self, length: int) -> int:
        """FLOPs of one token's way through the backbone, in a window of `length` tokens."""
        return 2 * self.backbone_weights + 4 * self.num_layers * length * self.attention_size

    def head_flops(self, vocab_size: int) -> int:
        """FLOPs of one position's logits; a padded head's spare rows are not computed."""
        return 2 * vocab_size * self.hidden_size

    def forward_flops(self, length: int, vocab_size: int) -> int:
        """FLOPs of a token's forward pass, head included."""
        return self.backbone_flops(length) + self.head_flops(vocab_size)

    def training_flops(self, length: int, vocab_size: int) -> int:
        """FLOPs of a token's forward and backward pass, head included."""
        return 3 * self.forward_flops(length, vocab_size)


def model_sizes(spec: ModelSpec, vocab_size: int, *, where: str) -> ModelSizes:
    """The sizes of the model that `spec` describes, for a vocabulary of `vocab_size` tokens.

    A loaded model's `config.json` is read, nothing of its weights.

    Raises:
        ModelError: a path that holds no readable configuration, or fewer rows than tokens.
    """
    sizes = sizes_of(_config(spec, vocab_size, where=where))
    if sizes.head_rows < vocab_size:
        raise ModelError.of(
            where,
            got=f"an embedding of {sizes.head_rows} rows",
            expected=f"at least {vocab_size}, the tokenizer's size",
            hint="use the tokenizer that this model was trained with",
        )
    return sizes


def meta_model(spec: ModelSpec, vocab_size: int, *, where: str) -> nn.Module:
    """The model that `spec` describes on the meta device: shapes without storage.

    Raises:
        ModelError: a path that holds no readable configuration.
    """
    return _on_meta(_config(spec, vocab_size, where=where))


def sizes_of(config: PretrainedConfig) -> ModelSizes:
    """The sizes of a causal language model, built on the meta device: shapes without storage."""
    model = _on_meta(config)
    head = model.get_output_embeddings()  # type: ignore[operator]
    products = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    heads, hidden = config.num_attention_heads, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return ModelSizes(
        family=config.model_type,
        params=count_parameters(model),
        backbone_weights=sum(m.weight.numel() for m in products),
        head_rows=head.weight.shape[0],
        hidden_size=hidden,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        intermediate_size=inner or 4 * hidden,
        dropout=float(getattr(config, "resid_pdrop", 0.0)),
        attention_dropout=attention_dropout_of(config),
    )


def attention_dropout(spec: ModelSpec, *, where: str) -> float:
    """Dropout of a model's attention in training; of a loaded one its `config.json` is read.

    Raises:
        ModelError: a path that holds no readable configuration.
    """
    if isinstance(spec, LlamaModel):
        return spec.attention_dropout
    if isinstance(spec, Gpt2Model):
        return spec.dropout
    return attention_dropout_of(_config(spec, 0, where=where))


def attention_dropout_of(config: PretrainedConfig) -> float:
    """Dropout of attention by a configuration of any family."""
    found = (getattr(config, name, None) for name in ATTENTION_DROPOUTS)
    return float(next((p for p in found if p is not None), 0.0))


@cache
def _sizes_of_built(spec: LlamaModel | Gpt2Model, vocab_size: int) -> ModelSizes:
    """Kept: a plan asks again and again while it looks for what fits."""
    tokenizer = cast(PreTrainedTokenizerBase, _Vocabulary(vocab_size))
    return sizes_of(model_config(spec, tokenizer))


class _Vocabulary:
    """What `model_config` asks of a tokenizer, where there is none yet: its size, special ids."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def _on_meta(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _config(spec: ModelSpec, vocab_size: int, *, where: str) -> PretrainedConfig:
    if isinstance(spec, PretrainedModel):
        config = _loaded_config(spec.path, where=where)
        set_dropouts(config, Dropouts(spec.dropout, spec.attention_dropout), where=where)
        return config
    return model_config(spec, cast(PreTrainedTokenizerBase, _Vocabulary(vocab_size)))


def _loaded_config(path: str, *, where: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError.of(
            where,
            got=f"{path}: {reason}",
            expected="a causal language model's directory with its config.json, or a hub id",
        ) from error
