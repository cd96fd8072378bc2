"""The same fingerprint, the same result: every field that changes a result, and no other.

Each table of changes names all fields of its spec, so that a new field has to be thought about.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from babyllama_ds import files, fingerprints
from babyllama_ds.errors import ModelError
from babyllama_ds.fingerprints import (
    evaluation_fingerprint,
    loaded_teacher_fingerprint,
    student_fingerprint,
    trained_fingerprint,
    weight_hashes,
)
from babyllama_ds.spec.corpus import WindowsSpec
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.evaluation import EvaluationSpec, FineTuning
from babyllama_ds.spec.job import JobSpec, TeacherSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.models import Gpt2Model, LlamaModel, PretrainedModel
from babyllama_ds.spec.training import EarlyStopping, MovingAverage, Muon, TrainingSpec

LLAMA = LlamaModel(kind="llama", hidden_size=48, num_layers=2, num_heads=4, intermediate_size=40)
GPT2 = Gpt2Model(kind="gpt2", hidden_size=48, num_layers=2, num_heads=4)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = PretrainedModel(kind="pretrained", path="someone/model", revision=COMMIT)
TRAINING = TrainingSpec(batch_windows=8, epochs=1.0, learning_rate=1e-3)
BEFORE = {
    "llama": "43916a516ecd9bd1bfab964017623f4e561bb6d0687592a6cea6095e1bc12622",
    "gpt2": "81a712e98c0b27ccb6e7ee4909a525d54e343f4dc3620620e2871c72dfb8f3fd",
}
"""Fingerprints of these models before any option was added, under method 3."""


def fingerprint(**changes: Any) -> str:
    values = {
        "model": LLAMA,
        "training": TRAINING,
        "tokens_key": "t" * 64,
        "windows": WindowsSpec(),
        "seed": 1,
        "precision": "bf16",
        **changes,
    }
    return trained_fingerprint(values.pop("model"), values.pop("training"), **values)


def changed(spec: BaseModel, **changes: Any) -> Any:
    """The spec with other values, validated, and really another."""
    other = type(spec).model_validate({**spec.model_dump(), **changes})
    assert other != spec
    return other


def cases(*tables: tuple[BaseModel, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(spec, key, value, id=f"{type(spec).__name__}.{key}")
        for spec, table in tables
        for key, value in table.items()
    ]


# -- trained models --------------------------------------------------------------------------------

TRAINING_MATTERS = {
    "batch_windows": 16,
    "epochs": 2.0,
    "max_steps": 5,
    "max_tokens": 500,
    "learning_rate": 2e-3,
    "schedule": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "betas": (0.8, 0.999),
    "epsilon": 1e-6,
    "clip_norm": None,
    "z_loss": 1e-4,
    "unlabelled_tokens": ("<s>",),
    "max_minutes": 3.5,
    "early_stopping": EarlyStopping(patience=3),
    "muon": Muon(),
    "ema": MovingAverage(),
    "evaluate_every_steps": 3,  # what the best weights are chosen among
    "evaluate_windows": 4,
    "keep": "last",
}
TRAINING_FREE = {
    "micro_batch": 2,
    "log_every_steps": 3,
    "profile_steps": 2,
    "gradient_checkpointing": True,  # the same to the bit: tests/unit/models/test_recomputing.py
    "checkpoint_every_steps": 4,
}
LLAMA_MATTERS = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 2,
    "intermediate_size": 41,
    "max_positions": 512,
    "rope_theta": 5e5,
    "norm_epsilon": 1e-5,
    "initializer_range": 0.01,
    "tied_embeddings": True,
    "attention_dropout": 0.1,
}
GPT2_MATTERS = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 41,
    "max_positions": 512,
    "dropout": 0.0,
    "norm_epsilon": 1e-6,
    "initializer_range": 0.01,
    "tied_embeddings": False,
}
MODEL_FREE = {"attention": "eager"}
WINDOWS_MATTER = {
    "length": 64,
    "offsets": "fixed",
    "attention": "document",
    "order": "published",
}
PRETRAINED_MATTERS = {"revision": COMMIT[::-1], "dropout": 0.2, "attention_dropout": 0.0}


def test_the_tables_name_every_field() -> None:
    assert {*TRAINING_MATTERS, *TRAINING_FREE} == set(TrainingSpec.model_fields)
    assert {*LLAMA_MATTERS, *MODEL_FREE, "kind"} == set(LlamaModel.model_fields)
    assert {*GPT2_MATTERS, *MODEL_FREE, "kind"} == set(Gpt2Model.model_fields)
    assert {*PRETRAINED_MATTERS, *MODEL_FREE, "kind", "path"} == set(PretrainedModel.model_fields)
    assert {*WINDOWS_MATTER} == set(WindowsSpec.model_fields)
    assert {*DISTILLATION_MATTERS, *DISTILLATION_FREE} == set(DistillationSpec.model_fields)
    others = {"minimal_pairs", "fine_tuning", "batch_tokens", "milestones"}
    assert {*EVALUATION_MATTERS, *others} == set(EvaluationSpec.model_fields)


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    cases(
        (TRAINING, TRAINING_MATTERS),
        (LLAMA, LLAMA_MATTERS),
        (GPT2, GPT2_MATTERS),
        (HUB, PRETRAINED_MATTERS),
        (WindowsSpec(), WINDOWS_MATTER),
    ),
)
def test_what_changes_the_weights_changes_the_fingerprint(
    spec: BaseModel, key: str, value: Any
) -> None:
    name = {TrainingSpec: "training", WindowsSpec: "windows"}.get(type(spec), "model")
    other = changed(spec, **{key: value})
    assert fingerprint(**{name: other}) != fingerprint(**{name: spec})


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    cases((TRAINING, TRAINING_FREE), *((model, MODEL_FREE) for model in (LLAMA, GPT2, HUB))),
)
def test_how_it_runs_does_not(spec: BaseModel, key: str, value: Any) -> None:
    name = "training" if isinstance(spec, TrainingSpec) else "model"
    other = changed(spec, **{key: value})
    assert fingerprint(**{name: other}) == fingerprint(**{name: spec})


@pytest.mark.parametrize(
    "change",
    [{"tokens_key": "u" * 64}, {"seed": 2}, {"precision": "fp32"}, {"model": GPT2}],
    ids=lambda change: next(iter(change)),
)
def test_text_seed_precision_and_family_do(change: dict[str, Any]) -> None:
    assert fingerprint(**change) != fingerprint()


def test_a_change_of_the_method_changes_every_fingerprint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teacher = TeacherSpec(
        name="a", model=PretrainedModel(kind="pretrained", path=str(saved_model(tmp_path / "a")))
    )
    before = fingerprint(), loaded_teacher_fingerprint(teacher, "t", precision="bf16")
    monkeypatch.setattr(fingerprints, "METHOD", 1000)
    after = fingerprint(), loaded_teacher_fingerprint(teacher, "t", precision="bf16")
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_options_that_came_later_change_nothing_where_they_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fingerprints of before, but for the method: a new one is meant to change them all."""
    monkeypatch.setattr(fingerprints, "METHOD", 3)
    assert fingerprint() == BEFORE["llama"]
    assert fingerprint(model=GPT2) == BEFORE["gpt2"]
    for value in ({}, {"ema": None, "gradient_checkpointing": False}):
        spec = TrainingSpec.model_validate({**TRAINING.model_dump(), **value})
        assert fingerprint(training=spec) == BEFORE["llama"]


