"""States kept by hooks are those that transformers itself gives out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    OPTConfig,
)

from babyllama_ds.errors import ModelError
from babyllama_ds.models.layers import LayerTap, hidden_width, num_layers
from babyllama_ds.models.parts import split_causal_lm

TOKENS = torch.arange(33).view(3, 11)
SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24, dropout=0.0),
    "neox": lambda: GPTNeoXConfig(**SMALL, intermediate_size=40),
    # Its logits are capped: the model itself makes them.
    "gemma2": lambda: Gemma2Config(
        **SMALL, intermediate_size=40, num_key_value_heads=2, head_dim=6
    ),
}


def model_of(family: str, tiny_model: Callable[..., Any]) -> nn.Module:
    if family in FAMILIES:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    return tiny_model(family).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", *FAMILIES])
def test_every_layer(family: str, tiny_model: Callable[..., Any]) -> None:
    model = model_of(family, tiny_model)
    depth = num_layers(model)
    right = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert len(right) == depth + 1
    backbone, _ = split_causal_lm(model)
    tap = LayerTap(model, range(depth + 1), where="here")
    _, kept = tap.collect(lambda: backbone(TOKENS))
    assert sorted(kept) == list(range(depth + 1))
    for layer, states_BSD in kept.items():
        assert states_BSD.shape == (3, 11, hidden_width(model))
        assert torch.equal(states_BSD, right[layer]), layer


def test_only_the_named_ones_only_while_collecting(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").eval()
    backbone, _ = split_causal_lm(model)
    tap = LayerTap(model, [1, 1], where="here")
    backbone(TOKENS)
    assert tap._kept == {}
    states, kept = tap.collect(lambda: backbone(TOKENS))
    assert list(kept) == [1]
    assert tap._kept == {}
    assert torch.equal(states, backbone(TOKENS))
    tap.remove()
    assert tap.collect(lambda: backbone(TOKENS))[1] == {}
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(after or before for after, before in hooks)


def test_gradients_flow_through_what_is_kept(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    tap = LayerTap(model, [0, 1], where="here")
    _, kept = tap.collect(lambda: split_causal_lm(model)[0](TOKENS))
    sum(each.square().sum() for each in kept.values()).backward()
    assert model.transformer.wte.weight.grad is not None
    assert model.transformer.h[0].mlp.c_fc.weight.grad is not None
    assert model.transformer.h[1].mlp.c_fc.weight.grad is None


def test_an_error_in_the_pass_closes_the_tap(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    tap = LayerTap(model, [1], where="here")
    with pytest.raises(IndexError):
        tap.collect(lambda: split_causal_lm(model)[0](TOKENS + 100))
    split_causal_lm(model)[0](TOKENS)
    assert tap._kept == {}


def test_a_model_without_a_list_of_layers_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="without a list of its 7 layers") as caught:
        LayerTap(model, [1], where="teachers/odd")
    assert caught.value.problems[0].where == "teachers/odd"
