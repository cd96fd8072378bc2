"""Before any training, every loaded model is shown to mean the same by every token id.

One rank, in this process, through the real pipeline. The teacher and the student that is started
from are saved by their owner with a tokenizer that is, or is not, the one that the job learns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer, vocabulary_hash
from babyllama_ds.errors import DataError, ModelError, UserError
from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.corpus import TrainedTokenizer
from babyllama_ds.spec.loading import load_job

pytestmark = pytest.mark.usefixtures("process_as_it_was")

VOCAB_SIZE, PADDING_ROWS = 300, 8
SWAPPED = (270, 290)
MODEL = {
    "kind": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 16,
    "max_positions": 32,
}
TRAINING = {
    "batch_windows": 8,
    "epochs": 1.0,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "log_every_steps": 1,
    "evaluate_windows": 8,
}
BRIEF = {"evaluation": {"dev_windows": 8}}


@pytest.fixture
def job(tmp_path: Path, tiny_job: Callable[..., Path]) -> Path:
    """A student and one loaded teacher, `elder`, whose path the overrides name."""
    elder = {"name": "elder", "model": {"kind": "pretrained", "path": "nowhere"}}
    student = {"model": MODEL, "training": TRAINING}
    return tiny_job(tmp_path / "job", teachers=[elder], student=student, control=None, **BRIEF)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_job: Callable[..., Path]) -> Path:
    """A LLaMA with strong opinions, and the tokenizer that `job` learns."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    text = tiny_job(folder / "job").parent / "town.train"
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    learn(text.read_text().splitlines(keepends=True), folder / "model")
    return folder / "model"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The saved model's directory, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def learn(lines: list[str], directory: Path) -> None:
    spec = TrainedTokenizer(kind="bpe", vocab_size=VOCAB_SIZE)
    train_tokenizer(spec, iter(lines), directory)


def pad(directory: Path) -> None:
    """Add rows that, taken for tokens, would outdo every other."""
    path, config_path = directory / "model.safetensors", directory / "config.json"
    weights = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padding = torch.full((PADDING_ROWS, weights[name].shape[1]), 50.0)
        weights[name] = torch.cat([weights[name], padding])
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "vocab_size": VOCAB_SIZE + PADDING_ROWS}))


def swap_ids(directory: Path) -> tuple[bytes, bytes]:
    """Let two tokens of text trade their ids; what the ids stood for before."""
    path = directory / "tokenizer.json"
    parts = json.loads(path.read_text(encoding="utf-8"))
    vocab = parts["model"]["vocab"]
    first, second = (next(t for t, i in vocab.items() if i == index) for index in SWAPPED)
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(parts), encoding="utf-8")
    return tuple(token.replace("Ġ", " ").encode() for token in (first, second))


def run(job: Path, runs: Path, *overrides: str) -> Path:
    return run_job(load_job(job, overrides), runs=runs)


def refused(error: type[UserError], job: Path, tmp_path: Path, *overrides: str) -> str:
    """The error of a job that ends before anything is trained."""
    with pytest.raises(error) as caught:
        run(job, tmp_path / "runs", *overrides)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))
    return str(caught.value)


def elder(path: Path) -> str:
    return f"teachers.0.model.path={path}"


# -- another meaning ------------------------------------------------------------------------------


def test_a_teacher_with_two_ids_swapped(job: Path, tmp_path: Path, copy: Path) -> None:
    one, other = swap_ids(copy)
    said = refused(ModelError, job, tmp_path, elder(copy))
    assert said.startswith(
        "teachers.elder.model: got a vocabulary that differs in 2 of 300 ids "
        f"({SWAPPED[0]} is {other!r}, not {one!r}; {SWAPPED[1]} is {one!r}, not {other!r}), "
        "expected the job's: the same bytes for every id"
    )
    assert f"hint: use this model's tokenizer: tokenizer={{kind: pretrained, path: {copy}}}" in said


def test_the_hint_mends_it(job: Path, tmp_path: Path, copy: Path) -> None:
    swap_ids(copy)
    tokenizer = f"tokenizer={{kind: pretrained, path: {copy}}}"
    run_dir = run(job, tmp_path / "runs", elder(copy), tokenizer)
    assert (run_dir / "student" / "model.safetensors").is_file()