def test_it_is_the_same_in_every_process() -> None:
    """A hash of canonical JSON, not of Python objects: stores outlive processes and machines."""
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 64
    assert int(fingerprint(), 16) > 0


# -- loaded models ---------------------------------------------------------------------------------


def saved_model(directory: Path, *, fill: float = 0.0, config: str = "{}") -> Path:
    directory.mkdir(parents=True)
    save_file({"weight": torch.full((3,), fill)}, directory / "model.safetensors")
    (directory / "config.json").write_text(config)
    (directory / "README.md").write_text("a card")
    return directory


def loaded(
    path: Path | str,
    *,
    attention: str = "auto",
    tokenizer_key: str = "t",
    precision: str = "bf16",
    revision: str | None = None,
) -> str:
    model = PretrainedModel(
        kind="pretrained", path=str(path), attention=attention, revision=revision
    )
    spec = TeacherSpec(name="a", model=model)
    return loaded_teacher_fingerprint(spec, tokenizer_key, precision=precision)


def test_a_loaded_model_is_known_by_its_content(tmp_path: Path) -> None:
    here = saved_model(tmp_path / "here")
    moved = tmp_path / "moved"
    shutil.copytree(here, moved)
    (moved / "README.md").write_text("another card")
    assert loaded(moved) == loaded(here)
    assert loaded(here, attention="eager") == loaded(here)
    assert loaded(saved_model(tmp_path / "weights", fill=1.0)) != loaded(here)
    assert loaded(saved_model(tmp_path / "config", config='{"a": 1}')) != loaded(here)
    assert loaded(here, tokenizer_key="u") != loaded(here)


