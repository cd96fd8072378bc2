"""What bad input gets: a clear error, exit status 2, and nothing lost or half-written.

One rank, in this process, through the command line's own `main`. `test_refusals` shows that two
ranks behave the same.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.cli import main

pytestmark = pytest.mark.usefixtures("process_as_it_was")

Refuse = Callable[..., str]

BRIEF = {"batch_windows": 8, "epochs": 1.0, "max_steps": 2, "learning_rate": 1e-3}
WIDE = {
    "kind": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 16,
    "max_positions": 64,
}


@pytest.fixture
def job(tmp_path: Path, tiny_job: Callable[..., Path]) -> Path:
    """One small teacher, trained for two steps, and its student."""
    teacher = {"name": "elder", "model": WIDE, "training": BRIEF}
    student = {"model": WIDE, "training": BRIEF}
    return tiny_job(tmp_path / "job", teachers=[teacher], student=student, control=None)


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a job that must be refused; what was said about it."""

    def run(job: Path, *overrides: str, runs: Path | None = None) -> str:
        runs = runs or tmp_path / "runs"
        code = main(["run", str(job), "--runs", str(runs), *overrides])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert said.err.count("error: ") == 1, said.err
        assert "got " in said.err
        assert "expected " in said.err
        assert "Traceback" not in said.err
        if runs.is_dir():
            everything = [path.name for path in runs.rglob("*")]
            assert [name for name in everything if ".tmp" in name] == []
            assert ".lock.json" not in everything
        return said.err

    return run


def state(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "runs" / "tiny-1" / "state.json").read_text()))


def nothing_trained(folder: Path) -> bool:
    return not list(folder.rglob("*.safetensors"))


# -- text -----------------------------------------------------------------------------------------


