"""The shipped recipes against the published numbers, each worked out here a second time.

The tables are those of the published code (timinar/BabyLlama, JLTastet/BabyLlama-2): what a job
file says, and what the stack makes of it, must come to the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    get_cosine_schedule_with_warmup,
)

from babyllama_ds.corpus.nursery.write import scenes
from babyllama_ds.corpus.prepare import Corpus, open_corpus, prepare_corpus
from babyllama_ds.corpus.tokenizer import train_tokenizer
from babyllama_ds.corpus.windows import DevWindows, TrainWindows
from babyllama_ds.engine.schedule import learning_rate
from babyllama_ds.engine.training import adamw
from babyllama_ds.errors import DataError, JobError
from babyllama_ds.losses.weights import effective_token_weights
from babyllama_ds.models.build import count_parameters, model_config
from babyllama_ds.models.sizes import Vocabulary
from babyllama_ds.spec.corpus import HeldOutFiles, TailOfEachFile, TrainedTokenizer
from babyllama_ds.spec.deepspeed import accumulation_steps, micro_batch
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.store import Store
from babyllama_ds.training.batches import check_warmup, steps_per_epoch, total_steps

VOCAB, LENGTH, POSITIONS = 16_000, 128, 256
RECIPES = ("babyllama", "babyllama2")
TOKENS_2024 = 132_132 * LENGTH
"""A stream of 132,131 windows: what a reproduction of BabyLlama trained on in 2024."""


@cache
def recipe(name: str, *overrides: str) -> JobSpec:
    return load_job(find_job(name), overrides, environ={"BABYLM_DATA": "/data/babylm"})


# -- sizes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A published architecture, and its parameters counted by hand."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int | None = None
    """None: a GPT-2."""

    @property
    def decayed(self) -> int:
        """Elements of matrices and embeddings."""
        if not self.kv_heads:
            embeddings = (VOCAB + POSITIONS) * self.hidden  # the head is the embedding
            attention = self.hidden * 3 * self.hidden + self.hidden * self.hidden
            return embeddings + self.layers * (attention + 2 * self.hidden * self.inner)
        embeddings = 2 * VOCAB * self.hidden
        kv_width = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv_width
        return embeddings + self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def undecayed(self) -> int:
        """Elements of norms and biases."""
        if not self.kv_heads:
            biases = 3 * self.hidden + self.hidden + self.inner + self.hidden
            return self.layers * (biases + 2 * 2 * self.hidden) + 2 * self.hidden
        return self.layers * 2 * self.hidden + self.hidden


SMOL_LLAMA = Shape(layers=32, hidden=960, inner=2560, heads=15, kv_heads=5)
SHAPES = {
    ("babyllama", "gpt2"): Shape(layers=24, hidden=1536, inner=6144, heads=16),
    ("babyllama", "llama"): Shape(layers=24, hidden=1024, inner=3072, heads=8, kv_heads=8),
    ("babyllama", "student"): Shape(layers=16, hidden=512, inner=1024, heads=8, kv_heads=8),
    ("babyllama2", "first"): SMOL_LLAMA,
    ("babyllama2", "second"): SMOL_LLAMA,
    ("babyllama2", "student"): SMOL_LLAMA,
}
PARAMETERS = {
    ("babyllama", "gpt2"): 704_928_768,
    ("babyllama", "llama"): 359_973_888,
    ("babyllama", "student"): 58_343_936,
    ("babyllama2", "first"): 345_355_200,
    ("babyllama2", "second"): 345_355_200,
    ("babyllama2", "student"): 345_355_200,
}


def part(name: str, model: str) -> Any:
    """The student's or a teacher's part of a recipe."""
    job = recipe(name)
    return {teacher.name: teacher for teacher in job.teachers}.get(model, job.student)


def built(name: str, model: str) -> Any:
    """On the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config(part(name, model).model, Vocabulary(VOCAB))
        )


def test_the_recipes_have_the_published_models() -> None:
    for name in RECIPES:
        names = [teacher.name for teacher in recipe(name).teachers] + ["student"]
        assert {(name, model) for model in names} == {key for key in SHAPES if key[0] == name}
        assert recipe(name).control is not None


