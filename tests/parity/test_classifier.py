"""Classifiers and how they learn, against transformers' own: its models' logits, its Trainer."""

from __future__ import annotations

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ElectraConfig,
    ElectraForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from babyllama_ds.evaluation.classifier import Classifier, Encoded, Update

VOCAB, LABELS, PAD = 50, 3, 0
UNSEEN = VOCAB - 1
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=6, num_key_value_heads=2),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=12, init_std=0.3, dropout=0.0,
    ),
}  # fmt: skip


def examples(number: int, seed: int) -> Encoded:
    """Of 1 to 20 tokens, none of which is the padding or the last of the vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [1, 20, *torch.randint(1, 21, (number - 2,), generator=draw).tolist()]
    return Encoded(
        token_ids=[torch.randint(1, UNSEEN, (n,), generator=draw).tolist() for n in lengths],
        labels=torch.randint(0, LABELS, (number,), generator=draw).tolist(),
    )


def both(name: str, folder: Path) -> tuple[Classifier, nn.Module]:
    """Ours and transformers' own, of the same weights."""
    config = CONFIGS[name]()
    config.pad_token_id = PAD
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ours = Classifier(AutoModelForCausalLM.from_pretrained(folder), LABELS)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=LABELS, pad_token_id=PAD
    )
    theirs.score.load_state_dict(ours.head.state_dict())
    return ours, theirs


def batch(chosen: Encoded) -> dict[str, torch.Tensor]:
    """As transformers wants it: padded, with a mask."""
    longest = max(map(len, chosen.token_ids))
    ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in chosen.token_ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in chosen.token_ids])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(chosen.labels)}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_classifiers(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    some = examples(9, seed=3)
    with torch.no_grad():
        expected = theirs.eval()(**batch(some)).logits
        torch.testing.assert_close(ours.eval()(some.token_ids), expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_narrower_than_the_states() -> None:
    """ELECTRA's decoder brings its states to the embeddings' width before it looks words up: the
    classifier is put on the states themselves."""
    torch.manual_seed(1)
    model = ElectraForCausalLM(
        ElectraConfig(
            vocab_size=VOCAB, embedding_size=12, hidden_size=24, intermediate_size=40,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
            is_decoder=True, initializer_range=0.3, pad_token_id=PAD,
        )
    )  # fmt: skip
    backbone = copy.deepcopy(model.electra).eval()
    ours, some = Classifier(model, LABELS).eval(), examples(9, seed=3)
    with torch.no_grad():
        last_BD = [backbone(torch.tensor([ids])).last_hidden_state[0, -1] for ids in some.token_ids]
        expected_BL = torch.stack(last_BD) @ ours.head.weight.T
        torch.testing.assert_close(ours(some.token_ids), expected_BL, rtol=1e-5, atol=1e-5)


def test_predictions_are_in_the_order_of_the_examples(tmp_path: Path) -> None:
    ours, theirs = both("llama", tmp_path)
    some = examples(40, seed=4)
    with torch.no_grad():
        expected = theirs.eval()(**batch(some)).logits.argmax(1)
    predictions: list[str] = []

    def predict() -> Generator[None]:
        predictions.append((yield from ours.predict(some, batch_tokens=33)))

    assert len(list(predict())) > 1  # batches
    assert predictions == ["".join(map(str, expected.tolist()))]
    assert len(set(expected.tolist())) > 1


class InOrder(Trainer):
    """Takes the examples as they come, which the test has shuffled."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2", "opt"])
@pytest.mark.parametrize("batch_tokens", [8192, 30])
def test_learning_is_that_of_the_trainer(name: str, batch_tokens: int, tmp_path: Path) -> None:
    """The weights after three epochs, of which the last batch is not full; 30 tokens make each
    batch several passes."""
    ours, theirs = both(name, tmp_path)
    start = copy.deepcopy(ours.head.weight)
    unseen_D = ours.model.get_input_embeddings().weight[UNSEEN].clone()
    some = examples(22, seed=5)
    epochs, size, rate = 3, 8, 1e-2
    steps = epochs * -(-len(some.labels) // size)
    update = Update(ours.train(), rate, steps)
    for _ in range(epochs):
        for first in range(0, len(some.labels), size):
            update(some, range(first, min(first + size, len(some.labels))), batch_tokens)

    whole = batch(some)
    rows = [{key: value[row] for key, value in whole.items()} for row in range(22)]
    InOrder(
        model=theirs,
        train_dataset=rows,
        args=TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=size,
            num_train_epochs=epochs,
            learning_rate=rate,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            optim="adamw_torch",
            disable_tqdm=True,
        ),
    ).train()
    assert (ours.head.weight - start).abs().max() > 0.01
    # So small a decay would be lost in the tolerances below.
    assert torch.equal(ours.model.get_input_embeddings().weight[UNSEEN], unseen_D)
    torch.testing.assert_close(ours.head.weight, theirs.score.weight, rtol=1e-3, atol=1e-4)
    expected = dict(theirs.base_model.named_parameters())
    for key, parameter in ours.model.base_model.named_parameters():
        if "bias" in key and ("k_proj" in key or "c_attn" in key):
            continue  # keys' biases change nothing: AdamW makes steps of their gradient's rounding
        torch.testing.assert_close(parameter, expected[key], rtol=1e-3, atol=2e-4)
