"""Fused modules compute what transformers' own do: exactly in fp64, no less well in bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from babyllama_ds.engine.compiling import what_compiling_lacks
from babyllama_ds.models import fused
from babyllama_ds.models.build import load_model
from babyllama_ds.models.fused import FusedGPT2MLP, FusedRMSNorm, fuse, plain_attention
from references.errors import relative_error
from references.modules import ExactRMSNorm, exact, logits_and_gradients

TinyModel = Callable[..., Any]

FAMILIES = {
    "llama": {"rms_norm_eps": 1e-2},  # so large that one left out shows
    "gpt2": {"activation_function": "gelu_new"},
}


def pair(tiny_model: TinyModel, kind: str, *, attention: str, dtype: torch.dtype) -> Any:
    """A model of transformers' modules and its fused copy; no weight is 1, no bias 0."""
    torch.manual_seed(3)
    theirs = tiny_model(kind, attn_implementation=attention, **FAMILIES[kind])
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = theirs.to(dtype).eval()
    ours = copy.deepcopy(theirs)
    fuse(ours)
    return theirs, ours


def token_ids(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_function_and_its_gradient_are_the_same(
    kind: str, attention: str, tiny_model: TinyModel
) -> None:
    theirs, ours = pair(tiny_model, kind, attention=attention, dtype=torch.float64)
    expected, got = (
        logits_and_gradients(exact(theirs), token_ids()),
        logits_and_gradients(ours, token_ids()),
    )
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_no_less_precise_in_bf16(kind: str, grad: bool, tiny_model: TinyModel) -> None:
    theirs, ours = pair(tiny_model, kind, attention="eager", dtype=torch.bfloat16)
    ids_BS = token_ids(8, 32)
    results = [
        logits_and_gradients(model, ids_BS, grad=grad) for model in (exact(theirs), theirs, ours)
    ]
    for part in [["logits"], results[0].keys() - {"logits"}][: 1 + grad]:
        reference, expected, got = (
            torch.cat([result[name].flatten() for name in sorted(part)]) for result in results
        )
        assert 0 < relative_error(got, reference) < 1.2 * relative_error(expected, reference)


def test_attention_with_dropout_padding_and_grouped_heads(tiny_model: TinyModel) -> None:
    theirs, ours = pair(tiny_model, "llama", attention="eager", dtype=torch.float64)
    padding_BS = torch.ones(3, 11, dtype=torch.int64)
    padding_BS[1, :4] = 0
    logits = [
        model(input_ids=token_ids(), attention_mask=padding_BS).logits
        for model in (exact(theirs), ours)
    ]
    # Of a padded position nothing is expected: nobody looks at it.
    seen = padding_BS.bool()
    torch.testing.assert_close(logits[1][seen], logits[0][seen], rtol=1e-10, atol=1e-12)

    query, key, value = (torch.randn(2, heads, 5, 4).double() for heads in (6, 2, 2))
    module = nn.Module().train()
    options = {"attention_mask": torch.zeros(1, 1, 5, 5).double(), "scaling": 0.5}
    torch.manual_seed(6)
    out, weights = plain_attention(module, query, key, value, dropout=0.4, **options)
    assert 0.2 < (weights == 0).double().mean() < 0.6
    expected = (weights @ value.repeat_interleave(3, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    module.eval()
    _, weights = plain_attention(module, query, key, value, dropout=0.4, **options)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 5).double())


def test_generation_goes_through_the_fused_attention(tiny_model: TinyModel) -> None:
    """With a key-value cache, queries are fewer than keys."""
    theirs, ours = pair(tiny_model, "llama", attention="eager", dtype=torch.float64)
    ids_BS = token_ids(2, 5)
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(ids_BS, **words), theirs.generate(ids_BS, **words))


@pytest.mark.parametrize("width", [48, 256])
def test_rms_norm_is_as_precise_as_transformers(width: int) -> None:
    """In bf16, of many rows: the states, their gradient, and the sum that is the weight's."""
    torch.manual_seed(8)
    states, gradient = (torch.randn(2, 600, width).bfloat16() + 0.25 for _ in range(2))
    weight = torch.rand(width).bfloat16() + 0.5

    def results(kind: type[LlamaRMSNorm], dtype: torch.dtype) -> list[Tensor]:
        norm = kind(width, 1e-6)
        norm.weight.data = weight.to(dtype)
        its_states = states.detach().clone().to(dtype).requires_grad_()
        normed = norm(its_states)
        normed.backward(gradient.to(dtype))
        return [normed.detach(), its_states.grad, norm.weight.grad]

    reference = results(ExactRMSNorm, torch.float64)
    theirs, ours = (results(kind, torch.bfloat16) for kind in (LlamaRMSNorm, FusedRMSNorm))
    for value, expected, got in zip(reference, theirs, ours, strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, value) < 1.3 * relative_error(expected, value)


