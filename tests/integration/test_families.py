"""Teachers of three families that others trained, in one ensemble, on two ranks.

A tokenizer is learnt once, models of other families are saved as their owners would save them, in
several types and files, and a job takes them all: two ranks, from text to a report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.tokenizer import train_tokenizer
from babyllama_ds.spec.corpus import TrainedTokenizer

pytestmark = pytest.mark.launch

VOCAB, LENGTH, STEPS = 300, 32, 4
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
# Padded vocabularies; a tied head in two files, projected states and fp16, a head that is capped.
MODELS: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "qwen": (
        lambda: hf.Qwen2Config(
            **SMALL,
            vocab_size=VOCAB + 20,
            intermediate_size=48,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
        torch.bfloat16,
    ),
    "opt": (
        lambda: hf.OPTConfig(**SMALL, vocab_size=VOCAB + 4, ffn_dim=48, word_embed_proj_dim=16),
        torch.float16,
    ),
    "gemma": (
        lambda: hf.Gemma2Config(
            **SMALL,
            vocab_size=VOCAB,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            final_logit_softcapping=5.0,
        ),
        torch.float32,
    ),
}


def save_model(name: str, directory: Path) -> None:
    make_config, dtype = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(make_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # opinions
    model.to(dtype).save_pretrained(directory, max_shard_size="20KB" if name == "qwen" else "1GB")


@pytest.fixture(scope="module")
def ran(once: Any, tiny_job: Callable[..., Path], run_ranks: Callable[..., Any]) -> Any:
    def make(scene: Any) -> list[Any]:
        teachers, training = [], {"batch_windows": 8, "epochs": 9, "max_steps": STEPS}
        for name in MODELS:
            save_model(name, scene.folder / name)
            model = {"kind": "pretrained", "path": str(scene.folder / name)}
            teachers.append({"name": name, "model": model})
        shape = {"kind": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 4}
        job = tiny_job(
            scene.folder,
            tokenizer={"kind": "pretrained", "path": str(scene.folder / "qwen")},
            teachers=teachers,
            student={
                "model": {**shape, "intermediate_size": 48, "max_positions": LENGTH},
                "training": {**training, "learning_rate": 5e-3, "log_every_steps": 1},
            },
            control=None,
        )
        lines = (scene.folder / "town.train").read_text().splitlines(keepends=True)
        for name in MODELS:
            spec = TrainedTokenizer(kind="bpe", vocab_size=VOCAB)
            train_tokenizer(spec, iter(lines), scene.folder / name)
        return [run_ranks(job, "--runs", scene.runs)]

    scene = once("families", make)
    scene.ended[0].assert_done()
    return scene


def test_it_ends_with_a_report_of_all(ran: Any) -> None:
    report = json.loads((ran.run_dir / "report" / "report.json").read_text())
    assert list(report["models"]) == [*MODELS, "student"]
    lines = [json.loads(line) for line in (ran.run_dir / "metrics.jsonl").open()]
    kls = [line["kl"] for line in lines if "kl" in line]
    assert len(kls) >= STEPS
    assert all(0 < kl < 1e4 for kl in kls)
    assert len(list((ran.folder / "qwen").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_teacher_is_measured_as_transformers_measures_it(name: str, ran: Any) -> None:
    """The model as it was saved, in fp32, on the development text: but for bf16, the same."""
    found = json.loads((ran.run_dir / "evaluation" / f"{name}.json").read_text())["dev"]
    stream = TokenShards.open(Path(os.path.realpath(ran.run_dir / "tokens")))
    number = stream.num_tokens("dev") // LENGTH
    tokens_BS = torch.from_numpy(stream.read("dev", 0, number * LENGTH)).view(number, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(
        ran.folder / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits_BTV = model(input_ids=tokens_BS).logits[:, :-1, :VOCAB]
    expected = cross_entropy(logits_BTV.flatten(0, 1), tokens_BS[:, 1:].flatten())
    assert found["ce"] == pytest.approx(expected.item(), rel=5e-3)
