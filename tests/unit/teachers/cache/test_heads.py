"""The head alone is the head that the whole model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from babyllama_ds.errors import ModelError
from babyllama_ds.teachers.cache.heads import load_head
from babyllama_ds.teachers.cache.sources import Teacher

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_frozen_models(
    kind: str, changes: dict[str, Any], dtype: torch.dtype, teacher_of: Callable[..., Teacher]
) -> None:
    teacher = teacher_of(kind, **changes)
    head = load_head(teacher.model_dir, device=CPU, dtype=dtype)
    expected = teacher.load().head
    assert head.weight_PD.dtype == dtype
    assert torch.equal(head.weight_PD, expected.weight_PD.to(dtype))
    assert head.bias_P is None
    assert not head.weight_PD.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_a_bias(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Phi; a file has a tied head under the embedding's name. The rest is not read."""
    monkeypatch.delattr("babyllama_ds.teachers.cache.heads.load_model")
    torch.manual_seed(5)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    found = load_head(tmp_path, device=CPU, dtype=torch.float32)
    of_head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(found.weight_PD, kept[of_head])
    assert found.bias_P is not None
    assert torch.equal(found.bias_P, kept["lm_head.bias"])


def test_it_is_found_in_the_second_of_two_files(teacher_of: Callable[..., Teacher]) -> None:
    directory = teacher_of("llama").model_dir
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    head = {"lm_head.weight": weights.pop("lm_head.weight")}
    save_file(weights, directory / "model-00001-of-00002.safetensors")
    save_file(head, directory / "model-00002-of-00002.safetensors")
    found = load_head(directory, device=CPU, dtype=torch.bfloat16)
    assert torch.equal(found.weight_PD, head["lm_head.weight"])


def test_a_head_that_is_not_linear_is_refused(
    teacher_of: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = teacher_of("gpt2").model_dir
    monkeypatch.setattr(GPT2LMHeadModel, "get_output_embeddings", lambda self: None)
    with pytest.raises(ModelError, match="a head of type NoneType, expected a linear one"):
        load_head(directory, device=CPU, dtype=torch.bfloat16)


def test_a_model_without_it_is_refused(teacher_of: Callable[..., Teacher]) -> None:
    directory: Path = teacher_of("llama").model_dir
    weights = load_file(directory / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 weights are missing .*\(lm_head\.weight\)"):
        load_head(directory, device=CPU, dtype=torch.bfloat16)
