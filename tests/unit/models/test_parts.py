"""Backbone and head together are the model, also of families whose logits are more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
)

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def with_bias() -> nn.Module:
    """Phi's head has a bias."""
    small = {**SMALL, "num_attention_heads": 2}  # half of each head is rotated, in pairs
    model = random_model(PhiConfig(**{k: v for k, v in small.items() if k != "head_dim"}))
    nn.init.normal_(model.lm_head.bias)
    return model


def test_a_head_with_bias_is_accepted_and_split_with_it() -> None:
    model = with_bias().eval()
    assert check_plain_head(model, where="teachers.a.model") == "plain"
    backbone, head = split_causal_lm(model)
    assert head.bias_P is model.lm_head.bias
    torch.testing.assert_close(logits(backbone(TOKENS), head, 61), model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_plain_models_pass_and_keep_their_mode(
    kind: str, training: bool, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(kind, **({"resid_pdrop": 0.5} if kind == "gpt2" else {})).train(training)
    assert check_plain_head(model, where="teachers.a.model") == "plain"
    assert all(module.training == training for module in model.modules())


def capped() -> nn.Module:
    """Gemma 2: 30 · tanh(logits / 30), here of an untrained model with logits of about 1."""
    small = {**SMALL, "initializer_range": 0.08}
    return random_model(Gemma2Config(**small, final_logit_softcapping=30.0))


def scaled() -> nn.Module:
    """Cohere: logits times 1/16."""
    return random_model(CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}))


def divided() -> nn.Module:
    """Granite: logits divided by a factor."""
    config = {k: v for k, v in SMALL.items() if k != "head_dim"}
    return random_model(GraniteConfig(**config, logits_scaling=8.0))


def transformed() -> nn.Module:
    """BERT: another layer between hidden states and head."""
    small = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    return random_model(BertConfig(**small, is_decoder=True))


def not_linear() -> nn.Module:
    """A head that no loss could multiply by."""
    model = random_model(LlamaConfig(**SMALL))
    model.lm_head = nn.Sequential(nn.Linear(24, 61))
    return model


OTHERS = [capped, scaled, divided, transformed, not_linear]


@pytest.mark.parametrize("make", OTHERS)
def test_logits_that_are_more_than_the_heads_product_are_the_models_own(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = make().train()
    with caplog.at_level("INFO"):
        assert check_plain_head(model, where="teachers.a.model") == "logits"
        split_causal_lm(model)
    (message,) = [r.message for r in caplog.records if r.name == "babyllama_ds.models.parts"]
    assert message.startswith(f"teachers.a.model: the logits of {type(model).__name__} are more")
    assert all(module.training for module in model.modules())
    backbone, head = split_causal_lm(model.eval())
    assert head.states_are_logits
    assert torch.equal(
        logits(backbone(TOKENS)[0], head, 59), model(input_ids=TOKENS).logits[0, :, :59]
    )


@pytest.mark.parametrize("make", OTHERS)
def test_nobody_needs_to_have_checked(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    backbone, head = split_causal_lm(model)
    assert head.states_are_logits
    assert torch.equal(backbone(TOKENS), model(input_ids=TOKENS).logits)


def test_a_cap_that_hardly_moves_the_logits_is_seen() -> None:
    """A new model's logits are small: here a cap at 30 takes 1e-5 of the largest."""
    config = Gemma2Config(**{**SMALL, "initializer_range": 0.01}, final_logit_softcapping=30.0)
    model = random_model(config).eval()
    assert model(input_ids=TOKENS).logits.abs().max() < 0.2
    assert check_plain_head(model, where="student.model") == "logits"


def test_the_probe_is_done_once() -> None:
    model = capped()
    calls: list[object] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        split_causal_lm(model)
    assert len(calls) == 1
    split_causal_lm(copy.deepcopy(model))
    assert len(calls) == 1


def test_the_models_of_this_stack_need_no_probe(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    calls: list[object] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert not split_causal_lm(model)[1].states_are_logits
    assert not calls


def test_the_probe_draws_no_random_numbers_and_makes_no_gradients() -> None:
    model = capped().train()
    before = torch.random.get_rng_state()
    split_causal_lm(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = with_bias()
    with torch.no_grad():
        model.model.final_layernorm.weight[3] = torch.nan
    assert not split_causal_lm(model)[1].states_are_logits  # a loss that is NaN says so itself
    with pytest.raises(ModelError) as caught:
        check_plain_head(model, where="teachers.a.model")
    (problem,) = caught.value.problems
    assert problem.where == "teachers.a.model"
    assert problem.got == "logits that are not finite"
    assert "diverged" in str(problem.hint)
