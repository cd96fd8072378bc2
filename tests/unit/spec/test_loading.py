"""Job files in, jobs or errors out: every error at its place, all of them together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babyllama_ds.errors import JobError, Problem
from babyllama_ds.spec.document import read_document
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job

JOB = """\
name: try-{seed}
seed: 3
corpus:
  kind: files
  train: ["${TEXT}/train/*.train"]
  split: {kind: tail}
tokenizer: {kind: bpe, vocab_size: 400}
windows: {length: 64}
teachers:
  - name: deep
    model:
      kind: llama
      hidden_size: 64
      num_layers: 2
      num_heads: 4
      intermediate_size: 128
    training:
      batch_windows: 16
      epochs: 1
      learning_rate: 3e-4
  - name: wide-1.5
    model: {kind: gpt2, hidden_size: 96, num_layers: 1, num_heads: 4}
    training: {batch_windows: 16, epochs: 0.5, learning_rate: 1e-3}
    weight: 2
student:
  model:
    kind: llama
    hidden_size: 32
    num_layers: 2
    num_heads: 2
    intermediate_size: 64
  training:
    batch_windows: 8
    epochs: 2
    learning_rate: 0.001
control: {}
"""
ROOMS = [f"babyllama_ds.spec.{name}" for name in ("loading", "resolved", "deepspeed", "schema")]
ENVIRON = {"TEXT": "/data"}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def load(path: Path, *overrides: str, environ: dict[str, str] = ENVIRON) -> JobSpec:
    return load_job(path, overrides, environ)


def edited(path: Path, *changes: tuple[str, str]) -> Path:
    """The job file with pieces of text replaced."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} must be there once"
        text = text.replace(old, new)
    path.write_text(text)
    return path


def problems(
    path: Path, overrides: Sequence[str] = (), environ: dict[str, str] = ENVIRON
) -> tuple[Problem, ...]:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides, environ)
    return caught.value.problems


def the_problem(path: Path, *overrides: str, environ: dict[str, str] = ENVIRON) -> Problem:
    (problem,) = problems(path, overrides, environ)
    return problem


def line_of(path: Path, text: str) -> str:
    """`file:line` of the one line that holds `text`."""
    (number,) = [n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return f"{path}:{number}"


# -- what is fine --------------------------------------------------------------------------------


def test_a_job_is_read(job_file: Path) -> None:
    job = load(job_file)
    assert job.run_name == "try-3"
    assert job.corpus.kind == "files"
    assert job.corpus.train == ("/data/train/*.train",)
    assert job.teachers[0].training is not None
    assert job.teachers[0].training.learning_rate == 3e-4
    assert job.teachers[1].weight == 2.0
    assert isinstance(job.teachers[1].weight, float)
    assert job.control is not None


def test_loading_imports_no_torch() -> None:
    code = (
        "import sys, babyllama_ds.spec.loading as l; print([m for m in sys.modules if m in "
        "('torch', 'numpy', 'transformers', 'deepspeed', 'datasets')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda job: job.seed, 7),
        ("student.training.learning_rate=7e-4",
         lambda job: job.student.training.learning_rate, 7e-4),
        ("student.training.betas=[0.9, 0.95]", lambda job: job.student.training.betas, (0.9, 0.95)),
        ("teachers.1.training.epochs=2", lambda job: job.teachers[1].training.epochs, 2.0),
        ("teachers[1].training.epochs=2", lambda job: job.teachers[1].training.epochs, 2.0),
        ("teachers.deep.weight=0.5", lambda job: job.teachers[0].weight, 0.5),
        ("teachers.wide-1.5.weight=0.5", lambda job: job.teachers[1].weight, 0.5),
        ("distillation.alpha=0.1", lambda job: job.distillation.alpha, 0.1),
        ("control=null", lambda job: job.control, None),
        ("control.training={batch_windows: 4, epochs: 1, learning_rate: 1e-3}",
         lambda job: job.control.training.batch_windows, 4),
        ("name=plain", lambda job: job.name, "plain"),
        ("deepspeed.config=$${odd}", lambda job: job.deepspeed.config, "${odd}"),
        ("deepspeed.config=${TEXT}/a=b.json", lambda job: job.deepspeed.config, "/data/a=b.json"),
        ("windows.offsets=fixed", lambda job: job.windows.offsets, "fixed"),
        ("corpus={kind: nursery, words: 5_000}", lambda job: job.corpus.words, 5000),
        ("distillation.divergence.kind=reverse_kl",
         lambda job: job.distillation.divergence.kind, "reverse_kl"),
        ("distillation.divergence={kind: skewed_forward_kl}",
         lambda job: job.distillation.divergence.skew, 0.1),
        ("distillation.alpha={start: 1, end: 0}",
         lambda job: (job.distillation.alpha.over, job.distillation.alpha.shape), (1.0, "linear")),
        ("student.training.unlabelled_tokens=[<s>]",
         lambda job: job.student.training.unlabelled_tokens, ("<s>",)),
    ],
)  # fmt: skip
def test_overrides(job_file: Path, override: str, read: Any, value: object) -> None:
    assert read(load(job_file, override)) == value


