"""Every shipped job loads, resolves, divides among two ranks, and describes models that build."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from babyllama_ds.errors import JobError
from babyllama_ds.spec.deepspeed import accumulation_steps, deepspeed_config
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.models import ModelSpec, PretrainedModel
from babyllama_ds.spec.resolved import dump_job
from babyllama_ds.spec.shipped import find_job, shipped_names
from babyllama_ds.spec.training import TrainingSpec

FOLDER = Path(__file__).parents[2] / "launcher" / "jobs"
NAMES = shipped_names("jobs")
ENVIRON = {"BABYLM_DATA": "/data/babylm"}


def load(name: str, *overrides: str) -> JobSpec:
    return load_job(find_job(name), overrides, environ=ENVIRON)


def stages(job: JobSpec) -> Iterator[tuple[str, ModelSpec, TrainingSpec | None]]:
    for teacher in job.teachers:
        yield f"teachers.{teacher.name}.training", teacher.model, teacher.training
    yield "student.training", job.student.model, job.student.training
    if job.control is not None:
        training = job.control.training or job.student.training
        yield "control.training", job.student.model, training


def test_the_jobs_are_those_of_the_launchers_folder() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == NAMES
    assert {"nursery", "babylm_tiny", "babyllama", "babyllama2"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_found_by_name_and_by_path(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = (FOLDER / f"{name}.yaml").resolve()
    for text in (name, f"{name}.yaml", str(path)):
        assert find_job(text).resolve() == path


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_is_read_back_equal(name: str, tmp_path: Path) -> None:
    job = load(name)
    assert job.run_name.startswith(name)
    resolved = tmp_path / "job.yaml"
    resolved.write_text(dump_job(job))
    assert load_job(resolved, environ={}) == job


@pytest.mark.parametrize("name", NAMES)
def test_each_seed_has_its_own_run(name: str) -> None:
    assert load(name, "seed=1").run_name != load(name, "seed=2").run_name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_has_a_deepspeed_configuration(name: str, ranks: int, device: str) -> None:
    job = load(name)
    for where, _, training in stages(job):
        if training is not None:
            config = deepspeed_config(job, training, device=device, ranks=ranks, where=where)
            assert config["train_batch_size"] == training.batch_windows
            micro = config["train_micro_batch_size_per_gpu"]
            steps = accumulation_steps(training, ranks, where=where)
            assert micro * steps * ranks == training.batch_windows


@pytest.mark.parametrize("name", NAMES)
def test_every_model_builds(name: str) -> None:
    """On the meta device: shapes without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from babyllama_ds.models.build import check_positions, model_config
    from babyllama_ds.models.sizes import Vocabulary

    job = load(name)
    size = getattr(job.tokenizer, "vocab_size", 1000)
    for where, spec, _ in stages(job):
        if not isinstance(spec, PretrainedModel):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(model_config(spec, Vocabulary(size)))
            check_positions(model, job.windows.length, where=where)
            assert model.get_output_embeddings().weight.shape == (size, spec.hidden_size)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_variable_is_named(name: str) -> None:
    if "${" not in (FOLDER / f"{name}.yaml").read_text():
        load_job(find_job(name), environ={})
        return
    with pytest.raises(JobError, match=r"BABYLM_DATA}, which is not set"):
        load_job(find_job(name), environ={})