@pytest.mark.parametrize(("name", "model"), SHAPES)
def test_parameters(name: str, model: str) -> None:
    shape = SHAPES[name, model]
    assert count_parameters(built(name, model)) == PARAMETERS[name, model]
    assert shape.decayed + shape.undecayed == PARAMETERS[name, model]


def test_the_fast_recipe_has_the_published_sizes_text_and_measures() -> None:
    """`babyllama25` tunes how they are trained, and nothing else."""
    published, fast = recipe("babyllama"), recipe("babyllama25")
    assert [teacher.model for teacher in fast.teachers] == [
        teacher.model for teacher in published.teachers
    ]
    assert fast.student.model == published.student.model
    for name in ("corpus", "tokenizer"):
        assert getattr(fast, name) == getattr(published, name)
    assert fast.evaluation.model_copy(update={"batch_tokens": 8192}) == published.evaluation
    assert fast.windows.length == published.windows.length
    epochs = [[t.training.epochs for t in job.teachers if t.training] for job in (fast, published)]
    assert epochs == [[4, 4], [4, 4]]
    assert fast.student.training.epochs == published.student.training.epochs == 6


def test_the_small_teachers_are_the_published_ones() -> None:
    small, published = recipe("babyllama97"), recipe("babyllama")
    assert small.student.model == published.student.model
    assert (small.corpus, small.tokenizer) == (published.corpus, published.tokenizer)
    evaluation = small.evaluation.model_copy(update={"batch_tokens": 8192, "samples": 0})
    assert evaluation == published.evaluation
    gpt2 = Shape(layers=12, hidden=768, inner=3072, heads=12)
    llama = Shape(layers=12, hidden=768, inner=2048, heads=12, kv_heads=12)
    tied = VOCAB * llama.hidden
    assert count_parameters(built("babyllama97", "gpt2")) == gpt2.decayed + gpt2.undecayed
    assert gpt2.decayed + gpt2.undecayed == 97_540_608
    assert count_parameters(built("babyllama97", "llama")) == 97_241_856
    assert llama.decayed + llama.undecayed - tied == 97_241_856
    assert [t.training.epochs for t in small.teachers if t.training] == [4, 4]
    assert small.student.training.epochs == 6


def test_the_first_scripts_gpt2_is_an_override_away() -> None:
    """As docs/recipes.md gives it: 128 positions, and so fewer parameters."""
    words = ("training.batch_windows=256", "training.epochs=6", "training.warmup_steps=200")
    job = recipe(
        "babyllama", *(f"teachers.gpt2.{word}" for word in (*words, "model.max_positions=128"))
    )
    with torch.device("meta"):
        config = model_config(job.teachers[0].model, Vocabulary(VOCAB))
        assert count_parameters(AutoModelForCausalLM.from_config(config)) == 704_732_160


def test_the_documentation_has_these_numbers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for key, shape in SHAPES.items():
        for number in (PARAMETERS[key], shape.decayed, shape.undecayed):
            assert f"| {number:,} |" in text


@pytest.mark.parametrize(("name", "model"), SHAPES)
def test_architecture(name: str, model: str) -> None:
    shape, module = SHAPES[name, model], built(name, model)
    config = module.config
    kind = GPT2LMHeadModel if not shape.kv_heads else LlamaForCausalLM
    assert type(module) is kind
    assert config.vocab_size == VOCAB
    assert config.max_position_embeddings == POSITIONS
    assert config.num_hidden_layers == shape.layers
    assert config.num_attention_heads == shape.heads
    assert config.initializer_range == 0.02
    if kind is GPT2LMHeadModel:
        dropout = (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop)
        assert dropout == (0.1, 0.1, 0.1)
        assert config.activation_function == "gelu_pytorch_tanh"
        assert config.layer_norm_epsilon == 1e-5
        assert config.tie_word_embeddings
    else:
        assert config.num_key_value_heads == shape.kv_heads
        assert config.hidden_act == "silu"
        assert config.rms_norm_eps == 1e-6
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
        assert config.attention_dropout == 0.0
        assert not config.attention_bias
        assert not config.mlp_bias
        assert not config.tie_word_embeddings


