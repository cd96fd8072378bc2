"""A run can be made again, and says of itself all that one needs for it.

The tiny job, finished by the launcher, once more on as many ranks with a folder of runs of its own:
nothing that the first run made is there to be found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.corpus.tokenizer import load_tokenizer, vocabulary_hash
from babyllama_ds.files import hash_json, sha256_file

pytestmark = pytest.mark.launch

MODELS = ("student", "control", "teachers/gpt2", "teachers/llama")


@pytest.fixture(scope="module")
def made_again(once: Any, finished: Any, run_ranks: Callable[..., Any]) -> Any:
    """The same job file; only its runs lie elsewhere."""

    def make(scene: Any) -> list[Any]:
        return [run_ranks(finished.job, "--runs", scene.runs)]

    scene = once("made_again", make)
    scene.ended[0].assert_done()
    assert "done before" not in scene.ended[0].err
    return scene


def read(scene: Any, name: str) -> dict[str, Any]:
    return dict(json.loads((scene.run_dir / name).read_text()))


# -- made again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_two_runs_of_one_job_give_the_same_weights(
    finished: Any, made_again: Any, model: str
) -> None:
    first, second = (
        sha256_file(scene.run_dir / model / "model.safetensors") for scene in (finished, made_again)
    )
    assert first == second


def test_hashes_tell_models_apart(finished: Any) -> None:
    found = {sha256_file(finished.run_dir / model / "model.safetensors") for model in MODELS}
    assert len(found) == len(MODELS)


def test_two_runs_of_one_job_name_the_same_origin(finished: Any, made_again: Any) -> None:
    first, second = (read(scene, "report/report.json") for scene in (finished, made_again))
    assert first["job_sha256"] == second["job_sha256"]
    for report in (first, second):
        del report["environment"]["matmul_rate"]  # measured anew in each run
    assert first["environment"] == second["environment"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        hashes = {sha256_file(s.run_dir / "tokenizer" / name) for s in (finished, made_again)}
        assert len(hashes) == 1


# -- what is named --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def origin(finished: Any) -> dict[str, str]:
    """What there is to be named, each from where it is made and not from the report."""
    import deepspeed
    import torch
    import transformers
    import yaml

    from babyllama_ds.environment import describe_environment
    from babyllama_ds.spec.loading import load_job

    job = load_job(finished.job, [])
    machine = describe_environment(torch.device("cpu"))
    resolved = yaml.safe_load((finished.run_dir / "job.yaml").read_text())
    return {
        "resolved job": hash_json(resolved),
        "data": (finished.run_dir / "tokens").resolve().name,
        "tokenizer": (finished.run_dir / "tokenizer").resolve().name,
        "seed": str(job.stage_seed("student")),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "processor": machine["hardware"]["host_cpu"],
    }


@pytest.mark.parametrize(
    "name", ["report/report.json", "report/report.md", "student/README.md", "control/README.md"]
)
def test_reports_and_cards_name_where_a_model_comes_from(
    finished: Any, origin: dict[str, str], name: str
) -> None:
    text = (finished.run_dir / name).read_text()
    assert [what for what, value in origin.items() if value not in text] == []
    commit = read(finished, "environment.json")["commit"]  # none outside of a checkout
    assert "commit" in text
    assert commit is None or commit in text


def test_the_hashes_are_of_what_the_run_holds(finished: Any) -> None:
    kept = read(finished, "environment.json")["fingerprints"]
    tokenizer = load_tokenizer(str(finished.run_dir / "tokenizer"))
    assert kept["vocabulary"] == vocabulary_hash(tokenizer)
    for kind, name in (("tokenizer", "tokenizer"), ("tokens", "tokens")):
        manifest = Path(finished.run_dir / name) / "manifest.json"
        assert kept[kind] == json.loads(manifest.read_text())["fingerprint"]
