"""What families differ in: found by configuration or by trying, and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM

from babyllama_ds.errors import ModelError
from babyllama_ds.models.build import load_model
from babyllama_ds.models.families import (
    check_causal,
    check_runs,
    check_trainable,
    missing_kernels,
    positions_of,
)
from babyllama_ds.models.sizes import model_sizes
from babyllama_ds.spec.models import PretrainedModel

WHERE = "teachers.a.model"
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def random_model(config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def mamba() -> Any:
    return hf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)


def test_positions_by_the_names_of_families() -> None:
    assert positions_of(hf.LlamaConfig(max_position_embeddings=77)) == 77
    assert positions_of(hf.GPT2Config(n_positions=77)) == 77
    assert positions_of(hf.MptConfig(max_seq_len=77)) == 77
    assert positions_of(hf.BloomConfig()) is None


def test_kernels_by_family() -> None:
    assert missing_kernels(hf.LlamaConfig()) == frozenset()
    assert missing_kernels(hf.GPTJConfig()) == {"sdpa"}
    assert missing_kernels(hf.BloomConfig()) == {"sdpa", "flash_attention"}


@pytest.fixture
def as_in_5_17(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers, which later says of Gemma 2 what PyTorch's kernel lacks."""
    monkeypatch.setattr(hf.Gemma2ForCausalLM, "_supports_sdpa", True)
    monkeypatch.setattr(hf.Gemma2Model, "_supports_sdpa", True)


@pytest.mark.usefixtures("as_in_5_17")
def test_capped_scores_are_not_left_to_a_kernel_without_caps(tmp_path: Path) -> None:
    assert "sdpa" in missing_kernels(hf.Gemma2Config())
    assert "sdpa" not in missing_kernels(hf.Gemma2Config(attn_logit_softcapping=None))
    config = hf.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8)
    random_model(config).save_pretrained(tmp_path)
    loaded: Any = load_model(str(tmp_path), attention=None, where="test")
    assert loaded.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="gemma2, which does not support sdpa"):
        load_model(str(tmp_path), attention="sdpa", where="test")


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_looks_at_later_tokens(training: bool) -> None:
    model = random_model(hf.BertConfig(**SMALL)).train(training)
    with pytest.raises(ModelError) as caught:
        check_causal(model, where=WHERE)
    (problem,) = caught.value.problems
    assert problem.got == "BertLMHeadModel, whose predictions change with later tokens"
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initializer_range", [1e-3, 0.02])
@pytest.mark.parametrize("num_layers", [1, 6])
def test_one_whose_logits_hardly_move(
    dtype: torch.dtype, initializer_range: float, num_layers: int
) -> None:
    """As of a model that was never trained: what it looks at is not told by how much."""
    sizes = {**SMALL, "initializer_range": initializer_range, "num_hidden_layers": num_layers}
    model = random_model(hf.BertConfig(**sizes)).to(dtype)
    with pytest.raises(ModelError, match="BertLMHeadModel, whose predictions change with later"):
        check_causal(model, where=WHERE)
    assert all(parameter.grad is None for parameter in model.parameters())
    decoder = random_model(hf.BertConfig(**sizes, is_decoder=True)).to(dtype)
    check_causal(decoder, where=WHERE)


def test_a_decoder_of_the_same_family_does_not() -> None:
    check_causal(random_model(hf.BertConfig(**SMALL, is_decoder=True)), where=WHERE)


def test_it_is_asked_where_no_gradients_are_kept(tiny_model: Callable[..., Any]) -> None:
    encoder = random_model(hf.BertConfig(**{**SMALL, "initializer_range": 1e-3}))
    with torch.no_grad():
        check_causal(tiny_model("llama").requires_grad_(False), where=WHERE)
        with pytest.raises(ModelError, match="whose predictions change"):
            check_causal(encoder.requires_grad_(False), where=WHERE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_this_stack_builds_is_causal_and_runs(
    kind: str, tiny_model: Callable[..., Any]
) -> None:
    changes = {"resid_pdrop": 0.5} if kind == "gpt2" else {"attention_dropout": 0.5}
    model = tiny_model(kind, **changes).train()
    check_causal(model, where=WHERE)
    for dtype in (torch.float32, torch.bfloat16):
        check_runs(model.to(dtype), where=WHERE)
    assert model.training


def test_a_precision_that_a_model_does_not_run_in(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")

    def keep_to_fp32(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        inputs[0] @ torch.eye(inputs[0].shape[-1])

    model.model.norm.register_forward_pre_hook(keep_to_fp32)
    check_runs(model, where=WHERE)
    with pytest.raises(ModelError, match="LlamaForCausalLM, which does not run in bf") as told:
        check_runs(model.bfloat16(), where=WHERE)
    assert "same dtype" in told.value.problems[0].got
    assert "deepspeed.config" in str(told.value.problems[0].hint)


def test_layers_that_ranks_would_leave_out() -> None:
    check_trainable(hf.OPTConfig(), where=WHERE)
    check_trainable(hf.LlamaConfig(), where=WHERE)
    with pytest.raises(ModelError, match=r"\(layerdrop 0\.1\), expected no layerdrop"):
        check_trainable(hf.OPTConfig(layerdrop=0.1), where="student.model")


def test_a_family_without_heads_has_no_sizes(tmp_path: Path) -> None:
    mamba().save_pretrained(tmp_path)
    spec = PretrainedModel(kind="pretrained", path=str(tmp_path))
    with pytest.raises(ModelError, match="of the family mamba, whose layers have no attention"):
        model_sizes(spec, 61, where=WHERE)


# -- what is no causal language model of text ------------------------------------------------------


def saved_bart(directory: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 61}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = hf.BartConfig(**sizes, **heads, encoder_ffn_dim=16, decoder_ffn_dim=16)
    hf.BartForConditionalGeneration(config).save_pretrained(directory)


def test_the_decoder_of_an_encoder_decoder_is_not_taken_for_it(tmp_path: Path) -> None:
    """transformers would load it without a word, its cross-attention left out."""
    saved_bart(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), hf.BartForCausalLM)
    with pytest.raises(ModelError, match=r"an encoder-decoder \(bart\)"):
        load_model(str(tmp_path), attention=None, where=WHERE)


def test_code_beside_a_family_that_transformers_knows_is_not_run(
    tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    """As on the hub beside many: transformers' own class is taken."""
    model = tiny_model("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"}
    model.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')")
    loaded = load_model(str(tmp_path), attention=None, where=WHERE)
    assert type(loaded) is hf.LlamaForCausalLM
