"""Minimal pairs against lm-eval, EleutherAI's harness, pair by pair on the same files.

lm-eval's `multiple_choice` on two whole sentences with an empty context is how its own BLiMP tasks
are written. It puts a space before each choice (`target_delimiter`) and, since a context is empty,
the tokenizer's BOS: our `leading_space: true` and `prefix: bos`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from babyllama_ds.corpus.nursery.write import write_nursery
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.evaluation.minimal_pairs import evaluate_minimal_pairs
from babyllama_ds.evaluation.pair_files import Task, load_tasks
from babyllama_ds.evaluation.sentences import score_sentences, sentence_encoder
from babyllama_ds.spec.corpus import TrainedTokenizer

lm_eval = pytest.importorskip("lm_eval")

VOCAB = 400
TASK = """
output_type: multiple_choice
dataset_path: json
test_split: test
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Files are all there: nothing is asked of a hub, no cache of this machine is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and minimal pairs in BLiMP's format: those of the nursery, and dialogues."""
    folder = tmp_path_factory.mktemp("nursery")
    write_nursery(folder, words=2_000, dev_words=400, pairs_per_task=12, seed=1)
    with (folder / "pairs" / "dialogue.jsonl").open("w") as stream:
        for name in ("Dan", "Meg", "Ann"):
            good = f"{name}: Should you go?\nTom: No, I shouldn't."
            pair = {"sentence_good": good, "sentence_bad": good.replace("you", "one")}
            stream.write(json.dumps(pair) + "\n")
    swapped = {"sentence_good": "the dog sees the ball", "sentence_bad": "the ball sees the dog"}
    (folder / "pairs" / "swapped.jsonl").write_text(json.dumps(swapped) + "\n")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adds BOS and EOS"])
def tokenizer(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("tokenizer")
    (text,) = (folder / "train").glob("*.train")
    spec = TrainedTokenizer(kind="bpe", vocab_size=VOCAB)
    train_tokenizer(spec, iter(text.read_text().splitlines()), directory)
    tokenizer = load_tokenizer(str(directory))
    if request.param:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer


def make_model(kind: str) -> Any:
    """Random weights, so that sentences differ."""
    torch.manual_seed(4)
    if kind == "gpt2":
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 256}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.2, **sizes)).eval()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def path_of(task: Task) -> str:
    return task.items[0].source.rpartition(":")[0]


def theirs(model: Any, tokenizer: Any, tasks: list[Task]) -> dict[str, Any]:
    """lm-eval's results and samples by task."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    configs = [
        {
            **yaml.safe_load(TASK),
            "task": task.name,
            "dataset_kwargs": {"data_files": {"test": path_of(task)}},
        }
        for task in tasks
    ]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu")
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=harness,
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),  # its own are thousands of files
        log_samples=True,
        bootstrap_iters=0,
    )
    return found


def assert_agreement(model: Any, tokenizer: Any, tasks: list[Task]) -> None:
    """To the pair: which sentence is likelier, and both log-likelihoods."""
    found = theirs(model, tokenizer, tasks)
    options: dict[str, Any] = {"device": "cpu", "batch_tokens": 512, "vocab_size": VOCAB}
    encode = sentence_encoder(tokenizer, leading_space=True, prefix="bos")
    measured = evaluate_minimal_pairs(
        model, tokenizer, tasks, leading_space=True, prefix="bos", **options
    )
    for task, ours in zip(tasks, measured.tasks, strict=True):
        samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
        goods, bads = zip(*(item.candidates for item in task.items), strict=True)
        assert [s["doc"]["sentence_good"] for s in samples] == [one.sentence for one in goods]
        good = score_sentences(model, encode([one.sentence for one in goods]), **options)
        bad = score_sentences(model, encode([one.sentence for one in bads]), **options)
        right = []
        for sample, own_good, own_bad in zip(samples, good, bad, strict=True):
            (their_good, _), (their_bad, _) = sample["filtered_resps"]
            assert own_good == pytest.approx(their_good, rel=1e-5, abs=1e-4)
            assert own_bad == pytest.approx(their_bad, rel=1e-5, abs=1e-4)
            assert (own_good > own_bad) == (sample["acc"] == 1)
            right.append(own_good > own_bad)
        assert ours.correct == sum(right)
        assert ours.ties == 0
        assert ours.accuracy == pytest.approx(found["results"][task.name]["acc,none"], rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_pair_is_judged_alike(kind: str, folder: Path, tokenizer: Any) -> None:
    tasks = load_tasks(folder / "pairs", max_pairs=None)
    chosen = [task for task in tasks if task.name == "dialogue"] + tasks[:3]
    assert_agreement(make_model(kind), tokenizer, chosen)


def test_a_tie_is_right_there_and_wrong_here(folder: Path, tokenizer: Any) -> None:
    """A model that gives every token the same probability earns everything there."""
    model = make_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    tasks = [t for t in load_tasks(folder / "pairs", max_pairs=None) if t.name == "swapped"]
    assert theirs(model, tokenizer, tasks)["results"]["swapped"]["acc,none"] == 1
    ours = evaluate_minimal_pairs(
        model,
        tokenizer,
        tasks,
        leading_space=True,
        prefix="bos",
        device="cpu",
        batch_tokens=512,
        vocab_size=VOCAB,
    )
    assert (ours.accuracy, ours.tasks[0].ties) == (0, 1)


@pytest.mark.data
@pytest.mark.skipif("BABYLM_DATA" not in os.environ, reason="BABYLM_DATA is not set")
def test_blimp_and_its_supplement(tokenizer: Any) -> None:
    data = Path(os.environ["BABYLM_DATA"]) / "eval"
    names = {
        "blimp_filtered": ("adjunct_island", "wh_island"),
        "supplement_filtered": ("turn_tak",),
    }
    model = make_model("llama")
    for benchmark, stems in names.items():
        tasks = load_tasks(data / benchmark, max_pairs=None)
        chosen = [task for task in tasks if task.name.startswith(stems)]
        assert len(chosen) == len(stems)
        assert_agreement(model, tokenizer, chosen)