def test_a_student_started_from_a_model_with_another_tokenizer(
    job: Path, tmp_path: Path, saved: Path, copy: Path
) -> None:
    learn(["seven swift zebras quizzed six foxes, rather oddly, by night\n"] * 9, copy)
    student = f"student.model={{kind: pretrained, path: {copy}}}"
    said = refused(ModelError, job, tmp_path, elder(saved), student)
    assert said.startswith("student.model: got a vocabulary that differs in ")
    assert "; …)" in said


@pytest.mark.parametrize("token", ["<extra>", " extra"])
def test_a_teacher_with_a_token_more(job: Path, tmp_path: Path, copy: Path, token: str) -> None:
    """Even with a row of its own: to the student, it would be a token without a probability."""
    pad(copy)
    tokenizer = load_tokenizer(str(copy))
    tokenizer.add_tokens([token], special_tokens=token.startswith("<"))
    tokenizer.save_pretrained(copy)
    said = refused(ModelError, job, tmp_path, elder(copy))
    stands_for = f"special {token}" if token.startswith("<") else repr(token.encode())
    assert f"differs in 1 of 301 ids (300 is {stands_for}, not no token)" in said


# -- no meaning to compare ------------------------------------------------------------------------


def test_a_teacher_without_a_tokenizer(job: Path, tmp_path: Path, copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    said = refused(DataError, job, tmp_path, elder(copy))
    assert said.startswith(f"teachers.elder.model: got {copy}: no tokenizer.json, ")
    assert "`tokenizer.save_pretrained(directory)` writes it, beside a model too" in said


def test_a_teacher_with_too_few_rows(job: Path, tmp_path: Path, copy: Path) -> None:
    tokenizer = load_tokenizer(str(copy))
    tokenizer.add_tokens([" extra"])
    tokenizer.save_pretrained(copy)
    tokenizer_of_both = f"tokenizer={{kind: pretrained, path: {copy}}}"
    said = refused(ModelError, job, tmp_path, elder(copy), tokenizer_of_both)
    assert said.startswith("teachers.elder.model: got an embedding of 300 rows, expected at least")


# -- the same meaning -----------------------------------------------------------------------------


@pytest.fixture
def curve(metrics: Callable[[Path], list[dict[str, Any]]]) -> Callable[[Path], list[Any]]:
    """What the student's training logged, but for its speed."""

    def read(run_dir: Path) -> list[Any]:
        lines = metrics(run_dir)
        times = ("tokens_per_s", "flops_per_s", "mfu")
        return [{key: line[key] for key in line if key not in times} for line in lines]

    return read


def test_padding_rows_of_a_teacher_change_nothing(
    job: Path, tmp_path: Path, saved: Path, copy: Path, curve: Callable[[Path], list[Any]]
) -> None:
    pad(copy)
    plain = run(job, tmp_path / "runs", elder(saved), "name=plain")
    padded = run(job, tmp_path / "runs", elder(copy), "name=padded")
    assert len(curve(plain)) == TRAINING["max_steps"] + 1
    assert all(line["kl"] > 0.3 for line in curve(plain) if "kl" in line)
    assert curve(padded) == curve(plain)
    measured = [
        json.loads((run_dir / "evaluation" / "elder.json").read_text())["dev"]["ce"]
        for run_dir in (plain, padded)
    ]
    assert measured[0] == measured[1]
    proved = json.loads((padded / "environment.json").read_text())["fingerprints"]["vocabulary"]
    for directory in (copy, padded / "tokenizer", padded / "student"):
        assert vocabulary_hash(load_tokenizer(str(directory))) == proved


def test_padding_rows_of_the_student_change_nothing(
    job: Path, tmp_path: Path, saved: Path, copy: Path, curve: Callable[[Path], list[Any]]
) -> None:
    pad(copy)
    plain, padded = (
        run(
            job,
            tmp_path / "runs",
            elder(saved),
            f"name={name}",
            "student.training.weight_decay=0.0",
            f"student.model={{kind: pretrained, path: {path}}}",
        )
        for name, path in (("plain", saved), ("padded", copy))
    )
    assert curve(padded) == curve(plain)
    weights = load_file(padded / "student" / "model.safetensors")
    assert (weights["lm_head.weight"][VOCAB_SIZE:] == 50).all()