def test_a_model_of_the_hub_is_known_by_its_commit() -> None:
    one = loaded("someone/model", revision=COMMIT)
    assert loaded("someone/other", revision=COMMIT) != one
    assert loaded("someone/model", revision=COMMIT[::-1]) != one


def test_a_loaded_model_is_another_in_another_precision(tmp_path: Path) -> None:
    """The store keeps its weights rounded: those of bf16 are not what an fp32 job asks for."""
    here = saved_model(tmp_path / "here")
    assert loaded(here, precision="fp32") != loaded(here)


def test_a_student_warm_started_from_other_weights_is_another(tmp_path: Path) -> None:
    models = [
        PretrainedModel(kind="pretrained", path=str(saved_model(tmp_path / str(n), fill=n)))
        for n in (1.0, 2.0)
    ]
    assert fingerprint(model=models[0]) != fingerprint(model=models[1])


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    directory = saved_model(tmp_path / "a")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"without \*\.safetensors"):
        loaded(directory)


def test_weights_are_hashed_or_read_from_the_manifest(tmp_path: Path) -> None:
    directory = saved_model(tmp_path / "a")
    expected = {"model.safetensors": files.sha256_file(directory / "model.safetensors")}
    assert weight_hashes(directory) == expected
    files.write_manifest(directory, fingerprint="f")
    assert weight_hashes(directory) == expected


def test_a_model_that_was_written_over_is_another_whatever_its_manifest_says(
    tmp_path: Path,
) -> None:
    """An export of ours that was trained further, and saved where it was."""
    directory = saved_model(tmp_path / "a")
    files.write_manifest(directory, fingerprint="f")
    before = loaded(directory), fingerprint(model=pretrained(directory))
    save_file({"weight": torch.ones(3)}, directory / "model.safetensors")
    after = loaded(directory), fingerprint(model=pretrained(directory))
    assert before[0] != after[0]
    assert before[1] != after[1]


def pretrained(directory: Path) -> PretrainedModel:
    return PretrainedModel(kind="pretrained", path=str(directory))


# -- the distilled student -------------------------------------------------------------------------

DISTILLATION_MATTERS = {
    "alpha": 0.4,
    "temperature": 3.0,
    "soft_reduction": "token",
    "mean_of": "probabilities",
    "divergence": {"kind": "reverse_kl"},
    "hidden_matching": {
        "weight": 0.5,
        "layers": ({"teacher": "a", "teacher_layer": 1, "student_layer": 1},),
    },
}
DISTILLATION_FREE = {
    "chunk_tokens": 64,
    "cache": "hidden",  # the live teachers', remembered
    "cache_tier": "disk",
    "cache_kept": False,
    "cache_top_k": 8,  # without `topk`
}
EVALUATION_MATTERS = {
    "max_pairs_per_task": 3,
    "dev_windows": 4,
    "leading_space": False,
    "prefix": "bos",
    "samples": 2,
}

JOB = """
name: one
corpus: {kind: nursery, documents: lines}
tokenizer: {kind: bpe, vocab_size: 800}
windows: {length: 64}
teachers:
  - name: a
    model: &model {kind: llama, hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 48}
    training: &training {batch_windows: 32, epochs: 4, learning_rate: 2e-3}
  - {name: b, model: *model, training: *training}
student: {model: *model, training: *training}
distillation: {alpha: 0.5, temperature: 2.0, soft_reduction: sequence}
"""


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., JobSpec]:
    def load(*overrides: str) -> JobSpec:
        (tmp_path / "job.yaml").write_text(JOB)
        return load_job(tmp_path / "job.yaml", overrides, environ={})

    return load


@pytest.fixture
def teachers(tmp_path: Path) -> list[tuple[str, Path]]:
    return [
        ("a", saved_model(tmp_path / "teachers" / "a", fill=1.0)),
        ("b", saved_model(tmp_path / "teachers" / "b", fill=2.0)),
    ]


