"""An exported model, loaded by transformers alone, is the model that was trained."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from babyllama_ds.errors import RunError
from babyllama_ds.files import write_manifest
from babyllama_ds.models.build import load_model
from babyllama_ds.models.export import export_model, write_model

SUMMARY = {"params": None, "steps": 3, "seconds": 1.5}
TOKENS = torch.arange(120).view(2, 60) % 61


@pytest.fixture
def tokenizer_dir(tmp_path: Path, word_tokenizer: Callable[[int], Any]) -> Path:
    """A store's entry: tokenizer files and a manifest."""
    directory = tmp_path / "tokenizer"
    word_tokenizer(61).save_pretrained(directory)
    write_manifest(directory, fingerprint="f")
    return directory


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_model_that_is_written_on_its_way_computes_what_it_did(
    kind: str, tmp_path: Path, tiny_model: Callable[..., Any], tokenizer_dir: Path
) -> None:
    """As ZeRO has it: parameters in bf16, the frequencies of RoPE in fp32."""
    model = tiny_model(kind).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = {name: (one.dtype, one.clone()) for name, one in model.named_buffers()}
    write_model(model, tokenizer_dir, tmp_path / "out", SUMMARY)
    assert model.training
    for name, buffer in model.named_buffers():
        dtype, value = before[name]
        assert buffer.dtype == dtype
        assert torch.equal(buffer, value)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_what_is_loaded_is_what_was_exported(
    kind: str,
    tied: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    tiny_model: Callable[..., Any],
    tokenizer_dir: Path,
) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied).eval()
    expected = model(input_ids=TOKENS).logits
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    export_model(model, tokenizer_dir, tmp_path / "out", SUMMARY, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    logits = loaded(input_ids=TOKENS).logits
    if dtype == torch.float32:
        assert torch.equal(logits, expected)
    else:
        assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary == {**SUMMARY, "params": num_parameters}


def test_the_directory_is_whole_and_holds_no_pickle(
    tmp_path: Path, tiny_model: Callable[..., Any], tokenizer_dir: Path
) -> None:
    out = tmp_path / "out"
    export_model(tiny_model("llama"), tokenizer_dir, out, SUMMARY, dtype=torch.bfloat16)
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    assert "manifest.json" not in names  # the tokenizer's; whoever publishes the model makes one
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(out)("w5 w60 w3")["input_ids"] == [5, 60, 3]
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_the_model_may_read_its_weights(
    mask: int,
    expected: int,
    tmp_path: Path,
    tiny_model: Callable[..., Any],
    tokenizer_dir: Path,
) -> None:
    before = os.umask(mask)
    try:
        export_model(
            tiny_model("llama"), tokenizer_dir, tmp_path / "out", SUMMARY, dtype=torch.bfloat16
        )
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == expected


def test_an_exported_model_generates(
    tmp_path: Path, tiny_model: Callable[..., Any], tokenizer_dir: Path
) -> None:
    out = tmp_path / "out"
    export_model(tiny_model("gpt2"), tokenizer_dir, out, SUMMARY, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    prompt = torch.tensor([[7, 8, 9]])
    written = loaded.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape == (1, 7)


def test_a_disk_that_refuses_is_an_error(
    tmp_path: Path, tiny_model: Callable[..., Any], tokenizer_dir: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))  # as a full disk would
    try:
        with pytest.raises(RunError, match=r"File too large .*while writing a model"):
            export_model(
                tiny_model("llama"), tokenizer_dir, tmp_path / "out", SUMMARY, dtype=torch.bfloat16
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_ends_at_the_models_positions(
    kind: str, tmp_path: Path, tiny_model: Callable[..., Any], tokenizer_dir: Path
) -> None:
    """A pipeline that is asked for nothing in particular would go beyond them."""
    out = tmp_path / "out"
    export_model(tiny_model(kind), tokenizer_dir, out, SUMMARY, dtype=torch.bfloat16)
    assert GenerationConfig.from_pretrained(out).max_length == 128
    told = tiny_model(kind)
    told.generation_config.max_length = 50
    export_model(told, tokenizer_dir, tmp_path / "told", SUMMARY, dtype=torch.bfloat16)
    assert GenerationConfig.from_pretrained(tmp_path / "told").max_length == 50


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": 0.9, "top_p": 0.6},  # and no word of sampling
        {"early_stopping": True, "length_penalty": 0.5},
        {"pad_token_id": -1},
        {"do_sample": True, "temperature": 0.7, "max_length": 40},
    ],
)
def test_what_a_loaded_model_says_of_generation_is_written_as_it_says_it(
    said: dict[str, Any], tmp_path: Path, tiny_model: Callable[..., Any], tokenizer_dir: Path
) -> None:
    """transformers loads settings that it would not save: training would end without a model."""
    tiny_model("gpt2").save_pretrained(tmp_path / "elder")
    path = tmp_path / "elder" / "generation_config.json"
    before = json.loads(path.read_text()) | said
    path.write_text(json.dumps(before))
    model = load_model(str(tmp_path / "elder"), attention=None, where="student.model")
    export_model(model, tokenizer_dir, tmp_path / "out", SUMMARY, dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"max_length": 128} | before
    assert model.generation_config.to_dict().items() >= said.items()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = loaded.generate(torch.tensor([[7, 8]]), max_new_tokens=3, min_new_tokens=3)
    assert text.shape == (1, 5)
