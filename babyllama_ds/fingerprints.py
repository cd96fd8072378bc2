"""What a stage's result depends on, hashed: the same fingerprint, the same result.

Never in a fingerprint: rank count, micro-batch, logging, paths, device.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from babyllama_ds import files
from babyllama_ds.errors import ModelError
from babyllama_ds.spec.base import Spec
from babyllama_ds.spec.corpus import WindowsSpec
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.evaluation import EvaluationSpec
from babyllama_ds.spec.job import JobSpec, TeacherSpec
from babyllama_ds.spec.models import ModelSpec, PretrainedModel
from babyllama_ds.spec.training import TrainingSpec

METHOD = 3
"""Raised when a change of the code changes what the same job gives."""

HOW_IT_RUNS = {"micro_batch", "log_every_steps", "profile_steps", "checkpoint_every_steps"}

NEUTRAL: dict[type[Spec], dict[str, Any]] = {EvaluationSpec: {"samples": 0}}
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
    """Of a model trained here without teachers."""
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
    """Of the distilled model: what it would be without teachers, the teachers, and the loss."""
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
    plain = _plain(spec, exclude={"chunk_tokens", "cache", "cache_tier", "cache_top_k"})
    return plain | ({"top_k": spec.cache_top_k} if spec.cache == "topk" else {})


def loaded_teacher_fingerprint(spec: TeacherSpec, tokenizer_key: str) -> str:
    """Of a teacher taken in as it is."""
    return files.hash_json(
        {"method": METHOD, "model": _model(spec.model), "tokenizer": tokenizer_key}
    )


def evaluation_fingerprint(
    model_dir: Path, job: JobSpec, tokens_key: str, pairs_dir: Path | None
) -> str:
    """Of a model's measurements: its weights, the text, the benchmarks' files."""
    folders = [Path(pairs.path) for pairs in job.evaluation.minimal_pairs]
    if pairs_dir is not None:
        folders.append(pairs_dir)
    return files.hash_json(
        {
            "method": METHOD,
            "weights": weight_hashes(model_dir),
            "tokens": tokens_key,
            "length": job.windows.length,
            "evaluation": _plain(job.evaluation, exclude={"batch_tokens", "minimal_pairs"}),
            "pairs": [
                [
                    name,
                    {path.name: files.sha256_file(path) for path in sorted(folder.glob("*.jsonl"))},
                ]
                for name, folder in zip(
                    [*(pairs.name for pairs in job.evaluation.minimal_pairs), "nursery"],
                    folders,
                    strict=False,
                )
            ],
        }
    )


def weight_hashes(model_dir: Path) -> dict[str, str]:
    """SHA-256 of a model directory's weight files; from its manifest where it has one."""
    manifest = files.read_manifest(model_dir)
    if manifest is not None:
        return {
            name: facts.sha256
            for name, facts in manifest.files.items()
            if name.endswith(".safetensors")
        }
    return {path.name: files.sha256_file(path) for path in sorted(model_dir.glob("*.safetensors"))}


def _plain(spec: Spec, *, exclude: Set[str] = frozenset()) -> dict[str, Any]:
    """The values of a part that change a result."""
    neutral = NEUTRAL.get(type(spec), {})
    plain: dict[str, Any] = spec.model_dump(mode="json", exclude=set(exclude))
    return {key: v for key, v in plain.items() if key not in neutral or v != neutral[key]}


def _model(spec: ModelSpec) -> dict[str, Any]:
    plain = _plain(spec, exclude={"attention"})
    if isinstance(spec, PretrainedModel):
        plain["path"] = _pretrained_content(spec.path)
    return plain


def _pretrained_content(path: str) -> dict[str, str] | str:
    """A local directory by the content of its weights; a hub id by its name."""
    if not Path(path).is_dir():
        return path
    hashes = weight_hashes(Path(path))
    if not hashes:
        raise ModelError.of(
            path,
            got="a directory without *.safetensors",
            expected="a model saved as safetensors",
            hint="save it again with `save_pretrained(..., safe_serialization=True)`",
        )
    config = Path(path) / "config.json"
    if config.exists():
        hashes["config.json"] = files.sha256_file(config)
    return hashes