def test_over_how_many_ranks_a_teacher_is_split_changes_nothing(
    job_of: Callable[..., JobSpec], teachers: list[tuple[str, Path]], tmp_path: Path
) -> None:
    """As its attention kernel: another rounding."""
    model = PretrainedModel(kind="pretrained", path=str(saved_model(tmp_path / "here")))
    whole = TeacherSpec(name="a", model=model)
    split = changed(whole, tensor_parallel=2)
    split_up, undivided = (
        loaded_teacher_fingerprint(spec, "t", precision="bf16") for spec in (split, whole)
    )
    assert split_up == undivided
    job, other = job_of(), job_of("teachers.a.tensor_parallel=2")
    assert other != job
    assert student_fingerprint("alone", other, teachers) == student_fingerprint(
        "alone", job, teachers
    )


def with_distillation(job: JobSpec, **changes: Any) -> JobSpec:
    return job.model_copy(update={"distillation": changed(job.distillation, **changes)})


@pytest.mark.parametrize("key", [*DISTILLATION_MATTERS, *DISTILLATION_FREE])
def test_the_loss_is_part_of_the_students(
    key: str, job_of: Callable[..., JobSpec], teachers: list[tuple[str, Path]]
) -> None:
    value = {**DISTILLATION_MATTERS, **DISTILLATION_FREE}[key]
    before = student_fingerprint("alone", job_of(), teachers)
    after = student_fingerprint("alone", with_distillation(job_of(), **{key: value}), teachers)
    assert (before != after) == (key in DISTILLATION_MATTERS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"divergence": {"kind": "jensen_shannon"}}, {"divergence": {"kind": "forward_kl"}}),
        (
            {"divergence": {"kind": "jensen_shannon", "beta": 0.4}},
            {"divergence": {"kind": "jensen_shannon"}},
        ),
        ({"alpha": {"start": 0.4, "end": 0.4}}, {"alpha": {"start": 0.4, "end": 0.5}}),
        ({"temperature": {"start": 1.0, "end": 2.0}}, {"temperature": 1.0}),
    ],
)
def test_the_parts_of_an_objective_matter_too(
    one: dict[str, Any],
    other: dict[str, Any],
    job_of: Callable[..., JobSpec],
    teachers: list[tuple[str, Path]],
) -> None:
    def of(changes: dict[str, Any]) -> str:
        spec = DistillationSpec.model_validate(changes)
        job = job_of().model_copy(update={"distillation": spec})
        return student_fingerprint("alone", job, teachers)

    assert of(one) != of(other)


def test_at_their_neutral_values_later_options_are_not_there() -> None:
    """What was made before they came still stands: the JSON that is hashed is the same."""
    plain = fingerprints._plain(TRAINING) | fingerprints._loss(DistillationSpec())
    assert {"z_loss", "unlabelled_tokens", "divergence", "hidden_matching"}.isdisjoint(plain)
    here = PretrainedModel(kind="pretrained", path="here")
    assert fingerprints._plain(here, exclude={"attention"}).keys() == {"kind", "path"}
    assert plain["alpha"] == 0.5
    assert plain["temperature"] == 2.0


def test_the_top_k_are_other_targets(
    job_of: Callable[..., JobSpec], teachers: list[tuple[str, Path]]
) -> None:
    def of(**changes: Any) -> str:
        return student_fingerprint("alone", with_distillation(job_of(), **changes), teachers)

    few, many = (of(cache="topk", cache_top_k=k) for k in (8, 16))
    assert len({few, many, of(cache="hidden")}) == 3
    assert of(cache="topk", cache_top_k=8, cache_tier="host") == few


def test_teachers_are_part_of_the_students(
    job_of: Callable[..., JobSpec], teachers: list[tuple[str, Path]], tmp_path: Path
) -> None:
    moved = [(name, shutil.copytree(path, tmp_path / "moved" / name)) for name, path in teachers]
    other = saved_model(tmp_path / "other", fill=3.0)
    (a, path_a), (b, _) = teachers
    before = student_fingerprint("alone", job_of(), teachers)
    assert student_fingerprint("alone", job_of(), moved) == before
    different = [
        student_fingerprint("another student", job_of(), teachers),
        student_fingerprint("alone", job_of("teachers.a.weight=2"), teachers),
        student_fingerprint("alone", job_of("teachers.b.weight=2"), teachers),
        student_fingerprint("alone", job_of(), [(a, path_a), (b, other)]),
        student_fingerprint("alone", job_of(), [(a, path_a)]),
    ]
    for one, two in itertools.combinations([before, *different], 2):
        assert one != two


