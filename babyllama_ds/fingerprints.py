"""What a stage's result depends on, hashed: the same fingerprint, the same result.

Never in a fingerprint: rank count, micro-batch, logging, paths, device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from babyllama_ds import files
from babyllama_ds.errors import ModelError
from babyllama_ds.hub import commit_of
from babyllama_ds.spec.base import Spec
from babyllama_ds.spec.corpus import WindowsSpec
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.evaluation import EvaluationSpec, FineTuning
from babyllama_ds.spec.job import JobSpec, TeacherSpec
from babyllama_ds.spec.models import LlamaModel, ModelSpec, PretrainedModel
from babyllama_ds.spec.training import TrainingSpec

METHOD = 4
"""Raised when a change of the code changes what the same job gives."""

MEASUREMENT = 2
"""Raised when an evaluation says more of a model, or something else, so that it is made anew."""

FINE_TUNING = 1
"""Raised when a change of the code changes what a fine-tuning comes to."""

HOW_IT_RUNS = {
    "micro_batch",
    "gradient_checkpointing",
    "log_every_steps",
    "profile_steps",
    "checkpoint_every_steps",
}

HOW_TARGETS_ARE_HAD = {"chunk_tokens", "cache", "cache_tier", "cache_kept", "cache_top_k"}
"""Of the loss, what does not change what it is of; a top-k cache does, and is named apart."""

MEASURED_APART = {"batch_tokens", "minimal_pairs", "fine_tuning", "milestones"}
"""Of an evaluation, what changes nothing of a model's measurement, or is named apart."""

NEUTRAL: dict[type[Spec], dict[str, Any]] = {
    TrainingSpec: {
        "z_loss": None,
        "unlabelled_tokens": [],
        "early_stopping": None,
        "max_minutes": None,
        "muon": None,
        "ema": None,
    },
    LlamaModel: {"attention_dropout": 0.0},
    PretrainedModel: {"revision": None, "dropout": None, "attention_dropout": None},
    WindowsSpec: {"attention": "window", "order": "seeded"},
    DistillationSpec: {"divergence": {"kind": "forward_kl"}, "hidden_matching": None},
    EvaluationSpec: {"prefix": "none", "samples": 0},
}
"""Options that came after METHOD was last raised, with the (JSON) value at which nothing is changed
by them: there they are left out, so that what was made before still stands."""


def trained_fingerprint(
    model: ModelSpec,
    training: TrainingSpec,
    *,
    tokens_key: str,
    windows: WindowsSpec,
    seed: int,
    precision: str,
) -> str:
    """The fingerprint of a model trained here without teachers."""
    return files.hash_json(
        {
            "method": METHOD,
            "model": _model(model),
            "training": _plain(training, exclude=HOW_IT_RUNS),
            "tokens": tokens_key,
            "windows": _plain(windows),
            "seed": seed,
            "precision": precision,
        }
    )


def student_fingerprint(alone: str, job: JobSpec, teachers: list[tuple[str, Path]]) -> str:
    """That of the distilled model: its own without teachers, the teachers, and the loss."""
    weights = {spec.name: spec.weight for spec in job.teachers}
    return files.hash_json(
        {
            "alone": alone,
            "teachers": [
                [weights[name], sorted(weight_hashes(path).values())] for name, path in teachers
            ],
            "distillation": _loss(job.distillation),
        }
    )


def _loss(spec: DistillationSpec) -> dict[str, Any]:
    """The loss, and the targets where they are not the teachers' own.

    The `hidden` cache is left out, as the micro-batch is: it gives what the live teachers give, or
    what they would give in another micro-batch.
    """
    plain = _plain(spec, exclude=HOW_TARGETS_ARE_HAD)
    return plain | ({"top_k": spec.cache_top_k} if spec.cache == "topk" else {})


def loaded_teacher_fingerprint(spec: TeacherSpec, tokenizer_key: str, *, precision: str) -> str:
    """That of a teacher taken in as it is, its weights rounded to the job's precision."""
    return files.hash_json(
        {
            "method": METHOD,
            "model": _model(spec.model),
            "tokenizer": tokenizer_key,
            "precision": precision,
        }
    )


