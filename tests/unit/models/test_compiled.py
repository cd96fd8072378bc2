"""Compiled layers: one piece of code for all of a model, the same numbers, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, OPTConfig, Qwen2Config

from babyllama_ds.models.compiled import CompiledLayers, forget_compiled
from babyllama_ds.models.fused import fuse
from babyllama_ds.models.layers import LayerTap, layers_of
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.models.recomputing import recompute_layers

TOKENS = torch.arange(33).view(3, 11)
SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**SMALL, intermediate_size=40, num_key_value_heads=2),
    "neox": lambda: GPTNeoXConfig(**SMALL, intermediate_size=40),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24, dropout=0.0),
    # Every other layer looks through a window.
    "gemma2": lambda: Gemma2Config(
        **SMALL, intermediate_size=40, num_key_value_heads=2, head_dim=6, sliding_window=5
    ),
}


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """All of torch.compile but its last part, which needs a C++ compiler; counts what it got."""
    counted = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    forget_compiled()
    yield counted
    forget_compiled()


@pytest.fixture
def make(tiny_model: Callable[..., Any]) -> Callable[[str], Any]:
    def made(family: str) -> Any:
        torch.manual_seed(0)
        if family in FAMILIES:
            model = AutoModelForCausalLM.from_config(FAMILIES[family]())
        else:
            model = tiny_model(family, num_hidden_layers=3, attn_implementation="eager")
            fuse(model)
        return model.train()

    return made


def states_and_gradients(model: nn.Module) -> list[Tensor]:
    """Final hidden states [B, S, D], and the parameters' gradients for a fixed one of these."""
    model.zero_grad()
    states_BSD = split_causal_lm(model)[0](TOKENS)
    states_BSD.backward(torch.linspace(-1, 1, states_BSD.numel()).view_as(states_BSD))
    return [states_BSD.detach(), *(p.grad for p in model.base_model.parameters())]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("family", ["llama", "gpt2", *FAMILIES])
def test_one_graph_serves_all_layers(
    family: str, make: Callable[[str], Any], counter: CompileCounterWithBackend
) -> None:
    right = states_and_gradients(make(family))
    model = make(family)
    names = list(model.state_dict())
    CompiledLayers(model, training=True)
    for _ in range(2):
        torch.testing.assert_close(states_and_gradients(model), right, rtol=1e-4, atol=1e-4)
        # In older releases of transformers a layer of Gemma 2 asks which kind it is.
        assert counter.frame_count in ({1, 2} if family == "gemma2" else {1})
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("training", "passes"),
    [(True, [torch.no_grad, torch.inference_mode]), (False, [nullcontext])],
)
def test_other_passes_are_not_compiled(
    training: bool,
    passes: list[Callable[[], Any]],
    make: Callable[[str], Any],
    counter: CompileCounterWithBackend,
) -> None:
    model = make("llama")
    CompiledLayers(model, training=training)
    for mode in passes:
        with mode():
            split_causal_lm(model)[0](TOKENS)
    assert counter.frame_count == 0
    with nullcontext() if training else torch.inference_mode():
        split_causal_lm(model)[0](TOKENS)
    assert counter.frame_count == 1


def test_removed_nothing_is_left(
    make: Callable[[str], Any], counter: CompileCounterWithBackend
) -> None:
    model = make("llama")
    layers = CompiledLayers(model, training=True)
    assert all("forward" in vars(layer) for layer in layers_of(model) or [])
    layers.remove()
    layers.remove()  # nothing more to do
    assert not any("forward" in vars(module) for module in model.modules())
    states_and_gradients(model)
    assert counter.frame_count == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_layers_are_compiled_both_times(
    family: str, make: Callable[[str], Any], counter: CompileCounterWithBackend
) -> None:
    """torch refuses to go on where the second pass keeps other tensors than the first."""
    right = states_and_gradients(make(family))
    model = make(family)
    recompute_layers(model)
    CompiledLayers(model, training=True)
    torch.testing.assert_close(states_and_gradients(model), right, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("tap_first", [True, False])
def test_hooks_see_the_states_between_layers(
    tap_first: bool, make: Callable[[str], Any], counter: CompileCounterWithBackend
) -> None:
    right = make("llama")(input_ids=TOKENS, output_hidden_states=True).hidden_states
    model = make("llama")
    if tap_first:
        tap = LayerTap(model, range(4), where="here")
    CompiledLayers(model, training=True)
    if not tap_first:
        tap = LayerTap(model, range(4), where="here")
    for _ in range(2):
        _, kept = tap.collect(lambda: split_causal_lm(model)[0](TOKENS))
        torch.testing.assert_close([kept[layer] for layer in range(4)], list(right))
    assert counter.frame_count == 1


def test_without_a_list_of_layers_the_backbone_is_compiled(
    make: Callable[[str], Any], counter: CompileCounterWithBackend
) -> None:
    right = states_and_gradients(make("llama"))
    model = make("llama")
    model.config.num_hidden_layers = 7
    layers = CompiledLayers(model, training=True)
    torch.testing.assert_close(states_and_gradients(model), right, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    layers.remove()
    assert "forward" not in vars(model.base_model)