def test_the_second_recipes_models_differ_in_their_seeds_alone() -> None:
    job = recipe("babyllama2")
    first, second = job.teachers
    assert first.model == second.model == job.student.model
    assert first.training == second.training == job.student.training
    stages = ("teachers/first", "teachers/second", "student")
    assert len({job.stage_seed(stage) for stage in stages}) == 3


# -- the optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "model"), SHAPES)
def test_decay_groups(name: str, model: str) -> None:
    module, shape = built(name, model), SHAPES[name, model]
    training = part(name, model).training
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    optimizer = adamw(module, training)
    decayed, undecayed = optimizer.param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (training.weight_decay, 0.0)
    assert sum(parameter.numel() for parameter in decayed["params"]) == shape.decayed
    assert sum(parameter.numel() for parameter in undecayed["params"]) == shape.undecayed

    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    undecayed_names = {names[id(parameter)] for parameter in undecayed["params"]}
    # The rule of the Trainer that trained the published models.
    rule = set(Trainer.get_decay_parameter_names(None, module))
    assert decayed_names == rule & set(names.values())
    assert any("embed" in key or "wte" in key for key in decayed_names)
    assert all(re.search(r"norm|ln_|bias", key) for key in undecayed_names)
    assert not any(re.search(r"norm|ln_|bias", key) for key in decayed_names)


@pytest.mark.parametrize(("name", "model"), SHAPES)
def test_optimizer_is_the_trainers(name: str, model: str) -> None:
    training = part(name, model).training
    for group in adamw(nn.Linear(2, 2), training).param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert group["lr"] == training.learning_rate
    assert training.clip_norm == 1.0


# -- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published training: peak rate, decay, batch, epochs, warm-up, windows of a micro-batch."""

    rate: float
    decay: float
    batch: int
    epochs: int
    warmup: int
    micro: int | None


BL2 = Published(7e-4, 5.0, 128, 8, 600, 16)
TRAININGS = {
    ("babyllama", "gpt2"): Published(2.5e-4, 0.0, 128, 4, 300, 8),
    ("babyllama", "llama"): Published(3e-4, 0.0, 128, 4, 300, 16),
    ("babyllama", "student"): Published(2.5e-4, 0.1, 32, 6, 200, None),
    ("babyllama2", "first"): BL2,
    ("babyllama2", "second"): BL2,
    ("babyllama2", "student"): BL2,
}


@pytest.mark.parametrize(("name", "model"), TRAININGS)
def test_hyperparameters(name: str, model: str) -> None:
    training, published = part(name, model).training, TRAININGS[name, model]
    assert training.learning_rate == published.rate
    assert training.weight_decay == published.decay
    assert training.batch_windows == published.batch
    assert training.epochs == published.epochs
    assert training.warmup_steps == published.warmup
    assert training.schedule == "cosine"
    assert training.max_steps is None
    assert training.max_tokens is None