# -- evaluations -----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path: Path, job_of: Callable[..., JobSpec]) -> Callable[..., str]:
    """The fingerprint of an evaluation, changed by keywords."""
    model = saved_model(tmp_path / "model")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "task.jsonl").write_text(json.dumps({"sentence_good": "a", "sentence_bad": "b"}))

    def make(*overrides: str, **changes: Any) -> str:
        values = {"model_dir": model, "tokens_key": "t", "pairs_dir": pairs, **changes}
        return evaluation_fingerprint(
            values["model_dir"],
            job_of(*overrides),
            values["tokens_key"],
            values["pairs_dir"],
            teacher=values.get("teacher", False),
        )

    return make


@pytest.mark.parametrize(
    "override",
    [
        *(f"evaluation.{key}={json.dumps(value)}" for key, value in EVALUATION_MATTERS.items()),
        "windows.length=32",
        "windows.attention=document",
    ],
)
def test_what_changes_a_measurement(override: str, evaluated: Callable[..., str]) -> None:
    assert evaluated(override) != evaluated()


@pytest.mark.parametrize(
    "override", ["evaluation.batch_tokens=100", "seed=5", "student.training.epochs=2", "name=two"]
)
def test_what_does_not_change_a_measurement(override: str, evaluated: Callable[..., str]) -> None:
    assert evaluated(override) == evaluated()


def test_an_evaluation_without_samples_is_the_one_from_before_there_were_any() -> None:
    assert EvaluationSpec().samples == 0
    assert "samples" not in fingerprints._plain(EvaluationSpec())
    assert fingerprints._plain(EvaluationSpec(samples=1))["samples"] == 1


def test_weights_text_and_benchmarks_are_known_by_content(
    evaluated: Callable[..., str], tmp_path: Path
) -> None:
    before = evaluated()
    assert evaluated(model_dir=saved_model(tmp_path / "other", fill=1.0)) != before
    assert evaluated(model_dir=saved_model(tmp_path / "config", config='{"a": 1}')) != before
    assert evaluated(tokens_key="u") != before
    assert evaluated(pairs_dir=None) != before
    moved = shutil.copytree(tmp_path / "pairs", tmp_path / "moved")
    assert evaluated(pairs_dir=moved) == before
    with_more = [
        evaluated(f"evaluation.minimal_pairs=[{{name: {name}, path: {moved}}}]")
        for name in ("more", "others")
    ]
    assert len({before, *with_more}) == 3
    (moved / "task.jsonl").write_text("{}")
    assert evaluated(pairs_dir=moved) != before
    assert evaluated(f"evaluation.minimal_pairs=[{{name: more, path: {moved}}}]") != with_more[0]


def test_suites_are_known_by_their_settings_and_files(
    evaluated: Callable[..., str], tmp_path: Path
) -> None:
    """Every field of a suite matters but the two that are about where and for whom."""

    def suite(folder: str = "suite", **fields: Any) -> str:
        spec = {"name": "toy", "path": str(tmp_path / folder), **fields}
        return f"evaluation.fine_tuning=[{json.dumps(spec)}]"

    for folder in ("suite", "moved"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.train.jsonl").write_text("{}")
    before = evaluated(suite())
    assert evaluated() != before
    assert evaluated(suite("moved")) == before
    assert evaluated(suite(teachers=False)) == before
    assert evaluated(suite(teachers=False), teacher=True) == evaluated()
    assert evaluated(suite(), teacher=True) == before
    matter = {
        "name": "other",
        "tasks": [{"name": "a"}],
        "seeds": 2,
        "learning_rate": 1e-3,
        "batch_size": 3,
        "epochs": 3,
        "patience": None,
        "max_tokens": 3,
        "max_train_examples": 3,
        "max_examples": 3,
    }
    assert {*matter, "path", "teachers"} == set(FineTuning.model_fields)
    assert len({before, *(evaluated(suite(**{key: value})) for key, value in matter.items())}) == 11
    (tmp_path / "suite" / "a.train.jsonl").write_text('{"more": 1}')
    assert evaluated(suite()) != before


def test_an_evaluation_that_says_more_is_made_anew(
    evaluated: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluated()
    monkeypatch.setattr(fingerprints, "MEASUREMENT", fingerprints.MEASUREMENT + 1)
    assert evaluated() != before
