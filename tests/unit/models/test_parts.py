"""Backbone and head together are the model; families whose logits are more are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from babyllama_ds.errors import ModelError
from babyllama_ds.losses.heads import logits
from babyllama_ds.models.parts import check_plain_head, split_causal_lm

TOKENS = torch.arange(33).view(3, 11)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_head_of_backbone_is_the_model(
    kind: str, tied: bool, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied).eval()
    backbone, head = split_causal_lm(model)
    assert torch.equal(logits(backbone(TOKENS), head, 61), model(input_ids=TOKENS).logits)
    assert head.bias_P is None


def test_both_parts_see_later_changes(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").eval()
    backbone, head = split_causal_lm(model)
    before = backbone(TOKENS)
    with torch.no_grad():
        model.lm_head.weight.fill_(3.0)
        model.model.norm.weight.mul_(2.0)
    assert (head.weight_PD == 3).all()
    torch.testing.assert_close(backbone(TOKENS), 2 * before)


def test_gradients_reach_every_weight(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    backbone, head = split_causal_lm(model)
    logits(backbone(TOKENS), head, 61).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- which families are plain ----------------------------------------------------------------------

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def random_model(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def with_bias() -> nn.Module:
    """Phi's head has a bias."""
    from transformers import PhiConfig

    small = {**SMALL, "num_attention_heads": 2}  # half of each head is rotated, in pairs
    model = random_model(PhiConfig(**{k: v for k, v in small.items() if k != "head_dim"}))
    nn.init.normal_(model.lm_head.bias)
    return model


def test_a_head_with_bias_is_accepted_and_split_with_it() -> None:
    model = with_bias().eval()
    check_plain_head(model, where="teachers.a.model")
    backbone, head = split_causal_lm(model)
    assert head.bias_P is model.lm_head.bias
    torch.testing.assert_close(logits(backbone(TOKENS), head, 61), model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_plain_models_pass_and_keep_their_mode(
    kind: str, training: bool, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(kind, **({"resid_pdrop": 0.5} if kind == "gpt2" else {})).train(training)
    check_plain_head(model, where="teachers.a.model")
    assert all(module.training == training for module in model.modules())


def capped() -> nn.Module:
    """Gemma 2: 30 · tanh(logits / 30), here of an untrained model with logits of about 1."""
    from transformers import Gemma2Config

    small = {**SMALL, "initializer_range": 0.08}
    return random_model(Gemma2Config(**small, final_logit_softcapping=30.0))


def scaled() -> nn.Module:
    """Cohere: logits times 1/16."""
    from transformers import CohereConfig

    return random_model(CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}))


def divided() -> nn.Module:
    """Granite: logits divided by a factor."""
    from transformers import GraniteConfig

    config = {k: v for k, v in SMALL.items() if k != "head_dim"}
    return random_model(GraniteConfig(**config, logits_scaling=8.0))


def transformed() -> nn.Module:
    """BERT: another layer between hidden states and head."""
    from transformers import BertConfig

    small = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    return random_model(BertConfig(**small, is_decoder=True))


@pytest.mark.parametrize("make", [capped, scaled, divided, transformed])
def test_logits_that_are_more_than_the_heads_product_are_refused(
    make: Callable[[], nn.Module],
) -> None:
    model = make().train()
    with pytest.raises(ModelError) as caught:
        check_plain_head(model, where="teachers.a.model")
    (problem,) = caught.value.problems
    assert problem.where == "teachers.a.model"
    assert "logits that are not the head's product" in problem.got


def test_a_head_that_is_not_linear_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(nn.Linear(24, 61))
    with pytest.raises(ModelError, match="got a head of type Sequential"):
        check_plain_head(model, where="teachers.a.model")
