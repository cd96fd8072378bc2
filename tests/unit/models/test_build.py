"""Models have the published sizes, start from their seed alone, and load whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from babyllama_ds.errors import HubError, ModelError
from babyllama_ds.models.build import (
    build_model,
    check_positions,
    check_vocabulary_fits,
    count_parameters,
    load_model,
    model_config,
)
from babyllama_ds.models.fused import PLAIN_ATTENTION
from babyllama_ds.spec.models import Gpt2Model, LlamaModel, PretrainedModel

MakeTokenizer = Callable[[int], Any]


def llama(**changes: Any) -> LlamaModel:
    values = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "intermediate_size": 40}
    return LlamaModel(kind="llama", **{**values, **changes})


def gpt2(**changes: Any) -> Gpt2Model:
    return Gpt2Model(kind="gpt2", **{"hidden_size": 24, "num_layers": 2, "num_heads": 3, **changes})


def build(spec: Any, tokenizer: Any, *, seed: int = 1, attention: str = "sdpa") -> nn.Module:
    return build_model(spec, tokenizer, seed=seed, attention=attention, where="student.model")


# -- the published shapes --------------------------------------------------------------------------

PUBLISHED = {
    # BabyLlama (arXiv 2308.02019): two teachers and the student.
    "GPT-2 705M": (
        gpt2(hidden_size=1536, num_layers=24, num_heads=16, max_positions=256),
        704_928_768,
    ),
    "GPT-2 705M, 128 positions": (
        gpt2(hidden_size=1536, num_layers=24, num_heads=16, max_positions=128),
        704_732_160,
    ),
    "LLaMA 360M": (
        llama(hidden_size=1024, num_layers=24, num_heads=8, intermediate_size=3072),
        359_973_888,
    ),
    "BabyLlama 58M": (
        llama(hidden_size=512, num_layers=16, num_heads=8, intermediate_size=1024),
        58_343_936,
    ),
    # BabyLlama-2 (arXiv 2409.17312): teachers and student, with grouped-query heads.
    "SmolLlama 345M": (
        llama(hidden_size=960, num_layers=32, num_heads=15, num_kv_heads=5, intermediate_size=2560),
        345_355_200,
    ),
    # Models of BabyLlama's repository.
    "LLaMA 97M": (
        llama(
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            intermediate_size=2048,
            tied_embeddings=True,
        ),
        97_241_856,
    ),
    "GPT-2 97M": (gpt2(hidden_size=768, num_layers=12, num_heads=12), 97_540_608),
    "LLaMA 16M": (
        llama(hidden_size=256, num_layers=8, num_heads=8, intermediate_size=1024),
        16_584_960,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_sizes(
    name: str, word_tokenizer: MakeTokenizer
) -> None:
    spec, expected = PUBLISHED[name]
    with torch.device("meta"):
        model = build(spec, word_tokenizer(16_000))
    assert count_parameters(model) == expected


def test_a_spec_becomes_the_configuration(word_tokenizer: MakeTokenizer) -> None:
    """The published values are the defaults; what differs from them is handed on."""
    tokenizer = word_tokenizer(61)
    config = model_config(llama(num_kv_heads=2), tokenizer)
    expected = {
        "vocab_size": 61,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rope_parameters["rope_theta"] == 10_000.0
    changed = model_config(llama(rope_theta=5e5, max_positions=99, norm_epsilon=1e-5), tokenizer)
    assert changed.rope_parameters["rope_theta"] == 5e5
    assert (changed.max_position_embeddings, changed.rms_norm_eps) == (99, 1e-5)

    config = model_config(gpt2(intermediate_size=50, dropout=0.25), tokenizer)
    expected = {
        "vocab_size": 61,
        "n_positions": 256,
        "n_inner": 50,
        "resid_pdrop": 0.25,
        "embd_pdrop": 0.25,
        "attn_pdrop": 0.25,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert model_config(gpt2(), tokenizer).resid_pdrop == 0.1


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "unk_token"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_token_of_the_text_is_learnt_though_the_tokenizer_pads_with_it(
    make: Callable[..., Any], role: str, word_tokenizer: MakeTokenizer
) -> None:
    """LLaMA's embedding of its padding is zeros, without a gradient."""
    tokenizer = word_tokenizer(61)
    expected = build(make(), tokenizer)
    setattr(tokenizer, role, "w9")
    tokenizer.pad_token = "w9"
    model = build(make(), tokenizer)
    # Drawn as ever: of the others all are the same, and this is as any of them.
    drawn, as_ever = (one.get_input_embeddings().weight for one in (model, expected))
    assert torch.equal(drawn[1:], as_ever[1:])
    assert 0.01 < drawn[9].std() < 0.04
    model(input_ids=torch.tensor([[7, 9, 8, 7]])).logits[0, 1:, :5].logsumexp(-1).sum().backward()
    learnt = model.get_input_embeddings().weight.grad.abs().sum(1)
    assert learnt[9] > 0.1 * learnt[8] > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_tied_embeddings_are_one_tensor(
    make: Callable[..., Any], tied: bool, word_tokenizer: MakeTokenizer
) -> None:
    model = build(make(tied_embeddings=tied), word_tokenizer(61))
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used(attention: str, word_tokenizer: MakeTokenizer) -> None:
    model = build(llama(), word_tokenizer(61), attention=attention)
    used = {"eager": PLAIN_ATTENTION, "sdpa": "sdpa"}[attention]
    assert model.config._attn_implementation == used


