"""The shipped recipes, run whole: twins of CPU size, and the real corpus as they prepare it.

A twin is the shipped file with overrides of sizes and lengths of training alone, so that it cannot
drift from the recipe.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

from babyllama_ds.corpus.nursery.write import write_nursery
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job

VOCAB, LENGTH, POSITIONS = 400, 128, 256
FREE = {
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"),
    *("batch_windows", "micro_batch", "epochs", "learning_rate", "warmup_steps"),
    "log_every_steps",
}
"""What a twin may have of its own: sizes, and how long it trains."""


def sizes(key: str, **values: object) -> list[str]:
    return [f"{key}.{name}={value}" for name, value in values.items()]


SHORT = {
    "batch_windows": 8,
    "micro_batch": 2,
    "epochs": 3,
    "learning_rate": 3e-3,  # small models want more
    "warmup_steps": 5,
    "log_every_steps": 1,
}
BABYLLAMA = [
    f"tokenizer.vocab_size={VOCAB}",
    *sizes("teachers.gpt2.model", hidden_size=48, num_layers=2, num_heads=4, intermediate_size=192),
    *sizes("teachers.llama.model", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=96),
    *sizes("student.model", hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64),
    *sizes("teachers.gpt2.training", **SHORT),
    *sizes("teachers.llama.training", **SHORT),
    # Without a micro-batch, as in the recipe: a rank takes its whole share at once.
    *sizes("student.training", **{**SHORT, "batch_windows": 4, "micro_batch": "null"}),
]
SMOL = {
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "intermediate_size": 128,
}
BABYLLAMA2 = [
    f"tokenizer.vocab_size={VOCAB}",
    *(
        override
        for key in ("teachers.first", "teachers.second", "student")
        for override in (*sizes(f"{key}.model", **SMOL), *sizes(f"{key}.training", **SHORT))
    ),
]


@dataclass(frozen=True)
class Twin:
    """A finished run of a scaled-down recipe."""

    name: str
    job: JobSpec
    run_dir: Path
    lines: list[dict[str, Any]]

    @property
    def models(self) -> dict[str, Path]:
        teachers = {one.name: self.run_dir / "teachers" / one.name for one in self.job.teachers}
        return {
            **teachers,
            "student": self.run_dir / "student",
            "control": self.run_dir / "control",
        }

    def logged(self, stage: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["stage"] == stage and "loss" in line]


def write_babylm_folder(folder: Path) -> None:
    """BABYLM_DATA as users have it, of English that the stack writes itself."""
    made = folder / "nursery"
    write_nursery(made, words=6_000, dev_words=1_500, pairs_per_task=4, seed=1)
    lines = (made / "train" / "nursery.train").read_text().splitlines(keepends=True)
    texts = {"train/childes.train": lines[::2], "train/gutenberg.train": lines[1::2]}
    texts["dev/childes.dev"] = (made / "dev" / "nursery.dev").read_text().splitlines(keepends=True)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(text))
    tasks = sorted((made / "pairs").glob("*.jsonl"))
    for number, task in enumerate(tasks):
        benchmark = folder / "eval" / ("blimp_filtered", "supplement_filtered")[number % 2]
        benchmark.mkdir(parents=True, exist_ok=True)
        task.rename(benchmark / task.name)


OVERRIDES = {"babyllama": BABYLLAMA, "babyllama2": BABYLLAMA2}


@pytest.fixture(scope="module", params=OVERRIDES)
def twin(
    request: pytest.FixtureRequest,
    once: Callable[..., Any],
    run_ranks: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> Twin:
    name: str = request.param

    def make(scene: Any) -> list[Any]:
        write_babylm_folder(scene.folder / "data")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BABYLM_DATA", str(scene.folder / "data"))
            words = (find_job(name), *OVERRIDES[name], "--runs", scene.runs)
            return [run_ranks(*words)]

    scene = once(f"twin-{name}", make)
    scene.ended[0].assert_done()
    run_dir = scene.runs / f"{name}-1"
    return Twin(name, load_job(run_dir / "job.yaml"), run_dir, metrics(run_dir))


# -- the same recipe ------------------------------------------------------------------------------


def flat(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items:
        if isinstance(inner, dict | list):
            yield from flat(inner, (*key, str(name)))
        else:
            yield (*key, str(name)), inner


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_twin_differs_from_its_recipe_in_sizes_alone(name: str) -> None:
    environ = {"BABYLM_DATA": "/data"}
    recipe, twin = (
        dict(flat(load_job(find_job(name), words, environ=environ).model_dump(mode="json")))
        for words in ([], OVERRIDES[name])
    )
    assert twin.keys() == recipe.keys()
    changed = {key for key in recipe if recipe[key] != twin[key]}
    assert {key[-1] for key in changed} <= FREE
    # What is tied, grouped, shaped: as in the recipe.
    for key, heads in recipe.items():
        if key[-1] == "num_heads" and recipe[(*key[:-1], "kind")] == "llama":
            groups = (*key[:-1], "num_kv_heads")
            ratio = heads / (recipe[groups] or heads)
            assert twin[key] / (twin[groups] or twin[key]) == ratio
        if key[-1] == "hidden_size":
            inner = (*key[:-1], "intermediate_size")
            assert twin[inner] / twin[key] == recipe[inner] / heads


# -- run whole ------------------------------------------------------------------------------------


@pytest.mark.launch
def test_every_model_is_made_and_measured(twin: Twin) -> None:
    report = json.loads((twin.run_dir / "report" / "report.json").read_text())
    assert report["models"].keys() == twin.models.keys()
    assert (twin.run_dir / "report" / "report.md").stat().st_size > 0
    assert json.loads((twin.run_dir / "state.json").read_text()) == {"status": "done"}
    for name, path in twin.models.items():
        assert (path / "model.safetensors").is_file()
        assert (path / "config.json").is_file()
        assert math.isfinite(report["models"][name]["dev_ce"])
        assert report["models"][name]["minimal_pairs"].keys() == {"blimp", "supplement"}


@pytest.mark.launch
def test_models_have_the_recipes_structure(twin: Twin) -> None:
    for name, path in twin.models.items():
        config = json.loads((path / "config.json").read_text())
        with safe_open(path / "model.safetensors", framework="pt") as weights:
            tied = "lm_head.weight" not in weights.keys()  # noqa: SIM118
        assert config["vocab_size"] == VOCAB
        if name == "gpt2":
            assert tied
            assert config["n_positions"] == POSITIONS
            assert {config[f"{part}_pdrop"] for part in ("resid", "embd", "attn")} == {0.1}
        else:
            assert not tied
            assert config["max_position_embeddings"] == POSITIONS
            share = 3 if twin.name == "babyllama2" else 1
            assert config["num_attention_heads"] == share * config["num_key_value_heads"]


@pytest.mark.launch
def test_teachers_differ(twin: Twin) -> None:
    """Also those of the second recipe, which differ in their seeds alone."""
    weights = {(path / "model.safetensors").read_bytes() for path in twin.models.values()}
    assert len(weights) == len(twin.models)


@pytest.mark.launch
def test_training_learns(twin: Twin) -> None:
    for stage in (*(f"teachers/{one.name}" for one in twin.job.teachers), "student", "control"):
        lines = twin.logged(stage)
        losses = [line["loss"] for line in lines]
        assert all(math.isfinite(value) for line in lines for value in numbers(line))
        # The first rate is zero: step 1 shows the untrained model.
        assert lines[0]["lr"] == 0
        assert np.mean(losses[-5:]) < 0.9 * losses[0], stage
        assert np.mean([line["ce"] for line in lines[-5:]]) < 0.9 * lines[0]["ce"], stage


def numbers(line: dict[str, Any]) -> list[float]:
    return [value for value in line.values() if isinstance(value, int | float)]


# -- the published loss ---------------------------------------------------------------------------


@pytest.mark.launch
def test_logged_loss_is_made_of_its_logged_parts(twin: Twin) -> None:
    """L = α·CE + (1 − α)·T²·KL_sum / B, KL_sum over all positions of B windows."""
    alpha, temperature = {"babyllama": (0.5, 2.0), "babyllama2": (0.5, 1.0)}[twin.name]
    lines = twin.logged("student")
    assert len(lines) > 20
    for line in lines:
        kl_sum_by_windows = line["kl"] * LENGTH  # `kl` is the mean over positions
        expected = alpha * line["ce"] + (1 - alpha) * temperature**2 * kl_sum_by_windows
        assert line["loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.launch
def test_first_step_has_the_published_codes_loss(twin: Twin) -> None:
    """The untrained student on its first batch, in plain PyTorch as the published code has it."""
    from babyllama_ds.corpus.shards import TokenShards
    from babyllama_ds.corpus.tokenizer import load_tokenizer
    from babyllama_ds.corpus.windows import TrainWindows
    from babyllama_ds.models.build import build_model, load_model

    job, run_dir = twin.job, twin.run_dir
    seed = job.stage_seed("student")
    shards = TokenShards.open((run_dir / "tokens").resolve())
    windows = TrainWindows(shards, length=LENGTH, offsets="random", seed=seed)
    ids = torch.from_numpy(
        windows.windows(0, windows.batch(0, 0, job.student.training.batch_windows))
    )
    tokenizer = load_tokenizer(str((run_dir / "tokenizer").resolve()))
    student = build_model(job.student.model, tokenizer, seed=seed, attention="eager", where="here")
    teachers = [
        load_model(str(twin.models[one.name].resolve()), attention="eager", where="here")
        for one in job.teachers
    ]
    with torch.inference_mode():
        logits = student(ids).logits
        mean = torch.stack([teacher.eval()(ids).logits for teacher in teachers]).mean(dim=0)
    ce = cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    temperature = job.distillation.temperature
    kl = nn.KLDivLoss(reduction="batchmean")(
        log_softmax(logits / temperature, dim=-1), softmax(mean / temperature, dim=-1)
    )
    expected = 0.5 * ce + 0.5 * temperature**2 * kl
    first = twin.logged("student")[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(expected.item(), rel=0.01)  # ours is bf16
    assert first["ce"] == pytest.approx(ce.item(), rel=0.01)


# -- the real corpus ------------------------------------------------------------------------------

TOKENS_2024 = 16.9e6
"""Of BabyLM 2024's ten million words under the published tokenizer, from a reproduction's log."""


@pytest.mark.data
@pytest.mark.skipif("BABYLM_DATA" not in os.environ, reason="BABYLM_DATA is not set")
def test_ten_million_words_are_as_many_tokens_as_published(tmp_path: Path) -> None:
    """Within 10 %: the text is not the official one to the letter."""
    from babyllama_ds.corpus.prepare import open_corpus, prepare_corpus
    from babyllama_ds.corpus.windows import TrainWindows
    from babyllama_ds.store import Store

    job = load_job(find_job("babyllama"))
    corpus = open_corpus(prepare_corpus(job, Store(tmp_path), lambda: None))
    assert len(corpus.tokenizer) == 16_000
    tokens, words = corpus.shards.num_tokens("train"), corpus.shards.num_words("train")
    assert words == pytest.approx(10e6, rel=0.02)
    assert tokens == pytest.approx(TOKENS_2024, rel=0.10)
    windows = TrainWindows(corpus.shards, length=LENGTH, offsets="random", seed=1)
    assert windows.num_windows == tokens // LENGTH - 1
    stream = corpus.shards.read("train", 0, tokens)
    assert stream.min() > 2  # no <pad>, <s>, </s>
    assert stream.max() < 16_000
