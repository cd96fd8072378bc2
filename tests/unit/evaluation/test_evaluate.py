from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from babyllama_ds.errors import ModelError
from babyllama_ds.evaluation.cross_entropy import Domains
from babyllama_ds.evaluation.evaluate import DevWindows, evaluate_model
from babyllama_ds.evaluation.pair_files import Candidate, Item, Task
from babyllama_ds.models.fused import PLAIN_ATTENTION, fuse

WORDS = ["<pad>", "the", "cat", "dog", "sees", "see", "dogs"]
WINDOWS = np.random.default_rng(1).integers(1, len(WORDS), size=(5, 6))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=8,  # a padding row above the 7 tokens
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


DOMAIN_OF = np.repeat([0, 1], [9, 21]).reshape(5, 6)  # the border lies within window 1
DEV = DevWindows(
    windows_of=lambda indices: WINDOWS[list(indices)],
    num_windows=5,
    batch_windows=2,
    byte_lengths=np.array([0, 4, 4, 4, 5, 4, 5, 0]),
    domains=Domains(names=("a", "b"), numbers_of=lambda indices: DOMAIN_OF[list(indices)]),
)
TASKS = [
    Task(
        name="agreement",
        items=tuple(
            Item(tuple(map(Candidate, sentences)), f"agreement.jsonl:{line}")
            for line, sentences in (
                (1, ("the dog sees the cat", "the dog see the cat")),
                (2, ("the dogs see the cat", "the dogs sees the cat")),
            )
        ),
        term="subject_verb",
    )
]


def evaluate(model, tokenizer, **changes):
    options = {"dev": DEV, "benchmarks": {"tiny": TASKS}, "name": "student", **changes}
    return evaluate_model(
        model, tokenizer, leading_space=True, batch_tokens=64, device="cpu", **options
    )


def test_the_object_that_is_written(model, tokenizer) -> None:
    result = evaluate(model, tokenizer)
    assert json.loads(json.dumps(result)) == result
    assert list(result) == [
        *("model", "params", "dtype", "device", "attention", "dev", "minimal_pairs"),
    ]
    assert (result["device"], result["attention"]) == ("cpu", "sdpa")
    assert result["model"] == "student"
    assert result["params"] == sum(p.numel() for p in model.parameters())
    dev = result["dev"]
    assert (dev["tokens"], dev["windows"]) == (25, 5)
    assert dev["perplexity"] == pytest.approx(math.exp(dev["ce"]))
    num_bytes = sum(int(DEV.byte_lengths[token]) for token in WINDOWS[:, 1:].ravel())
    assert dev["bits_per_byte"] == pytest.approx(25 * dev["ce"] / math.log(2) / num_bytes)
    assert {name: part["tokens"] for name, part in dev["domains"].items()} == {"a": 7, "b": 18}
    assert dev["domains"]["a"].keys() == {"ce", "perplexity", "bits_per_byte", "tokens"}
    mean = sum(part["ce"] * part["tokens"] for part in dev["domains"].values()) / dev["tokens"]
    assert mean == pytest.approx(dev["ce"], rel=1e-14)
    tiny = result["minimal_pairs"]["tiny"]
    assert tiny["terms"] == {"subject_verb": {"accuracy": tiny["accuracy"], "tasks": 1, "pairs": 2}}
    assert (tiny["prefix"], tiny["leading_space"]) == (None, True)
    assert tiny["accuracy"] == tiny["pooled_accuracy"] == tiny["tasks"]["agreement"]["accuracy"]
    assert tiny["accuracy"] in (0.0, 0.5, 1.0)
    agreement = dict(tiny["tasks"]["agreement"])
    outcomes = agreement.pop("outcomes")
    assert (len(outcomes), outcomes.count("1") / 2) == (2, tiny["accuracy"])
    assert agreement | {"accuracy": None} == {
        "accuracy": None,
        "pairs": 2,
        "ties": 0,
        "term": "subject_verb",
    }


@torch.no_grad()
def test_padding_rows_of_the_embedding_are_no_tokens(model, tokenizer) -> None:
    logits = model.eval()(input_ids=torch.from_numpy(WINDOWS)).logits[:, :-1, : len(WORDS)]
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, len(WORDS)), torch.from_numpy(WINDOWS)[:, 1:].reshape(-1)
    )
    result = evaluate(model, tokenizer, benchmarks={})
    assert result["dev"]["ce"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_is_run_in_the_dtype_it_was_exported_in(
    model, tokenizer, dtype, tmp_path: Path
) -> None:
    model.to(dtype).save_pretrained(tmp_path / "student")
    result = evaluate(tmp_path / "student", tokenizer)
    assert result["dtype"] == str(dtype).removeprefix("torch.")
    # Loaded, because casting in memory would round the rotary frequencies too.
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "student", dtype=dtype)
    fuse(loaded)
    assert result == evaluate(loaded, tokenizer)
    plain = evaluate(tmp_path / "student", tokenizer, attention="eager")
    assert plain["attention"] == PLAIN_ATTENTION


def test_nothing_to_measure_leaves_nothing(model, tokenizer) -> None:
    result = evaluate(model, tokenizer, dev=None, benchmarks={})
    assert result["dev"] is None
    assert result["minimal_pairs"] == {}
    no_bytes = DevWindows(windows_of=DEV.windows_of, num_windows=5, batch_windows=2)
    result = evaluate(model, tokenizer, dev=no_bytes)
    assert result["dev"]["bits_per_byte"] is None


def test_a_directory_without_a_model_is_an_error(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="evaluation of student: got"):
        evaluate(tmp_path, tokenizer)