def evaluation_fingerprint(
    model_dir: Path, job: JobSpec, tokens_key: str, pairs_dir: Path | None, *, teacher: bool
) -> str:
    """Of the measurements of a model, which is a `teacher` or not: its weights, the text, the
    benchmarks' files."""
    benchmarks = [(pairs.name, Path(pairs.path)) for pairs in job.evaluation.minimal_pairs]
    if pairs_dir is not None:
        benchmarks.append(("nursery", pairs_dir))
    return measured_fingerprint(
        model_hashes(model_dir),
        tokens=tokens_key,
        length=job.windows.length,
        settings=_plain(job.evaluation, exclude=MEASURED_APART) | _attention(job.windows),
        benchmarks=benchmarks,
        suites=job.evaluation.suites_of(teacher=teacher),
    )


def measured_fingerprint(
    model: Mapping[str, str],
    *,
    tokens: str | None,
    length: int | None,
    settings: Mapping[str, Any],
    benchmarks: Sequence[tuple[str, Path]],
    suites: Sequence[FineTuning] = (),
) -> str:
    """Of what is measured of a model (`model_hashes`) on text of which `tokens` is the key (none:
    no text) and on the files of benchmarks and suites, which are known by their names and
    contents."""
    fine_tuning = [
        [
            FINE_TUNING,
            _plain(suite, exclude={"path", "teachers"}),
            _hashes(Path(suite.path), "*.jsonl"),
        ]
        for suite in suites
    ]
    return files.hash_json(
        {
            "method": METHOD,
            "measurement": MEASUREMENT,
            "weights": model,
            "tokens": tokens,
            "length": length,
            "evaluation": settings,
            "pairs": [[name, _hashes(folder, "*.jsonl")] for name, folder in benchmarks],
        }
        | ({"fine_tuning": fine_tuning} if fine_tuning else {})
    )


def classifier_fingerprint(model: Mapping[str, str], training: str, tokenizer_key: str) -> str:
    """Of a classifier that a model (`model_hashes`) is fine-tuned to; `training` is that of the
    task, its settings and the seed."""
    return files.hash_json(
        {
            "method": [METHOD, FINE_TUNING],
            "weights": model,
            "training": training,
            "tokenizer": tokenizer_key,
        }
    )


def _attention(windows: WindowsSpec) -> dict[str, Any]:
    """Of a measurement's windows nothing matters but their length and this."""
    return {key: value for key, value in _plain(windows).items() if key == "attention"}


def model_hashes(model_dir: Path) -> dict[str, str]:
    """SHA-256 of a model directory's weight files and of its `config.json`: the same weights under
    another configuration are another model."""
    return weight_hashes(model_dir) | _hashes(model_dir, "config.json")


def weight_hashes(model_dir: Path) -> dict[str, str]:
    """SHA-256 of a model directory's weight files; from its manifest where it has one, as what a
    run or the store holds, to which nobody else writes."""
    manifest = files.read_manifest(model_dir)
    if manifest is not None:
        return {
            name: facts.sha256
            for name, facts in manifest.files.items()
            if name.endswith(".safetensors")
        }
    return _hashes(model_dir, "*.safetensors")


def hashes_now(model_dir: Path) -> dict[str, str]:
    """As `model_hashes`, of a directory that a user names: of its files as they are.

    It may be an export of ours that was trained further. Its manifest then still tells of the
    weights that were written over.
    """
    return _hashes(model_dir, "*.safetensors") | _hashes(model_dir, "config.json")


def _hashes(directory: Path, pattern: str) -> dict[str, str]:
    return {path.name: files.sha256_file(path) for path in sorted(directory.glob(pattern))}


def _plain(spec: Spec, *, exclude: Set[str] = frozenset()) -> dict[str, Any]:
    """The values of a part that change a result."""
    neutral = NEUTRAL.get(type(spec), {})
    plain: dict[str, Any] = spec.model_dump(mode="json", exclude=set(exclude))
    return {key: v for key, v in plain.items() if key not in neutral or v != neutral[key]}


def _model(spec: ModelSpec) -> dict[str, Any]:
    plain = _plain(spec, exclude={"attention"})
    if isinstance(spec, PretrainedModel):
        plain["path"] = _pretrained_content(spec.path, plain.pop("revision", None))
    return plain


def _pretrained_content(path: str, revision: str | None) -> dict[str, str]:
    """A local directory by the content of its weights; a hub id by its commit."""
    commit = commit_of(path, revision, where=path, what="a model")
    if commit is not None:
        return {"hub": path, "commit": commit}
    if not any(Path(path).glob("*.safetensors")):
        raise ModelError.of(
            path,
            got="a directory without *.safetensors",
            expected="a model saved as safetensors",
            hint="save it again with `save_pretrained(..., safe_serialization=True)`",
        )
    return hashes_now(Path(path))