def test_the_last_override_wins(job_file: Path) -> None:
    assert load(job_file, "seed=7", "seed=8").seed == 8


def test_an_overridden_variable_need_not_be_set(job_file: Path) -> None:
    job = load(job_file, "corpus.train=[a.txt]", environ={})
    assert job.corpus.kind == "files"
    assert job.corpus.train == ("a.txt",)


def test_a_file_with_a_byte_order_mark_is_read(job_file: Path) -> None:
    job_file.write_bytes(b"\xef\xbb\xbf" + job_file.read_bytes())
    assert load(job_file).seed == 3


# -- files that cannot be read -------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    problem = the_problem(tmp_path / "none.yaml")
    assert problem.where == str(tmp_path / "none.yaml")
    assert problem.got == "no such file"
    assert str(Path.cwd()) in (the_problem(Path("none.yaml")).hint or "")


def test_a_directory(tmp_path: Path) -> None:
    assert the_problem(tmp_path).got == "a directory"


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    assert "0xe9 at offset 9" in the_problem(path).got


@pytest.mark.parametrize(
    ("text", "got"), [("", "an empty file"), ("# x\n", "an empty file"), ("- 1\n", "a list of 1")]
)
def test_a_file_that_is_not_a_mapping(tmp_path: Path, text: str, got: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    problem = the_problem(path)
    assert (problem.where, problem.got) == (str(path), got)
    assert "mapping" in problem.expected


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "where", "got", "expected", "hint"),
    [
        ("seed: 3", "seed: '5'", "seed", "'5'", "a whole number", "remove the quotes"),
        ("seed: 3", "seed: 9223372036854775808", "seed", "9223372036854775808",
         "a number < 9223372036854775808", ""),
        ("seed: 3", "seed: true", "seed", "true", "a whole number", "derives its own seed"),
        ("seed: 3", "seed: 1e3", "seed", "1000.0", "a whole number", "write 1000"),
        ("seed: 3", "seed: -1", "seed", "-1", "a number >= 0", ""),
        ("seed: 3", "seed: 9223372036854775808", "seed", "9223372036854775808", "a number <", ""),
        ("seed: 3", "seed: null", "seed", "null", "a whole number", ""),
        ("name: try-{seed}", "name: 5", "name", "5", "text", "quote it"),
        ("name: try-{seed}", "name: a/b", "name", "'a/b'", "letters (a to z)", "{seed}"),
        ("name: try-{seed}", "name: ბა", "name", "'ბა'", "letters (a to z)", "{seed}"),
        ("name: try-{seed}", "name: store", "name", "'store'", "another name", "folder"),
        ("kind: tail", "kind: tial", "corpus.split.kind", "'tial'", "one of 'held_out', 'tail'",
         "did you mean `tail`?"),
        ("kind: tail", "fraction: 0.1", "corpus.split.kind", "nothing",
         "one of 'held_out', 'tail'", ""),
        ("{kind: tail}", "7", "corpus.split", "7", "a mapping", "development text"),
        ("kind: tail", "kind: tail, fraction: 1", "corpus.split.fraction", "1", "a number < 1", ""),
        ("length: 64", "length: 64, offsets: Fixed", "windows.offsets", "'Fixed'",
         "one of 'fixed', 'random'", "did you mean `fixed`?"),
        ("length: 64", "length: 64, offsets: {phases: 0}", "windows.offsets.phases", "0",
         "a number > 0", "in epoch e every window"),
        ("length: 64", "length: 64, offsets: {phase: 2, phases: 2}", "windows.offsets.phase",
         "an unknown key", "a known one", "did you mean `phases`?"),
        ("length: 64", "length: 64, offsets: {}", "windows.offsets.phases", "nothing", "a value",
         ""),
        ("length: 64", "length: 64, offsets: 3", "windows.offsets", "3",
         "one of 'fixed', 'random'", "{phases: K}"),
        ("length: 64", "lenght: 64", "windows.lenght", "an unknown key", "a known one",
         "did you mean `length`?"),
        ("length: 64", "seq_length: 64", "windows.seq_length", "an unknown key", "a known one",
         "it is called `length` here"),
        ("length: 64", "zzz: 64", "windows.zzz", "an unknown key", "a known one",
         "there are: attention, length, offsets, order"),
        ("      num_heads: 4\n", "", "teachers[0].model.num_heads", "nothing", "a value",
         "Attention heads"),
        ("num_heads: 2", "num_heads: 2\n    tied_embeddings: 1",
         "student.model.tied_embeddings", "1", "true or false", "write true"),
        ("num_heads: 2", "num_heads: 2\n    tied_embeddings: no",
         "student.model.tied_embeddings", "'no'", "true or false", "write false"),
        ("epochs: 2", "epochs: .nan", "student.training.epochs", "nan", "a finite number", ""),
        ("epochs: 2", "epochs: 1e999", "student.training.epochs", "inf", "a finite number", ""),
        ("epochs: 2", "epochs: true", "student.training.epochs", "true", "a number", "Passes"),
        ("epochs: 2", "epochs: 2\n    clip_norm: off", "student.training.clip_norm", "'off'",
         "a number, or null", "none: no clipping"),
        ("epochs: 2", "epochs: 2\n    betas: [0.9]", "student.training.betas[1]", "nothing",
         "a value", ""),
        ("epochs: 2", "epochs: 2\n    betas: [0.9, 0.9, 0]", "student.training.betas",
         "a list of 3", "at most 2", ""),
        ("epochs: 2", "epochs: 2\n    betas: 0.9", "student.training.betas", "0.9", "a list", ""),
        ("weight: 2", "weight: 0", "teachers[1].weight", "0", "a number > 0", ""),
        ("epochs: 2", "epochs: 2\n    z_loss: 0", "student.training.z_loss", "0",
         "a number > 0", "PaLM"),
        ("epochs: 2", "epochs: 2\n    unlabelled_tokens: <s>", "student.training.unlabelled_tokens",
         "'<s>'", "a list", 'write ["<s>"]'),
        ('["${TEXT}/train/*.train"]', "text/*.train", "corpus.train", "'text/*.train'", "a list",
         'write ["text/*.train"]'),
        ("weight: 2", "tensor_parallel: 2", "teachers[1].tensor_parallel", "2 for a gpt2", "1",
         "AutoTP"),
        ("name: deep", "name: deep\n    tensor_parallel: 3", "teachers[0].tensor_parallel",
         "3 for a model whose num_heads is 4", "a divisor of 4", ""),
        ("name: deep", "name: deep\n    tensor_parallel: 0", "teachers[0].tensor_parallel",
         "0", "a number > 0", ""),
        ("control: {}", "control: 5", "control", "5", "a mapping, or null", ""),
        ("epochs: 2", "epochs: 1e308", "student.training.epochs", "1e+308",
         "a number <= 1000000000", ""),
        ("vocab_size: 400", "vocab_size: 4000000000", "tokenizer.vocab_size", "4000000000",
         "a number <= 10000000", ""),
        ("epochs: 2", "epochs: nan", "student.training.epochs", "'nan'", "a number", "Passes"),
        ("epochs: 2", "epochs: 10_00", "student.training.epochs", "'10_00'", "a number",
         "write 1000"),
        ("epochs: 2", "epochs: '1_000'", "student.training.epochs", "'1_000'", "a number",
         "remove the quotes"),
        ("control: {}", "deepspeed: {config: ''}", "deepspeed.config", "''",
         "text that is not empty", "zero2_cuda"),
        ("control: {}", 'control: {"\\ud800": 1}', "control", "'\\ud800' as a key",
         "text that UTF-8 can hold", ""),
        ('["${TEXT}/train/*.train"]', "[]", "corpus.train", "a list of 0", "at least 1", ""),
    ],
)  # fmt: skip
def test_wrong_values(
    job_file: Path, old: str, new: str, where: str, got: str, expected: str, hint: str
) -> None:
    problem = the_problem(edited(job_file, (old, new)))
    assert problem.where == where
    assert problem.got == got
    assert expected in problem.expected
    assert hint in (problem.hint or "")
    (number,) = (n for n, line in enumerate(JOB.splitlines(), 1) if old.split("\n")[0] in line)
    if got != "nothing":  # the key stands in the first or the last line of the new text
        assert problem.source in (
            f"{job_file}:{number}",
            f"{job_file}:{number + new.count(chr(10))}",
        )