def test_rms_norm_off_the_cpu_is_one_call_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is asked for the same function: by what it is given, computed on a CPU."""
    calls: list[tuple[Any, ...]] = []
    rms_norm = nn.functional.rms_norm

    def recorded(states: Tensor, *given: Any) -> Tensor:
        calls.append(given)
        return states

    monkeypatch.setattr(nn.functional, "rms_norm", recorded)
    norm = FusedRMSNorm(8, 1e-2).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm(torch.empty(2, 3, 8, dtype=torch.float64, device="meta"))
    (given,) = calls
    torch.manual_seed(9)
    states = torch.randn(2, 3, 8, dtype=torch.float64)
    exact_norm = ExactRMSNorm(8, 1e-2).double()
    exact_norm.weight = norm.weight
    torch.testing.assert_close(rms_norm(states, *given), exact_norm(states))


def test_rms_norm_gradient_is_the_slope() -> None:
    torch.manual_seed(7)
    states = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: fused._RMSNorm.apply(x, w, 1e-2), (states, weight))


def test_gelu_is_the_same_function() -> None:
    values = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    torch.testing.assert_close(
        GELUTanh()(values), NewGELUActivation()(values), rtol=1e-12, atol=1e-12
    )


def test_gelu_inside_the_product_is_the_tanh_form(tiny_model: TinyModel) -> None:
    """At -3 the error function's form is 10 % off."""
    _, ours = pair(tiny_model, "gpt2", attention="sdpa", dtype=torch.bfloat16)
    layer = ours.transformer.h[0].mlp
    for product in (layer.c_fc, layer.c_proj):
        nn.init.zeros_(product.bias)
        nn.init.eye_(product.weight)
    values = torch.linspace(-3.2, 2, 24).bfloat16()
    expected = NewGELUActivation()(values.double())
    with torch.inference_mode():
        torch.testing.assert_close(layer(values[None])[0].double(), expected, rtol=5e-3, atol=0)
    torch.testing.assert_close(layer(values[None])[0].double(), expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_torch_compile_sees_through(kind: str, backend: str, tiny_model: TinyModel) -> None:
    """One graph, which the whole compiler takes, too: it knows less of oneDNN than PyTorch.

    Its own kernels round elsewhere, and hardly more.
    """
    if backend == "inductor" and (lacking := what_compiling_lacks("cpu")):
        pytest.skip(lacking)
    _, ours = pair(tiny_model, kind, attention="eager", dtype=torch.bfloat16)
    compiled = torch.compile(ours.base_model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        reference = exact(ours).base_model(token_ids(), use_cache=False).last_hidden_state
        plain = ours.base_model(token_ids(), use_cache=False).last_hidden_state
        got = compiled(token_ids(), use_cache=False).last_hidden_state
    assert relative_error(got, reference) < 1.3 * relative_error(plain, reference)
    assert backend == "inductor" or relative_error(got, plain.double()) < 1e-2
    torch.compiler.reset()


def test_what_is_swapped_and_what_is_left(tiny_model: TinyModel) -> None:
    def classes(model: nn.Module) -> set[type]:
        return {type(module) for module in model.modules()}

    theirs, ours = pair(tiny_model, "gpt2", attention="eager", dtype=torch.float32)
    assert {NewGELUActivation, GPT2MLP} <= classes(theirs)
    assert not {NewGELUActivation} & classes(ours)
    assert (FusedGPT2MLP in classes(ours)) == fused._fuses_products()
    assert (theirs.config._attn_implementation, ours.config._attn_implementation) == (
        "eager",
        fused.PLAIN_ATTENTION,
    )
    other = tiny_model("gpt2", activation_function="relu", reorder_and_upcast_attn=True)
    other.set_attn_implementation("eager")
    fuse(other)
    assert FusedGPT2MLP not in classes(other)
    assert other.config._attn_implementation == "eager"

    theirs, ours = pair(tiny_model, "llama", attention="sdpa", dtype=torch.float32)
    assert LlamaRMSNorm in classes(theirs)
    assert classes(ours) == (classes(theirs) - {LlamaRMSNorm}) | {FusedRMSNorm}
    assert ours.config._attn_implementation == "sdpa"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    again = copy.deepcopy(ours)
    fuse(again)
    assert classes(again) == classes(ours)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_saved_is_transformers_own(
    kind: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    theirs, ours = pair(tiny_model, kind, attention="eager", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert not any(type(module).__module__ == fused.__name__ for module in plain.modules())
    loaded = load_model(str(tmp_path / "ours"), attention="eager", where="x")
    ids_BS = token_ids()
    torch.testing.assert_close(loaded(ids_BS).logits, plain(ids_BS).logits, rtol=1e-4, atol=1e-5)
