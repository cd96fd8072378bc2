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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from babyllama_ds.errors import ModelError
from babyllama_ds.models.build import (
    ATTENTION_DROPOUTS,
    REST_DROPOUTS,
    Dropouts,
    count_parameters,
    model_config,
    set_dropouts,
)
from babyllama_ds.models.directories import read_config, reason_of
from babyllama_ds.models.families import missing_kernels
from babyllama_ds.spec.models import Gpt2Model, LlamaModel, ModelSpec, PretrainedModel

_KNOWN = ("llama", "gpt2")


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The numbers that parameters, FLOPs and activations follow from."""

    family: str
    """`llama`, `gpt2`, or transformers' name of a loaded model's architecture."""
    params: int
    """Parameters, shared ones counted once."""
    parameter_sizes: tuple[int, ...]
    """Of each matrix, embedding, norm and bias: what `params` is the sum of."""
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
    projected_size: int | None = None
    """Width that final hidden states are projected to before the head (some OPT); none: they are
    not."""
    config: PretrainedConfig | None = field(default=None, compare=False, repr=False)
    """Of another family than LLaMA and GPT-2, whose activations are known term by term."""

    @property
    def state_size(self) -> int:
        """Width of what the head multiplies."""
        return self.projected_size or self.hidden_size

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
        return self.head_rows * self.state_size

    def backbone_flops(self, length: int) -> int:
        """FLOPs of one token's way through the backbone, in a window of `length` tokens."""
        return 2 * self.backbone_weights + 4 * self.num_layers * length * self.attention_size

    def head_flops(self, vocab_size: int) -> int:
        """FLOPs of one position's logits; a padded head's spare rows are not computed."""
        return 2 * vocab_size * self.state_size

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
        ModelError: a path that holds no readable configuration, a family that is no transformer,
            numbers that make no model, or fewer rows than tokens.
    """
    config = _config(spec, vocab_size, where=where)
    if not hasattr(config, "num_attention_heads"):
        raise ModelError.of(
            where,
            got=f"a model of the family {config.model_type}, whose layers have no attention heads",
            expected="a transformer: of others neither cost nor memory is known here",
        )
    with _shapes(where):
        sizes = sizes_of(config)
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
        ModelError: a path that holds no readable configuration, or numbers that make no model.
    """
    config = _config(spec, vocab_size, where=where)
    with _shapes(where):
        return _on_meta(config)


def sizes_of(config: PretrainedConfig) -> ModelSizes:
    """The sizes of a causal language model, built on the meta device: shapes without storage."""
    model = _on_meta(config)
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads, hidden = config.num_attention_heads, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return ModelSizes(
        family=config.model_type,
        params=count_parameters(model),
        parameter_sizes=tuple(parameter.numel() for parameter in model.parameters()),
        backbone_weights=sum(_weights(m, config) for m in model.modules() if m is not head),
        head_rows=head.weight.shape[0],
        hidden_size=hidden,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        intermediate_size=inner or 4 * hidden,
        dropout=_first(config, REST_DROPOUTS),
        attention_dropout=attention_dropout_of(config),
        projected_size=None if head.weight.shape[1] == hidden else head.weight.shape[1],
        config=None if config.model_type in _KNOWN else config,
    )


def _weights(module: nn.Module, config: PretrainedConfig) -> int:
    """Weights that a token is multiplied by in `module` itself.

    Experts, [E, …, …], are counted as many as a token goes to; their router is a product, too.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    num_experts = getattr(module, "num_experts", None)
    if not isinstance(num_experts, int) or isinstance(module, nn.Embedding):
        return 0
    chosen: int = getattr(config, "num_experts_per_tok", num_experts)
    own = list(module.parameters(recurse=False))
    return sum(
        weight.numel() if weight.dim() == 2 else weight.numel() // num_experts * chosen
        for weight in own
        if weight.dim() > 1
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


def absent_kernels(spec: ModelSpec, *, where: str) -> frozenset[str]:
    """Kinds of attention kernels that a model's family has not; of a loaded one its `config.json`
    is read.

    Raises:
        ModelError: a path that holds no readable configuration.
    """
    if not isinstance(spec, PretrainedModel):
        return frozenset()  # LLaMA and GPT-2 have all
    return missing_kernels(read_config(spec.path, revision=spec.revision, where=where))


def attention_dropout_of(config: PretrainedConfig) -> float:
    """Dropout of attention by a configuration of any family."""
    return _first(config, ATTENTION_DROPOUTS)


def _first(config: PretrainedConfig, names: Sequence[str]) -> float:
    """The first of these probabilities that the family has; none: 0."""
    found = (getattr(config, name, None) for name in names)
    return float(next((p for p in found if p is not None), 0.0))


class Vocabulary:
    """What `model_config` asks of a tokenizer, where there is none yet: its size, special ids."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    unk_token_id = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@contextmanager
def _shapes(where: str) -> Iterator[None]:
    """Within, a model is built on the meta device: what keeps it from that is its description."""
    try:
        yield
    except Exception as error:
        raise ModelError.of(
            where,
            got=f"a description that transformers can make no model of ({reason_of(error)})",
            expected="widths, heads and other numbers of a model",
            hint="is one of them mistyped?",
        ) from error


def _on_meta(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _config(spec: ModelSpec, vocab_size: int, *, where: str) -> PretrainedConfig:
    if isinstance(spec, PretrainedModel):
        config = read_config(spec.path, revision=spec.revision, where=where)
        set_dropouts(config, Dropouts(spec.dropout, spec.attention_dropout), where=where)
        return config
    return model_config(spec, cast(PreTrainedTokenizerBase, Vocabulary(vocab_size)))
