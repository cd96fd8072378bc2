"""Building and loading: a `ModelSpec` enters, a causal language model on the CPU leaves.

Random initialisation depends on the seed alone: weights are drawn in fp32 on the CPU, whatever
the device, the precision or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from babyllama_ds.errors import ModelError, UserError
from babyllama_ds.hub import commit_of
from babyllama_ds.models.directories import (
    MODEL,
    check_weight_files,
    read_config,
    reason_of,
)
from babyllama_ds.models.families import missing_kernels, positions_of
from babyllama_ds.models.fused import fuse
from babyllama_ds.models.probe import embedding_rows
from babyllama_ds.spec.models import Gpt2Model, LlamaModel, ModelSpec, PretrainedModel


def build_model(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    attention: str,
    where: str,
) -> nn.Module:
    """A model in fp32 on the CPU: randomly initialised from `seed`, or loaded.

    Raises:
        ModelError: a path that does not hold a loadable model, or a model without an
            embedding row for every token id.
    """
    if isinstance(spec, PretrainedModel):
        dropouts = Dropouts(spec.dropout, spec.attention_dropout)
        model = load_model(
            spec.path,
            revision=spec.revision,
            attention=attention,
            where=where,
            dropouts=dropouts,
        )
    else:
        config = model_config(spec, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        fuse(model)
    check_vocabulary_fits(model, len(tokenizer), where=where)
    return model


def model_config(
    spec: LlamaModel | Gpt2Model, tokenizer: PreTrainedTokenizerBase
) -> PretrainedConfig:
    """The transformers configuration of a model built from random initialisation."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": _only_padding(tokenizer),
    }
    if isinstance(spec, Gpt2Model):
        return GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=spec.max_positions,
            n_embd=spec.hidden_size,
            n_layer=spec.num_layers,
            n_head=spec.num_heads,
            n_inner=spec.intermediate_size,
            resid_pdrop=spec.dropout,
            embd_pdrop=spec.dropout,
            attn_pdrop=spec.dropout,
            layer_norm_epsilon=spec.norm_epsilon,
            initializer_range=spec.initializer_range,
            # The published "gelu_new", the same function, computed in one operation.
            activation_function="gelu_pytorch_tanh",
            tie_word_embeddings=spec.tied_embeddings,
            **special,
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads or spec.num_heads,
        max_position_embeddings=spec.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        rms_norm_eps=spec.norm_epsilon,
        initializer_range=spec.initializer_range,
        attention_dropout=spec.attention_dropout,
        tie_word_embeddings=spec.tied_embeddings,
        **special,
    )


def _only_padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that pads; none where it also stands in the text, as where a tokenizer pads with
    the end of texts. LLaMA's embedding of the one that its configuration names is never learnt: it
    begins as zeros, and gets no gradient."""
    in_text = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    padding: int | None = tokenizer.pad_token_id
    return None if padding in in_text else padding


class Dropouts(NamedTuple):
    """Probabilities to be set in a loaded configuration; none: as it says."""

    rest: float | None = None
    """Of residuals and embeddings."""
    attention: float | None = None


AS_CONFIGURED = Dropouts()


def load_model(
    path: str,
    *,
    revision: str | None = None,
    attention: str | None,
    where: str,
    dtype: torch.dtype | str = torch.float32,
    dropouts: Dropouts = AS_CONFIGURED,
) -> nn.Module:
    """A causal language model from a Hugging Face directory, or of a hub id at a commit, tag or
    branch; safetensors only.

    No `attention`: PyTorch's fused one, or `eager` in families that have nothing else.

    Raises:
        HubError: nothing there, neither here nor on the hub.
        ModelError: nothing loadable at `path`, a file without all of the model's weights, or a
            dropout that the family does not have.
    """
    config = read_config(path, revision=revision, where=where)
    check_weight_files(path, where=where)
    set_dropouts(config, dropouts, where=where)
    if "sdpa" in missing_kernels(config):  # transformers may load it all the same
        if attention == "sdpa":
            raise ModelError.of(
                where,
                got=f"{path}: {config.model_type}, which does not support sdpa",
                expected="a kernel that the model's family has: eager",
            )
        attention = attention or "eager"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            revision=commit_of(path, revision, where=where, what=MODEL),
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # for an error of ours, below
        )
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise ModelError.of(where, got=f"{path}: {reason_of(error)}", expected=MODEL) from error
    _check_whole(report, path, where=where)
    loaded: nn.Module = model
    fuse(loaded)
    return loaded


REST_DROPOUTS = (
    *("resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "hidden_dropout_prob"),
    *("embedding_dropout", "residual_dropout"),
)
ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
"""What families of transformers call them."""


def set_dropouts(config: PretrainedConfig, dropouts: Dropouts, *, where: str) -> None:
    """Set the probabilities that are asked for, in place.

    Raises:
        ModelError: the family has no such dropout.
    """
    for key, names, p in (
        ("dropout", REST_DROPOUTS, dropouts.rest),
        ("attention_dropout", ATTENTION_DROPOUTS, dropouts.attention),
    ):
        known = [name for name in names if hasattr(config, name)]
        if p is not None and not known:
            raise ModelError.of(
                f"{where}.{key}",
                got=f"{p:g} for a model of the family {config.model_type}, which has none",
                expected="nothing",
                hint=f"leave {key} out",
            )
        for name in known if p is not None else ():
            setattr(config, name, p)


def _check_whole(report: Mapping[str, Any], path: str, *, where: str) -> None:
    """What the file lacks, transformers draws at random, with no more than a warning."""
    lacking = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if lacking:
        raise ModelError.of(
            where,
            got=f"{path}: {len(lacking)} weights are missing or of another shape "
            f"({', '.join(lacking[:4])}{', …' if len(lacking) > 4 else ''})",
            expected="every weight of the model that config.json describes",
        )


def check_vocabulary_fits(model: nn.Module, vocab_size: int, *, where: str) -> None:
    """Every token id has an embedding row (more rows are padding and are masked).

    Raises:
        ModelError: fewer rows than token ids.
    """
    rows = embedding_rows(model)
    if rows < vocab_size:
        raise ModelError.of(
            where,
            got=f"an embedding of {rows} rows",
            expected=f"at least {vocab_size}, the tokenizer's size",
            hint="use the tokenizer that this model was trained with",
        )


def check_positions(model: nn.Module, length: int, *, where: str) -> None:
    """Windows fit into the model's positions.

    Raises:
        ModelError: windows are longer than the model's positions.
    """
    positions = positions_of(model.config)
    if positions is not None and positions < length:
        raise ModelError.of(
            where,
            got=f"{positions} positions",
            expected=f"at least {length}, the length of a window",
            hint="shorten `windows.length` or use a model with more positions",
        )


def count_parameters(model: nn.Module) -> int:
    """Parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