def test_a_missing_key_stands_at_its_mapping(job_file: Path) -> None:
    problem = the_problem(edited(job_file, ("    epochs: 2\n", "")))
    lines = job_file.read_text().splitlines()
    assert problem.where == "student.training.epochs"
    assert problem.source == f"{job_file}:{lines.index('  training:') + 1}"


def test_a_missing_top_level_key_stands_at_the_first_line(job_file: Path) -> None:
    problem = the_problem(edited(job_file, ("tokenizer: {kind: bpe, vocab_size: 400}\n", "")))
    assert (problem.source, problem.where) == (f"{job_file}:1", "tokenizer")


def test_a_key_of_another_kind(job_file: Path) -> None:
    found = problems(job_file, ["corpus.kind=nursery"])
    assert [(p.where, p.got) for p in found] == [
        ("corpus.train", "an unknown key"),
        ("corpus.split", "an unknown key"),
    ]


def test_duplicate_keys(job_file: Path) -> None:
    edited(job_file, ("control: {}\n", "control: {}\nseed: 4\n"))
    problem = the_problem(job_file)
    assert problem.source == line_of(job_file, "seed: 4")
    assert line_of(job_file, "seed: 3") in problem.got


@pytest.mark.parametrize(
    ("override", "where", "got", "expected", "hint"),
    [
        ("divergence={kind: reverse}", "divergence.kind", "'reverse'", "one of 'forward_kl'",
         "did you mean `reverse_kl`?"),
        ("divergence=reverse-kl", "divergence", "'reverse-kl'", "a mapping",
         "write {kind: reverse_kl}"),
        ("divergence={kind: jensen_shannon, beta: 0}", "divergence.beta", "0", "a number > 0", ""),
        ("divergence={kind: jensen_shannon, beta: 1}", "divergence.beta", "1", "a number < 1", ""),
        ("divergence={kind: jensen_shannon, skew: 0.1}", "divergence.skew", "an unknown key",
         "a known one", "beta"),
        ("divergence={kind: skewed_reverse_kl, skew: 1.5}", "divergence.skew", "1.5",
         "a number < 1", ""),
        ("divergence={kind: reverse_kl, beta: 0.5}", "divergence.beta", "an unknown key",
         "a known one", ""),
        ("alpha=1.5", "alpha", "1.5", "a number <= 1", ""),
        ("alpha=high", "alpha", "'high'", "a number", ""),
        ("alpha={start: 0.9}", "alpha.end", "nothing", "a value", ""),
        ("alpha={start: 0.9, end: 1.1}", "alpha.end", "1.1", "a number <= 1", ""),
        ("alpha={start: 0.9, end: 0.1, over: 0}", "alpha.over", "0", "a number > 0", ""),
        ("alpha={start: 0.9, end: 0.1, shape: cosin}", "alpha.shape", "'cosin'", "one of",
         "did you mean `cosine`?"),
        ("temperature={start: 2, end: 0}", "temperature.end", "0", "a number >= 0.001", ""),
        ("temperature=1e200", "temperature", "1e+200", "a number <= 1000", ""),
        ("temperature={begin: 2, start: 1, end: 1}", "temperature.begin", "an unknown key",
         "a known one", ""),
        ("hidden_matching={weight: 0, layers: [{teacher: deep, "
         "teacher_layer: 1, student_layer: 1}]}",
         "hidden_matching.weight", "0", "a number > 0", ""),
        ("hidden_matching={weight: 1, layers: []}", "hidden_matching.layers", "a list of 0",
         "at least 1", ""),
        ("hidden_matching={weight: 1, loss: l1, layers: [{teacher: deep, teacher_layer: 1, "
         "student_layer: 1}]}", "hidden_matching.loss", "'l1'", "one of 'mse', 'cosine'", ""),
        ("hidden_matching={weight: 1, layers: [{teacher: depe, "
         "teacher_layer: 1, student_layer: 1}]}",
         "hidden_matching.layers[0].teacher", "'depe'", "the name of a teacher",
         "did you mean `deep`?"),
        ("hidden_matching={weight: 1, layers: [{teacher: deep, "
         "teacher_layer: 3, student_layer: 1}]}",
         "hidden_matching.layers[0].teacher_layer", "3", "at most 2: deep has 2 layers",
         "0 is the embeddings"),
        ("hidden_matching={weight: 1, layers: [{teacher: wide-1.5, teacher_layer: 1, "
         "student_layer: 3}]}", "hidden_matching.layers[0].student_layer", "3",
         "at most 2: the student has 2 layers", ""),
        ("hidden_matching={weight: 1, layers: [{teacher: deep, "
         "teacher_layer: -1, student_layer: 1}]}",
         "hidden_matching.layers[0].teacher_layer", "-1", "a number >= 0", ""),
    ],
)  # fmt: skip
def test_wrong_objectives(
    job_file: Path, override: str, where: str, got: str, expected: str, hint: str
) -> None:
    (problem,) = problems(job_file, [f"distillation.{override}"])
    assert problem.where == f"distillation.{where}"
    assert problem.got == got
    assert expected in problem.expected
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    ("override", "where", "got", "hint"),
    [
        ("divergence={kind: reverse_kl}", "divergence.kind", "reverse_kl with cache: topk",
         "distillation.cache=hidden"),
        ("temperature={start: 1, end: 2}", "temperature", "a schedule with cache: topk",
         "distillation.cache=hidden"),
        ("hidden_matching={weight: 1, layers: [{teacher: deep, "
         "teacher_layer: 1, student_layer: 1}]}",
         "cache", "topk with hidden_matching", "no states from the middle"),
    ],
)  # fmt: skip
def test_objectives_that_a_cache_has_not_kept_enough_for(
    job_file: Path, override: str, where: str, got: str, hint: str
) -> None:
    cached = ["windows.offsets=fixed", "distillation.cache=topk"]
    (problem,) = problems(job_file, [*cached, f"distillation.{override}"])
    assert (problem.where, problem.got) == (f"distillation.{where}", got)
    assert hint in (problem.hint or "")
    cached[1] = "distillation.cache=hidden"
    if "matching" in override:
        problem = the_problem(job_file, *cached, f"distillation.{override}")
        assert problem.got == "hidden with hidden_matching"
    else:
        assert load(job_file, *cached, f"distillation.{override}").distillation.cache == "hidden"