@pytest.mark.parametrize(("name", "model"), TRAININGS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_batch_arithmetic(name: str, model: str, ranks: int) -> None:
    training, published = part(name, model).training, TRAININGS[name, model]
    micro, steps = micro_batch(training, ranks), accumulation_steps(training, ranks)
    assert micro * steps * ranks == published.batch
    assert micro == (published.micro or published.batch // ranks)


@pytest.mark.parametrize(("name", "model"), TRAININGS)
def test_evaluated_checkpointed_and_kept_as_published(name: str, model: str) -> None:
    """Once an epoch; the best by development loss; 8,192 windows, or all of the held-out tail."""
    training = part(name, model).training
    assert training.evaluate_every_steps is None
    assert training.checkpoint_every_steps is None
    assert training.keep == "best"
    assert training.evaluate_windows == (8192 if name == "babyllama" else None)


def test_the_controls_are_the_students_training() -> None:
    for name in RECIPES:
        job = recipe(name)
        assert job.control is not None
        assert job.control.training is None


@dataclass(frozen=True)
class Stream:
    """A token stream of a given length, without tokens."""

    train: int = 0
    dev: int = 0

    def num_tokens(self, split: str) -> int:
        return int(getattr(self, split))


def windows_of(name: str, tokens: int) -> TrainWindows:
    spec = recipe(name).windows
    stream: Any = Stream(train=tokens)
    return TrainWindows(stream, length=spec.length, offsets=spec.offsets, seed=1)


@pytest.mark.parametrize(
    ("name", "model", "tokens", "epoch", "total"),
    [
        # 132,131 windows: 4,129.1 and 1,032.3 batches, the short last one trained too.
        ("babyllama", "student", TOKENS_2024, 4_130, 24_780),
        ("babyllama", "gpt2", TOKENS_2024, 1_033, 4_132),
        ("babyllama", "llama", TOKENS_2024, 1_033, 4_132),
        # 16.1 million tokens: "about 980 an epoch, about 7.8 thousand in all".
        ("babyllama2", "student", 16_100_000, 983, 7_864),
    ],
)
def test_steps(name: str, model: str, tokens: int, epoch: int, total: int) -> None:
    training, windows = part(name, model).training, windows_of(name, tokens)
    assert steps_per_epoch(training, windows.num_windows) == epoch
    assert total_steps(training, windows.num_windows, windows.length) == total


@pytest.mark.parametrize(("name", "model"), TRAININGS)
def test_schedule_is_the_trainers(name: str, model: str) -> None:
    training, published = part(name, model).training, TRAININGS[name, model]
    windows = windows_of(name, TOKENS_2024)
    total = total_steps(training, windows.num_windows, windows.length)
    check_warmup(training, windows.num_windows, windows.length, where="here")

    def rate(step: int) -> float:
        return learning_rate(training, step, total)

    warmup, half = published.warmup, (published.warmup + total) / 2
    assert rate(0) == 0.0
    assert rate(warmup // 2) == pytest.approx(published.rate / 2, rel=1e-12)
    assert rate(warmup) == pytest.approx(published.rate, rel=1e-12)
    if half.is_integer():
        assert rate(int(half)) == pytest.approx(published.rate / 2, rel=1e-12)
    assert 0 < rate(total - 1) < 1e-5 * published.rate
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=published.rate)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]
    for step in [*range(0, total, 97), warmup - 1, warmup, warmup + 1, total - 1]:
        ramp = step / warmup
        wave = math.cos(math.pi * (step - warmup) / (total - warmup))
        expected = published.rate * (ramp if step < warmup else (1 + wave) / 2)
        assert rate(step) == pytest.approx(expected, rel=1e-12)
        assert rate(step) == pytest.approx(published.rate * theirs(step), rel=1e-12)


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kl"), [("babyllama", 256.0), ("babyllama2", 64.0)])
def test_weights_of_a_position(name: str, kl: float) -> None:
    job = recipe(name)
    loss = job.distillation
    weights = effective_token_weights(
        loss.alpha, loss.temperature, loss.soft_reduction, job.windows.length
    )
    assert (weights.ce, weights.kl) == (0.5, kl)
    assert loss.mean_of == "logits"
    assert {teacher.weight for teacher in job.teachers} == {1.0}


# -- text, tokenizer, windows ---------------------------------------------------------------------

WORDS = 6_000
SPECIAL_LINE = "<s> is no token here, nor is </s>, nor <pad>, but <s> stays.\n"


def published_tokenizer(vocab_size: int, lines: list[str]) -> Any:
    """The published one, but that all 256 bytes are in it (docs/recipes.md)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.normalizer = normalizers.NFKC()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return [f"{scene}\n" for scene in scenes("recipes", WORDS, training=True)]


@pytest.mark.parametrize("name", RECIPES)
def test_tokenizer_is_the_published_one(name: str, lines: list[str], tmp_path: Path) -> None:
    spec = recipe(name).tokenizer
    assert isinstance(spec, TrainedTokenizer)
    small = spec.model_copy(update={"vocab_size": 700})
    train_tokenizer(small, iter(lines), tmp_path)
    ours = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours == json.loads(published_tokenizer(700, lines).to_str())

    assert ours["normalizer"] == {"type": "NFKC"}
    assert ours["pre_tokenizer"]["type"] == ours["decoder"]["type"] == "ByteLevel"
    assert ours["pre_tokenizer"]["add_prefix_space"] is True
    assert ours["post_processor"]["type"] == "ByteLevel"
    assert ours["post_processor"]["trim_offsets"] is True
    special = {token["content"]: token["id"] for token in ours["added_tokens"]}
    assert special == {"<pad>": 0, "<s>": 1, "</s>": 2}


@pytest.mark.parametrize("name", RECIPES)
def test_sixteen_thousand_tokens_are_asked_for(name: str, lines: list[str], tmp_path: Path) -> None:
    """Of merges that occur twice: so small a text has fewer, and that is said."""
    spec = recipe(name).tokenizer
    assert isinstance(spec, TrainedTokenizer)
    supported = published_tokenizer(VOCAB, lines).get_vocab_size()
    assert supported < VOCAB
    with pytest.raises(DataError) as caught:
        train_tokenizer(spec, iter(lines), tmp_path)
    (problem,) = caught.value.problems
    assert problem.got == f"text that supports {supported} tokens at min_frequency 2"
    assert problem.expected == "vocab_size (16000)"


def babylm_folder(folder: Path, lines: list[str]) -> Path:
    """A small BABYLM_DATA: two domains, with blanks and credits for the cleaning to take."""
    third = len(lines) // 3
    texts = {
        "train/childes.train": [SPECIAL_LINE, *(f"*MOT:\t{line}" for line in lines[:third])],
        "train/open_subtitles.train": [*lines[third : 2 * third], "Subtitles by nobody\n"],
        "dev/childes.dev": [f"*MOT:\t{line}" for line in lines[2 * third :]],
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(text), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(
    lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[JobSpec, Corpus, Path]]:
    """Both recipes' corpora, made of a small text with a small vocabulary."""
    folder = babylm_folder(tmp_path_factory.mktemp("babylm"), lines)
    made = {}
    for name in RECIPES:
        job = load_job(
            find_job(name), ["tokenizer.vocab_size=400"], environ={"BABYLM_DATA": str(folder)}
        )
        store = Store(tmp_path_factory.mktemp("store"))
        made[name] = job, open_corpus(prepare_corpus(job, store, lambda: None)), folder
    return made


def cut(path: Path) -> tuple[str, str]:
    """BabyLlama-2's (train_9.5M, select_0.5M) of a file, cleaned by hand."""
    text = path.read_text(encoding="utf-8").replace("\t", " ")
    kept = [line for line in text.splitlines() if "Subtitles" not in line]
    first = round(0.95 * len(kept))
    return "".join(f"{line}\n" for line in kept[:first]), "".join(
        f"{line}\n" for line in kept[first:]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_stream_is_the_cleaned_text_and_nothing_else(
    name: str, prepared: dict[str, Any]
) -> None:
    """No special token, not even where the text reads like one; the tail of each file held out."""
    job, corpus, folder = prepared[name]
    train = [cut(path) for path in sorted((folder / "train").glob("*.train"))]
    if name == "babyllama":
        dev = [cut(path) for path in sorted((folder / "dev").glob("*.dev"))]
        texts = {
            "train": ["".join(parts) for parts in train],
            "dev": ["".join(parts) for parts in dev],
        }
    else:
        texts = {"train": [first for first, _ in train], "dev": [tail for _, tail in train]}
    for split, files in texts.items():
        ids = corpus.shards.read(split, 0, corpus.shards.num_tokens(split))
        assert ids.min() > 2
        assert ids.max() < job.tokenizer.vocab_size
        decoded = corpus.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        # A space comes before each file's first word, and nothing between files.
        assert decoded == "".join(f" {text}" for text in files)
    assert SPECIAL_LINE in texts["train"][0]


@pytest.mark.parametrize("name", RECIPES)
def test_windows_are_counted_as_published(name: str, prepared: dict[str, Any]) -> None:
    job, corpus, _ = prepared[name]
    spec = job.windows
    train = TrainWindows(corpus.shards, length=spec.length, offsets=spec.offsets, seed=3)
    tokens = {split: corpus.shards.num_tokens(split) for split in ("train", "dev")}
    assert train.num_windows == tokens["train"] // LENGTH - 1
    assert DevWindows(corpus.shards, spec.length).num_windows == tokens["dev"] // LENGTH

    # Window i lies at i * 128 + offset, and its offset is drawn anew in every epoch.
    stream = corpus.shards.read("train", 0, tokens["train"])
    indices = np.arange(train.num_windows)
    offsets = np.stack([train.starts(epoch, indices) for epoch in range(20)]) - indices * LENGTH
    assert offsets.min() >= 0
    assert offsets.max() < LENGTH
    assert len(np.unique(offsets)) > 0.9 * LENGTH
    assert (offsets[0] != offsets[1]).mean() > 0.8
    for index in (0, train.num_windows - 1):
        start = index * LENGTH + offsets[7, index]
        assert (train.windows(7, np.array([index]))[0] == stream[start : start + LENGTH]).all()


def test_window_counts_at_full_size() -> None:
    stream: Any = Stream(train=TOKENS_2024 + 77, dev=15_000_000)
    job = recipe("babyllama")
    train = TrainWindows(stream, length=LENGTH, offsets=job.windows.offsets, seed=1)
    assert train.num_windows == 132_131
    limit = job.student.training.evaluate_windows
    assert DevWindows(stream, LENGTH, limit).num_windows == 8_192
    assert DevWindows(stream, LENGTH).num_windows == 117_187


def test_the_second_recipe_holds_out_tails() -> None:
    corpus = recipe("babyllama2").corpus
    assert corpus.kind == "files"
    assert corpus.split == TailOfEachFile(kind="tail", fraction=0.05)


def test_the_first_recipe_has_development_files() -> None:
    corpus = recipe("babyllama").corpus
    assert corpus.kind == "files"
    assert corpus.split == HeldOutFiles(kind="held_out", dev=("/data/babylm/dev/*.dev",))


@pytest.mark.parametrize("name", RECIPES)
def test_text_is_cleaned_and_models_meet_both_benchmarks(name: str) -> None:
    job = recipe(name)
    assert job.corpus.kind == "files"
    assert job.corpus.train == ("/data/babylm/train/*.train",)
    assert job.corpus.cleaning == "babylm"
    assert job.windows.length == LENGTH
    folders = {pairs.name: pairs.path for pairs in job.evaluation.minimal_pairs}
    assert folders == {
        "blimp": "/data/babylm/eval/blimp_filtered",
        "supplement": "/data/babylm/eval/supplement_filtered",
    }
    assert job.evaluation.dev_windows is None


@pytest.mark.parametrize("name", RECIPES)
def test_without_the_data_every_place_that_needs_it_is_named(name: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(find_job(name), environ={})
    assert {problem.got for problem in caught.value.problems} == {
        "${BABYLM_DATA}, which is not set"
    }
    assert len(caught.value.problems) == {"babyllama": 4, "babyllama2": 3}[name]


# -- data order -----------------------------------------------------------------------------------


def orders(job: JobSpec) -> Iterator[tuple[list[int], list[int]]]:
    """Each stage's visiting order and first tokens in epoch 2."""
    stream: Any = Stream(train=200 * LENGTH)
    for stage in ("teachers/gpt2", "teachers/llama", "student", "control"):
        windows = TrainWindows(
            stream, length=LENGTH, offsets=job.windows.offsets, seed=job.stage_seed(stage)
        )
        order = windows.order(2)
        yield order.tolist(), windows.starts(2, order).tolist()


def test_each_model_has_its_own_data_order() -> None:
    gpt2, llama, student, control = orders(recipe("babyllama"))
    assert student == control
    assert gpt2 != llama
    assert gpt2 != student
    assert llama != student


def test_one_seed_for_all_gives_the_published_order() -> None:
    """As docs/recipes.md says: BabyLlama's models saw the same windows in the same order."""
    seeds = [f"{key}.seed=42" for key in ("teachers.gpt2", "teachers.llama", "student")]
    first, *others = orders(recipe("babyllama", *seeds))
    assert others == [first] * 3