# -- the seed --------------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_seed_alone_decides_the_weights(
    make: Callable[..., Any], word_tokenizer: MakeTokenizer
) -> None:
    tokenizer = word_tokenizer(61)
    torch.manual_seed(1)
    first = weights(build(make(), tokenizer))
    torch.manual_seed(2)
    torch.rand(3)
    state = torch.get_rng_state()
    second = weights(build(make(), tokenizer))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved on"
    other = weights(build(make(), tokenizer, seed=2))
    assert list(first) == list(second) == list(other)
    for key, weight in first.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, second[key]), key
        drawn = weight.dim() > 1
        assert torch.equal(weight, other[key]) != drawn, key


def test_weights_are_drawn_at_the_scale_asked_for(word_tokenizer: MakeTokenizer) -> None:
    model = build(llama(initializer_range=0.3, hidden_size=64), word_tokenizer(500))
    assert model.get_output_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_a_63_bit_seed_is_accepted(word_tokenizer: MakeTokenizer) -> None:
    build(llama(), word_tokenizer(61), seed=2**63 - 1)


# -- loading ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    directory = tmp_path / "saved"
    tiny_model("llama").save_pretrained(directory)
    return directory


def load(path: Path | str, **options: Any) -> nn.Module:
    return load_model(str(path), attention="sdpa", where="teachers.a.model", **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loads_what_was_saved(kind: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert weights(loaded).keys() == weights(model).keys()
    for key, weight in weights(model).items():
        assert torch.equal(weights(loaded)[key], weight), key
    assert next(load(tmp_path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert loaded.config.vocab_size == 61


def test_build_loads_a_pretrained_model(saved: Path, word_tokenizer: MakeTokenizer) -> None:
    spec = PretrainedModel(kind="pretrained", path=str(saved))
    one, two = (weights(build(spec, word_tokenizer(61), seed=seed)) for seed in (1, 2))
    for key in one:
        assert torch.equal(one[key], two[key]), key
    build(spec, word_tokenizer(60))  # a row of padding
    with pytest.raises(ModelError, match="got an embedding of 61 rows, expected at least 62"):
        build(spec, word_tokenizer(62))


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def overwritten(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"no tensors here, only text" * 9)


def cloned_without_git_lfs(directory: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 91\n"
    (directory / "model.safetensors").write_text(pointer)


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def only_pickled(directory: Path) -> None:
    path = directory / "model.safetensors"
    torch.save(load_file(path), directory / "pytorch_model.bin")
    path.unlink()


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def garbled_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def unknown_family(directory: Path) -> None:
    change_config(directory, model_type="nonesuch")


def another_task(directory: Path) -> None:
    change_config(directory, model_type="t5")


def no_language_model(directory: Path) -> None:
    change_config(directory, model_type="vit")


def of_wrong_values(directory: Path) -> None:
    change_config(directory, num_attention_heads=5)


def padded_by_no_token(directory: Path) -> None:
    change_config(directory, pad_token_id=999)


def quantised(directory: Path) -> None:
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})


def of_more_than_text(directory: Path) -> None:
    change_config(directory, model_type="gemma3")


def own_code(directory: Path) -> None:
    change_config(directory, model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"})
    (directory / "own.py").write_text("raise SystemExit('remote code ran')")


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_missing(directory: Path) -> None:
    change_tensors(directory, {"lm_head.weight": None})


def one_of_another_shape(directory: Path) -> None:
    change_tensors(directory, {"lm_head.weight": torch.zeros(60, 24)})


def change_tensors(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **changes}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


DAMAGES: dict[Callable[[Path], None], str] = {
    cut_short: "model.safetensors: .*incomplete metadata.*, expected whole weights",
    overwritten: "model.safetensors: .*header",
    cloned_without_git_lfs: "model.safetensors: a pointer of git-lfs, .* expected whole weights",
    without_weights: "no weights, expected weights as safetensors",
    only_pickled: r"pickled weights only \(pytorch_model.bin\), expected weights as safetensors",
    without_config: "a directory without config.json, expected a causal language model",
    garbled_config: "not a valid JSON",
    unknown_family: "nonesuch",
    another_task: r"an encoder-decoder \(t5\), expected a causal language model",
    no_language_model: "vit, of which transformers has no causal language model",
    of_wrong_values: r": The hidden size \(24\) is not a multiple of .*, expected a causal",
    padded_by_no_token: r": Padding_idx must be within num_embeddings, expected a causal language",
    own_code: r"a family \(own\) that is defined by code of its own, .* no code of a model's",
    quantised: r"quantised weights \(gptq\), expected weights in fp32, bf16 or fp16",
    of_more_than_text: r"a model of more than text \(gemma3, with text_config, vision_config\)",
    one_missing: r"1 weights are missing or of another shape \(lm_head.weight\)",
    one_of_another_shape: r"1 weights are missing or of another shape \(lm_head.weight\)",
}


HINTS = {
    cut_short: "copy or download it again",
    overwritten: "copy or download it again",
    cloned_without_git_lfs: "`git lfs pull`",
    without_weights: "`save_pretrained` it",
    only_pickled: "`save_pretrained` it",
    own_code: "save it again as that",
    quantised: "`model.dequantize()`",
    of_more_than_text: "save its language model by itself",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_cannot_be_loaded_whole_is_refused(
    damage: Callable[[Path], None], saved: Path
) -> None:
    damage(saved)
    with pytest.raises(ModelError, match=DAMAGES[damage]) as caught:
        load(saved)
    (problem,) = caught.value.problems
    assert problem.where == "teachers.a.model"
    assert str(saved) in problem.got
    assert "\n" not in problem.got
    if damage in HINTS:
        assert HINTS[damage] in str(problem.hint)
    else:
        assert problem.hint is None


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_another_program_need_not_be_whole(sharded: bool, saved: Path) -> None:
    """As where `git lfs pull --include` brought those that transformers reads."""
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    (saved / "consolidated.safetensors").write_text(pointer)
    weights = saved / "model.safetensors"
    if sharded:
        names = dict.fromkeys(load_file(weights), "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": names}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        weights = weights.rename(saved / "model-00001-of-00001.safetensors")
    load(saved)
    weights.write_text(pointer)
    with pytest.raises(ModelError, match=f"{weights.name}: a pointer of git-lfs"):
        load(saved)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HubError) as caught:
        load(tmp_path / "nowhere")
    assert caught.value.problems[0].got == f"{tmp_path / 'nowhere'}: no such file or directory"


def test_the_file_of_weights_is_no_model(saved: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model.safetensors, a file, expected .* directory"
    ) as caught:
        load(saved / "model.safetensors")
    assert caught.value.problems[0].hint == f"give the directory that it lies in: {saved}"


def test_a_kernel_that_is_not_installed_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="no-such-kernel"):
        load_model(str(saved), attention="no-such-kernel", where="student.model")


# -- what must fit ---------------------------------------------------------------------------------


def test_every_token_has_a_row(tiny_model: Callable[..., Any]) -> None:
    for vocab_size in (61, 50):
        check_vocabulary_fits(tiny_model("gpt2"), vocab_size, where="student.model")
    with pytest.raises(ModelError, match=r"student\.model: got an embedding of 61 rows"):
        check_vocabulary_fits(tiny_model("gpt2"), 62, where="student.model")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_windows_fit_the_positions(kind: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(kind)
    check_positions(model, 128, where="student.model")
    with pytest.raises(ModelError, match="got 128 positions, expected at least 129"):
        check_positions(model, 129, where="student.model")


# -- dropout ---------------------------------------------------------------------------------------


def test_attention_dropout_of_a_llama(word_tokenizer: MakeTokenizer) -> None:
    spec, dropped = llama(), llama(attention_dropout=0.4)
    assert build(spec, word_tokenizer(61)).config.attention_dropout == 0.0
    model = build(dropped, word_tokenizer(61))
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.4}
    assert differs_in_training(model)
    assert not differs_in_training(build(spec, word_tokenizer(61)))


def differs_in_training(model: nn.Module) -> bool:
    """Whether two passes of a training differ, where those of an evaluation must not."""
    ids_BS = torch.arange(20)[None]
    first, second = (model.eval()(input_ids=ids_BS).logits for _ in range(2))
    assert torch.equal(first, second)
    first, second = (model.train()(input_ids=ids_BS).logits for _ in range(2))
    return not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0.3, 0.3, 0.1)),  # as saved
        ({"dropout": 0.0}, (0.0, 0.0, 0.1)),
        ({"attention_dropout": 0.0}, (0.3, 0.3, 0.0)),
        ({"dropout": 0.2, "attention_dropout": 0.4}, (0.2, 0.2, 0.4)),
    ],
)
def test_dropout_of_a_loaded_gpt2(
    changes: dict[str, float],
    expected: tuple[float, ...],
    tmp_path: Path,
    tiny_model: Callable[..., Any],
    word_tokenizer: MakeTokenizer,
) -> None:
    saved = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.1)
    saved.save_pretrained(tmp_path)
    spec = PretrainedModel(kind="pretrained", path=str(tmp_path), **changes)  # type: ignore[arg-type]
    model = build(spec, word_tokenizer(61))
    block = model.transformer.h[1]
    assert (block.mlp.dropout.p, model.transformer.drop.p, block.attn.attn_dropout.p) == expected
    assert block.attn.resid_dropout.p == expected[0]
    config = model.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == expected
    for key, weight in weights(saved).items():
        assert torch.equal(weights(model)[key], weight), key
    assert differs_in_training(model) == any(expected)


def test_a_dropout_that_the_family_does_not_have_is_refused(
    saved: Path, word_tokenizer: MakeTokenizer
) -> None:
    llama = PretrainedModel(kind="pretrained", path=str(saved), attention_dropout=0.2)
    assert differs_in_training(build(llama, word_tokenizer(61)))
    spec = llama.model_copy(update={"dropout": 0.2})
    with pytest.raises(ModelError, match=r"0\.2 for a model of the family llama, which has none"):
        build(spec, word_tokenizer(61))