# -- values that do not fit together -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "where", "got", "expected", "hint"),
    [
        ([("hidden_size: 64", "hidden_size: 66")], "teachers[0].model.hidden_size", "66",
         "a multiple of num_heads (4)", "64 or 68"),
        ([("hidden_size: 96", "hidden_size: 98")], "teachers[1].model.hidden_size", "98",
         "a multiple of num_heads (4)", "96 or 100"),
        ([("hidden_size: 32", "hidden_size: 30")], "student.model.hidden_size",
         "30 for 2 heads of 15", "an even head size", "rotary"),
        ([("num_heads: 2", "num_heads: 2\n    num_kv_heads: 4")], "student.model.num_heads", "2",
         "a multiple of num_kv_heads (4)", "4 would do"),
        ([("epochs: 2", "epochs: 2\n    max_steps: 10\n    warmup_steps: 10")],
         "student.training.warmup_steps", "10", "< max_steps (10)", ""),
        ([("epochs: 2", "epochs: 2\n    micro_batch: 3")], "student.training.micro_batch", "3",
         "a divisor of batch_windows (8)", "2"),
        ([("epochs: 2", "epochs: 2\n    micro_batch: 1000000000000")],  # answered at once
         "student.training.micro_batch", "1000000000000", "a divisor of batch_windows (8)", "8"),
        ([("epochs: 2", "epochs: 2\n    micro_batch: most")], "student.training.micro_batch",
         "'most'", "a whole number, or 'auto', or null", "`auto`"),
        ([("name: wide-1.5", "name: deep")], "teachers[1].name", "'deep'",
         "a name of its own", "0"),
        ([("name: deep", "name: student")], "teachers[0].name", "'student'", "another name", ""),
        ([("name: deep", "name: control")], "teachers[0].name", "'control'", "another name", ""),
        ([("    training: {batch_windows: 16, epochs: 0.5, learning_rate: 1e-3}\n", "")],
         "teachers[1].training", "nothing", "how it is trained", "gpt2"),
        ([("control: {}",
           "evaluation: {minimal_pairs: [{name: a, path: x}, {name: a, path: y}]}")],
         "evaluation.minimal_pairs[1].name", "'a'", "a name of its own", "0"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(
    job_file: Path,
    changes: list[tuple[str, str]],
    where: str,
    got: str,
    expected: str,
    hint: str,
) -> None:
    problem = the_problem(edited(job_file, *changes))
    assert (problem.where, problem.got, problem.expected) == (where, got, expected)
    assert hint in (problem.hint or "")


def test_windows_longer_than_positions_name_every_model(job_file: Path) -> None:
    longer = ("num_heads: 2", "num_heads: 2\n    max_positions: 8")
    edited(job_file, ("length: 64", "length: 300"), longer)
    found = problems(job_file)
    assert [(p.where, p.got, p.source) for p in found] == [
        ("teachers[0].model.max_positions", "256", f"{job_file}:11"),
        ("teachers[1].model.max_positions", "256", line_of(job_file, "kind: gpt2")),
        ("student.model.max_positions", "8", line_of(job_file, "max_positions: 8")),
    ]
    assert {p.expected for p in found} == {">= windows.length (300)"}


def test_parts_are_checked_together_even_where_others_are_wrong(job_file: Path) -> None:
    edited(job_file, ("name: wide-1.5", "name: deep"), ("epochs: 2", "epochs: two"))
    assert [p.where for p in problems(job_file)] == ["teachers[1].name", "student.training.epochs"]


# -- the environment -----------------------------------------------------------------------------


def test_every_missing_variable_is_named(job_file: Path) -> None:
    edited(job_file, ("control: {}", 'deepspeed: {config: "${A}/${EMPTY}/${TEXT}"}'))
    found = problems(job_file, environ={"EMPTY": ""})
    assert [(p.where, p.got) for p in found] == [
        ("corpus.train[0]", "${TEXT}, which is not set"),
        ("deepspeed.config", "${A}, which is not set"),
        ("deepspeed.config", "${EMPTY}, which is empty"),
        ("deepspeed.config", "${TEXT}, which is not set"),
    ]
    assert found[0].source == line_of(job_file, "TEXT}/train")
    assert "export TEXT=" in (found[0].hint or "")
    assert "corpus.train[0]=" in (found[0].hint or "")


@pytest.mark.parametrize("text", ["$HOME/x", "a$", "${}", "${1A}", "${A"])
def test_a_lone_dollar_is_refused(job_file: Path, text: str) -> None:
    problem = the_problem(edited(job_file, ("control: {}", f"deepspeed: {{config: '{text}'}}")))
    assert (problem.where, problem.got) == ("deepspeed.config", repr(text))
    assert "$$" in problem.expected


def test_filled_text_is_not_filled_again(job_file: Path) -> None:
    job = load(job_file, environ={"TEXT": "${TEXT}$$"})
    assert job.corpus.kind == "files"
    assert job.corpus.train == ("${TEXT}$$/train/*.train",)


def test_a_variable_is_text(job_file: Path) -> None:
    problem = the_problem(
        edited(job_file, ("seed: 3", "seed: ${SEED}")), environ={"SEED": "5", **ENVIRON}
    )
    assert (problem.where, problem.got) == ("seed", "'5'")
    assert "override" in (problem.hint or "")


@pytest.mark.parametrize("name", ["tokenizer", "teachers.0.model"])
def test_an_empty_path_names_nothing(job_file: Path, name: str) -> None:
    problem = the_problem(job_file, f"{name}={{kind: pretrained, path: ''}}")
    assert (problem.got, problem.expected) == ("''", "text that is not empty")


def test_a_variable_that_is_not_utf8(job_file: Path) -> None:
    assert "UTF-8" in the_problem(job_file, environ={"TEXT": "\udce9"}).expected


# -- overrides that go wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "where", "got", "expected", "hint"),
    [
        ("seed", "the whole job", "'seed'", "KEY=VALUE", "KEY=null"),
        ("seed=", "the whole job", "'seed='", "KEY=VALUE", "KEY=null"),
        ("=3", "the whole job", "'=3'", "KEY=VALUE", ""),
        ("n\udce9me=3", "the whole job", "'n\\udce9me' as a key", "UTF-8", ""),
        ("seed=many", "seed", "'many'", "a whole number", ""),
        ("sed=3", "sed", "an unknown key", "a known one", "did you mean `seed`?"),
        ("student.training.epoch=3", "student.training.epoch", "an unknown key", "a known one",
         "did you mean `epochs`?"),
        ("seed.more=3", "seed", "3, with .more", "a mapping", "nothing below"),
        ("teachers.2.weight=1", "teachers", "'2'", "below 2, or one of 'deep', 'wide-1.5'", ""),
        ("teachers.dep.weight=1", "teachers", "'dep'", "below 2, or one of 'deep'", ""),
        ("teachers.-1.weight=1", "teachers", "'-1'", "a number below 2", ""),
        ("teachers.deep.weight=0", "teachers[0].weight", "0", "a number > 0", ""),
        ("student.training.clip_norm=.inf", "student.training.clip_norm", "inf",
         "a finite number", ""),
        ("deepspeed.config=${NONE}", "deepspeed.config", "${NONE}, which is not set",
         "the environment variable NONE", ""),
        ("distillation={alpha: 0.1, alpha: 0.2}", "distillation.alpha",
         "the key a second time (the first: command line: distillation={alpha: 0.1, alpha: 0.2})",
         "each key once", ""),
    ],
)  # fmt: skip
def test_wrong_overrides(
    job_file: Path, override: str, where: str, got: str, expected: str, hint: str
) -> None:
    problem = the_problem(job_file, override)
    assert problem.source == f"command line: {override}"
    assert (problem.where, problem.got) == (where, got)
    assert expected in problem.expected
    assert hint in (problem.hint or "")


def test_an_override_that_is_not_yaml(job_file: Path) -> None:
    problem = the_problem(job_file, "seed=[1")
    assert problem.source == "command line: seed=[1"
    assert problem.expected == "YAML"


def test_what_an_override_leaves_out_stands_at_the_override(job_file: Path) -> None:
    found = problems(job_file, ["student={model: {kind: gpt2}}"])
    assert {p.source for p in found} == {"command line: student={model: {kind: gpt2}}"}
    assert [p.where for p in found] == [
        "student.model.hidden_size",
        "student.model.num_heads",
        "student.model.num_layers",
        "student.training",
    ]


def test_an_override_mends_the_file(job_file: Path) -> None:
    edited(job_file, ("seed: 3", "seed: .nan"), ("epochs: 2", "epochs: 2\n    epochs: 3"))
    assert load(job_file, "seed=1", "student.training.epochs=4").student.training.epochs == 4


def test_a_later_override_does_not_hide_a_wrong_one(job_file: Path) -> None:
    assert the_problem(job_file, "seed.more=3", "seed=4").source == "command line: seed.more=3"


def test_an_override_of_an_aliased_part_changes_only_its_own(job_file: Path) -> None:
    own = "    training: {batch_windows: 16, epochs: 0.5, learning_rate: 1e-3}"
    edited(
        job_file,
        ("    training:\n      batch_windows: 16", "    training: &all\n      batch_windows: 16"),
    )
    edited(job_file, (own, "    training: *all"))
    job = load(job_file, "teachers.1.training.epochs=7")
    assert [teacher.training.epochs for teacher in job.teachers if teacher.training] == [1, 7]


# -- all together --------------------------------------------------------------------------------


def test_every_error_at_once_sorted_by_line(job_file: Path) -> None:
    edited(
        job_file,
        ("seed: 3", "sead: 3"),
        ("kind: tail", "kind: tale"),
        ("num_layers: 2\n      num_heads: 4", "num_layers: two\n      num_heads: 4"),
        ("weight: 2", "weight: -1"),
        ("control: {}", "control: {}\ncontrol: {}"),
    )
    found = problems(job_file, ["windows.length=1", "evaluation.batch_tokens=0"], environ={})
    assert [(p.where, p.source) for p in found] == [
        ("sead", f"{job_file}:2"),
        ("corpus.train[0]", f"{job_file}:5"),
        ("corpus.split.kind", f"{job_file}:6"),
        ("teachers[0].model.num_layers", f"{job_file}:14"),
        ("teachers[1].weight", f"{job_file}:24"),
        ("control", f"{job_file}:37"),
        ("windows.length", "command line: windows.length=1"),
        ("evaluation.batch_tokens", "command line: evaluation.batch_tokens=0"),
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=VALUES)
def test_whatever_stands_anywhere_there_is_a_job_or_a_job_error(
    job_file: Path, data: st.DataObject, value: object
) -> None:
    tree = read_document(JOB, "").data
    here, name = data.draw(st.sampled_from(list(slots(tree))))
    here[name] = value
    job_file.write_text(yaml.safe_dump(tree))
    found: tuple[Problem, ...] = ()
    try:
        load(job_file)
    except JobError as error:
        found = error.problems
    assert all(problem.source and problem.where for problem in found)


def slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key) of a tree."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from slots(value)


def test_the_message_is_one_line_and_a_hint_per_problem(job_file: Path) -> None:
    edited(job_file, ("seed: 3", "sead: 3"))
    with pytest.raises(JobError) as caught:
        load(job_file)
    assert str(caught.value) == (
        f"{job_file}:2: sead: got an unknown key, expected a known one\n"
        "    hint: did you mean `seed`?"
    )