def test_missing_file(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    said = refuse(job, f"corpus.train=[{tmp_path}/nowhere.txt]")
    assert "corpus.train: got" in said
    assert f"{tmp_path}/nowhere.txt" in said
    assert state(tmp_path)["status"] == "failed"
    assert "nowhere.txt" in state(tmp_path)["error"]


def test_unreadable_file(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    said = refuse(job, f"corpus.train=[{tmp_path}/loop.txt]")
    assert "loop.txt" in said


def test_empty_corpus(job: Path, refuse: Refuse) -> None:
    (job.parent / "town.train").write_text("\n  \n")
    assert "town.train" in refuse(job)


def test_corpus_shorter_than_a_window(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    said = refuse(
        job,
        "windows.length=8192",
        "teachers.0.model.max_positions=8192",
        "student.model.max_positions=8192",
    )
    assert "not enough for one window" in said
    assert "windows.length" in said
    assert nothing_trained(tmp_path)


def test_development_text_shorter_than_a_window(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    (job.parent / "town.dev").write_text("mara mends a bell\n")
    said = refuse(job)
    assert "corpus (dev)" in said
    assert nothing_trained(tmp_path)


def test_a_compressed_file_cut_short(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    whole = gzip.compress((job.parent / "town.train").read_bytes())
    (tmp_path / "town.train.gz").write_bytes(whole[:-40])
    said = refuse(job, f"corpus.train=[{tmp_path}/town.train.gz]")
    assert "town.train.gz: got a compressed file that is cut short" in said
    assert not (tmp_path / "runs" / "store").exists()


def test_a_table_without_the_column(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "a row"}\n')
    said = refuse(job, f"corpus.train=[{tmp_path}/a.jsonl]")
    assert "a.jsonl:1: got no column 'text' (there are: txt)" in said
    assert "hint: did you mean `txt`?" in said


def test_vocabulary_larger_than_the_corpus_supports(
    job: Path, tmp_path: Path, refuse: Refuse
) -> None:
    said = refuse(job, "tokenizer.vocab_size=20000")
    assert "tokenizer.vocab_size: got text that supports" in said
    assert "hint: set tokenizer.vocab_size to at most" in said
    assert not list((tmp_path / "runs" / "store").rglob("tokenizer.json"))


def test_documents_without_a_boundary(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    said = refuse(job, "corpus.documents=blank_lines")
    assert "corpus.documents: got blank_lines, but no file of the training text has" in said
    assert "hint: set corpus.documents=lines if each line is a document" in said
    assert nothing_trained(tmp_path)


def test_documents_asked_for_where_their_boundaries_are_dropped(
    job: Path, tmp_path: Path, refuse: Refuse
) -> None:
    said = refuse(job, "windows.attention=document", "tokenizer.document_tokens=end")
    assert "windows.attention: got document, expected window, since corpus.documents is" in said
    assert "tokenizer.document_tokens: got end, expected none" in said  # told together
    assert not (tmp_path / "runs").exists()


def test_a_document_token_that_the_tokenizer_lacks(
    job: Path, tmp_path: Path, refuse: Refuse, saved_model: Path
) -> None:
    stranger = tmp_path / "stranger"
    shutil.copytree(saved_model, stranger)
    path = stranger / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["bos_token"]
    path.write_text(json.dumps(config))
    tokenizer = f"tokenizer={{kind: pretrained, path: {stranger}, document_tokens: both}}"
    said = refuse(job, "corpus.documents=lines", tokenizer)
    assert "tokenizer.document_tokens: got both, with a tokenizer that has no bos_token" in said
    assert "eos_token </s>" in said
    assert nothing_trained(tmp_path / "runs")


def test_a_teacher_that_cannot_keep_documents_apart(
    job: Path, tmp_path: Path, refuse: Refuse, saved_model: Path
) -> None:
    """BLOOM takes distances between tokens, and no positions."""
    from transformers import BloomConfig, BloomForCausalLM

    reader = tmp_path / "reader"
    shutil.copytree(saved_model, reader)
    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(reader)
    apart = ("corpus.documents=lines", "windows.attention=document")
    tokenizer = f"tokenizer={{kind: pretrained, path: {reader}}}"
    plain = loaded(reader).replace("}}", ", attention: eager}}")
    said = refuse(job, plain, tokenizer, *apart)
    assert "teachers.elder.model: got a BloomForCausalLM" in said
    assert "expected a model that keeps documents apart by their positions" in said
    assert nothing_trained(tmp_path / "runs")


# -- models ---------------------------------------------------------------------------------------


def test_heads_that_do_not_divide_the_width(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    said = refuse(job, "student.model.hidden_size=50", "student.model.num_heads=4")
    assert "student.model.hidden_size: got 50, expected a multiple of num_heads (4)" in said
    assert "hint: 48 or 52 would do" in said
    assert not (tmp_path / "runs").exists()


def test_windows_longer_than_positions(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    said = refuse(job, "windows.length=65")
    assert "teachers[0].model.max_positions: got 64, expected >= windows.length (65)" in said
    assert "student.model.max_positions: got 64" in said  # told together
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tiny_job: Callable[..., Path]) -> Path:
    """A LLaMA of 64 positions with the tokenizer that `job` learns, as its owner saved it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from babyllama_ds.corpus.tokenizer import train_tokenizer
    from babyllama_ds.spec.corpus import TrainedTokenizer

    folder = tmp_path_factory.mktemp("saved")
    text = tiny_job(folder / "job").parent / "town.train"
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder / "model")
    lines = iter(text.read_text().splitlines(keepends=True))
    spec = TrainedTokenizer(kind="bpe", vocab_size=300)
    train_tokenizer(spec, lines, folder / "model")
    return folder / "model"


def loaded(path: Path) -> str:
    return f"teachers.0={{name: elder, model: {{kind: pretrained, path: {path}}}}}"


def test_windows_longer_than_a_loaded_teachers_positions(
    job: Path, tmp_path: Path, refuse: Refuse, saved_model: Path
) -> None:
    said = refuse(job, loaded(saved_model), "windows.length=65", "student.model.max_positions=128")
    assert "got 64 positions, expected at least 65" in said
    assert "teachers" in said
    assert nothing_trained(tmp_path)


def test_teacher_with_another_vocabulary(
    job: Path, tmp_path: Path, refuse: Refuse, saved_model: Path
) -> None:
    from babyllama_ds.corpus.tokenizer import train_tokenizer
    from babyllama_ds.spec.corpus import TrainedTokenizer

    stranger = tmp_path / "stranger"
    shutil.copytree(saved_model, stranger)
    for path in stranger.glob("tokenizer*"):
        path.unlink()
    lines = iter(["seven swift zebras quizzed six foxes\n"] * 9)
    # As many tokens, but others.
    train_tokenizer(TrainedTokenizer(kind="bpe", vocab_size=280), lines, stranger)
    said = refuse(job, loaded(stranger))
    assert "teachers.elder.model: got a vocabulary that differs in" in said
    assert (
        f"hint: use this model's tokenizer: tokenizer={{kind: pretrained, path: {stranger}}}"
        in said
    )
    assert nothing_trained(tmp_path / "runs")


def test_teacher_that_is_not_there(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    said = refuse(job, loaded(tmp_path / "no" / "model"))
    assert f"{tmp_path}/no/model" in said
    assert nothing_trained(tmp_path)


# -- minimal pairs --------------------------------------------------------------------------------


def test_a_sentence_longer_than_a_models_positions(
    job: Path, tmp_path: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before hours of training, not at the evaluation after them."""
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    long = "玛拉画了一条蓝色的船" * 3  # three bytes a character, each of which is a token here
    lines = [("mara paints", "paints mara"), ("mara", long)]
    (pairs / "order.jsonl").write_text(
        "".join(
            json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n" for good, bad in lines
        )
    )
    benchmark = f"evaluation.minimal_pairs=[{{name: own, path: {pairs}}}]"
    said = refuse(job, benchmark)
    assert f"{pairs}/order.jsonl:2: sentence: got 91 tokens, expected at most 64" in said
    assert "the positions of teachers/elder" in said
    assert "raise teachers.elder.model.max_positions" in said
    assert nothing_trained(tmp_path / "runs")
    said = refuse(job, benchmark, "teachers.0.model.max_positions=91")
    assert "the positions of student" in said
    # Finished models are measured on the first pair, milestones on both.
    limits = "evaluation.max_pairs_per_task=1", "evaluation.milestones={max_pairs_per_task: 2}"
    assert "order.jsonl:2: sentence" in refuse(job, benchmark, *limits, "student.milestones=[90]")
    assert nothing_trained(tmp_path / "runs")
    # Where it fits, it is still longer than the windows, of 32 tokens.
    fits = [f"{place}.model.max_positions=91" for place in ("teachers.0", "student")]
    assert main(["run", str(job), "--runs", str(tmp_path / "fits"), benchmark, *fits]) == 0
    assert "own: 1 of 4 sentences are longer than windows.length (32 tokens), up to 91" in (
        capsys.readouterr().err
    )


# -- the machine ----------------------------------------------------------------------------------


def test_device_that_is_missing(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    said = refuse(job, "deepspeed.device=cuda")
    assert "deepspeed.device: got 0 CUDA devices" in said
    assert not (tmp_path / "runs").exists()


def test_run_directory_that_cannot_be_written(job: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refuse(job, runs=tmp_path / "file" / "runs")
    assert f"{tmp_path}/file/runs" in said
    assert (tmp_path / "file").read_text() == "in the way"


# -- numbers --------------------------------------------------------------------------------------


def damaged(saved_model: Path, copy: Path, name: str, row: int) -> str:
    """The override that starts the student from a copy of the model with a NaN in one weight."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved_model, copy)
    weights = load_file(copy / "model.safetensors")
    weights[name][row] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return f"student.model={{kind: pretrained, path: {copy}}}"


def fail_in_training(job: Path, runs: Path, *overrides: str) -> str:
    """Run a job that trains until its numbers are no longer finite; the error's text.

    Not by `main`: at such a step DeepSpeed logs a warning of its own, to the standard error that
    it found when it was imported.
    """
    from babyllama_ds.errors import TrainingError
    from babyllama_ds.pipeline import run_job
    from babyllama_ds.spec.loading import load_job

    with pytest.raises(TrainingError) as caught:
        run_job(load_job(job, overrides), runs=runs)
    assert [path for path in runs.rglob("*") if ".tmp" in path.name] == []
    return str(caught.value)


def test_loaded_weights_that_are_not_finite(
    job: Path, tmp_path: Path, refuse: Refuse, saved_model: Path
) -> None:
    said = refuse(job, damaged(saved_model, tmp_path / "broken", "model.norm.weight", 3))
    assert "student.model: got logits that are not finite" in said
    assert nothing_trained(tmp_path / "runs")


def test_weights_that_only_training_meets(job: Path, tmp_path: Path, saved_model: Path) -> None:
    often_used = 270  # a merge: no text of these words is without it
    override = damaged(saved_model, tmp_path / "broken", "model.embed_tokens.weight", often_used)
    said = fail_in_training(job, tmp_path / "runs", override)
    assert said.startswith("student: step 1: got")
    assert "not finite, in epoch 0, windows " in said
    assert "last good checkpoint: none yet" in said
    assert state(tmp_path)["status"] == "failed"
    assert "student: step 1" in state(tmp_path)["error"]
    assert not (tmp_path / "runs" / "tiny-1" / "student").exists()


def test_training_that_diverges(job: Path, tmp_path: Path) -> None:
    """Step, windows and checkpoint that are named are the right ones."""
    from babyllama_ds.corpus.shards import TokenShards
    from babyllama_ds.corpus.windows import TrainWindows
    from babyllama_ds.spec.loading import load_job

    overrides = (
        "student.training.learning_rate=1e30",
        "student.training.checkpoint_every_steps=1",
        "deepspeed.config=zero2_cpu_fp32",
    )
    said = fail_in_training(job, tmp_path / "runs", *overrides)
    assert said.startswith("student: step 2: got")
    run = tmp_path / "runs" / "tiny-1"
    checkpoint = run / "checkpoints" / "student" / "step-00000001"
    assert f"last good checkpoint: {checkpoint}" in said
    assert (checkpoint / "manifest.json").is_file()

    seed = load_job(job, []).stage_seed("student")
    shards = TokenShards.open(run / "tokens")
    windows = TrainWindows(shards, length=32, offsets="random", seed=seed).batch(0, 1, 8)
    assert f"windows {', '.join(map(str, windows))}," in said


# -- objectives -----------------------------------------------------------------------------------


def test_a_token_to_be_left_unlabelled_that_there_is_not(
    job: Path, tmp_path: Path, refuse: Refuse
) -> None:
    said = refuse(job, "student.training.unlabelled_tokens=[<s>, <S>]")
    assert "student.training.unlabelled_tokens[1]: got '<S>'" in said
    assert "did you mean `<s>`?" in said
    assert nothing_trained(tmp_path)
