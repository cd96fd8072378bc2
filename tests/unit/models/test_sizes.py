"""Sizes of models that were never built: published counts, and FLOPs as PyTorch counts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from babyllama_ds.errors import ModelError
from babyllama_ds.models.build import count_parameters
from babyllama_ds.models.sizes import meta_model, model_sizes, sizes_of
from babyllama_ds.spec.models import Gpt2Model, LlamaModel, ModelSpec, PretrainedModel
from references.flops import forward_flops

VOCAB = 16_000


def llama(hidden: int, layers: int, heads: int, inner: int, **changes: Any) -> LlamaModel:
    return LlamaModel(
        kind="llama",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        **changes,
    )


def gpt2(hidden: int, layers: int, heads: int, **changes: Any) -> Gpt2Model:
    return Gpt2Model(kind="gpt2", hidden_size=hidden, num_layers=layers, num_heads=heads, **changes)


PUBLISHED: list[tuple[ModelSpec, int]] = [
    (gpt2(1536, 24, 16, max_positions=256), 704_928_768),
    (gpt2(1536, 24, 16, max_positions=128), 704_732_160),
    (llama(1024, 24, 8, 3072), 359_973_888),
    (llama(512, 16, 8, 1024), 58_343_936),
    (llama(960, 32, 15, 2560, num_kv_heads=5), 345_355_200),
    (llama(768, 12, 12, 2048, tied_embeddings=True), 97_241_856),
    (gpt2(768, 12, 12), 97_540_608),
    (llama(256, 8, 8, 1024), 16_584_960),
]


@pytest.mark.parametrize(("spec", "params"), PUBLISHED, ids=[str(n) for _, n in PUBLISHED])
def test_the_published_models(spec: ModelSpec, params: int) -> None:
    assert model_sizes(spec, VOCAB, where="x").params == params


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gpt2", {"n_inner": 40}),
    ],
)
def test_flops_are_those_that_pytorch_counts(
    kind: str, changes: dict[str, Any], tiny_model: Callable[..., Any]
) -> None:
    """Exactly, with eager attention: the CPU's fused kernel is unknown to `FlopCounterMode`."""
    windows, length, vocab = 3, 17, 61
    model = tiny_model(kind, attn_implementation="eager", **changes)
    sizes = sizes_of(model.config)
    assert sizes.params == count_parameters(model)
    assert sorted(sizes.parameter_sizes) == sorted(p.numel() for p in model.parameters())
    tokens = windows * length
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=torch.randint(0, vocab, (windows, length)), use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    found = forward_flops(forward)
    assert found == tokens * sizes.forward_flops(length, vocab)
    both = found + backward.get_total_flops()
    assert both == tokens * sizes.training_flops(length, vocab)


def test_spare_rows_of_a_padded_head_are_not_computed(tiny_model: Callable[..., Any]) -> None:
    sizes = sizes_of(tiny_model("llama", vocab_size=64).config)
    assert sizes.head_rows == 64
    assert sizes.head_flops(61) == 2 * 61 * 24


def test_a_loaded_models_configuration_is_enough(
    tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    sizes = model_sizes(PretrainedModel(kind="pretrained", path=str(tmp_path)), 61, where="x")
    assert sizes.params == count_parameters(model)


def test_too_few_rows_are_refused(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        model_sizes(PretrainedModel(kind="pretrained", path=str(tmp_path)), 62, where="a.model")
    assert str(caught.value) == (
        "a.model: got an embedding of 61 rows, expected at least 62, the tokenizer's size\n"
        "    hint: use the tokenizer that this model was trained with"
    )


def test_a_path_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model_sizes(PretrainedModel(kind="pretrained", path=str(tmp_path)), 62, where="a.model")
    assert str(caught.value).startswith(f"a.model: got {tmp_path}: ")
    assert "expected a causal language model: its directory (config.json, *.safetensors)" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": "24"}, "Field 'hidden_size' expected int, got str (value: '24')"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads (5)"),
        ({"num_attention_heads": 0}, "integer modulo by zero"),
        ({"pad_token_id": 999}, "Padding_idx must be within num_embeddings"),
    ],
)
def test_a_configuration_with_wrong_values_is_refused_in_words(
    tmp_path: Path, tiny_model: Callable[..., Any], changes: dict[str, Any], told: str
) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError) as caught:
        model_sizes(PretrainedModel(kind="pretrained", path=str(tmp_path)), 61, where="a.model")
    (problem,) = caught.value.problems
    assert problem.where == "a.model"
    assert told in problem.got


@pytest.mark.parametrize("make", [model_sizes, meta_model])
def test_a_mistyped_width_is_refused_in_words(make: Callable[..., Any]) -> None:
    spec = llama(10**12, 1, 10, 64)
    with pytest.raises(ModelError, match=r"a\.model: got a description .* \(Storage size"):
        make(spec, VOCAB, where="a.model")


def test_no_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything lies on the meta device: a model of 700 million parameters takes no storage."""
    real = torch.empty

    def only_meta(*sizes: Any, **options: Any) -> torch.Tensor:
        made = real(*sizes, **options)
        assert made.device.type == "meta" or made.numel() < 10_000
        return made

    monkeypatch.setattr(torch, "empty", only_meta)
    spec, params = PUBLISHED[0]  # a vocabulary of its own: sizes are kept
    assert model_sizes(spec, VOCAB + 1, where="x").params == params + 1536
