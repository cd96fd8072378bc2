"""Seeds, names, and validators seen from Python."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from babyllama_ds.spec.job import JobSpec, LlamaModel, derive_seed


def job(**changes: Any) -> JobSpec:
    training = {"batch_windows": 4, "epochs": 1, "learning_rate": 1e-3}
    model = {"kind": "pretrained", "path": "x"}
    data = {
        "name": "run-{seed}-a",
        "seed": 5,
        "corpus": {"kind": "nursery"},
        "tokenizer": {"kind": "bpe"},
        "teachers": [{"name": "one", "model": model}, {"name": "two", "model": model, "seed": 42}],
        "student": {"model": model, "training": training},
        **changes,
    }
    return JobSpec.model_validate_json(json.dumps(data))


def test_run_name_holds_the_seed() -> None:
    assert job().run_name == "run-5-a"


def test_stages_have_seeds_of_their_own_and_the_control_the_students() -> None:
    spec = job()
    assert spec.stage_seed("teachers/two") == 42
    assert spec.stage_seed("teachers/one") == derive_seed(5, "teachers/one")
    assert spec.stage_seed("control") == spec.stage_seed("student") == derive_seed(5, "student")
    assert spec.stage_seed("corpus") == derive_seed(5, "corpus")
    assert len({derive_seed(s, n) for s in range(50) for n in ("student", "corpus")}) == 100


def test_seeds_are_the_same_everywhere() -> None:
    # The first eight bytes of `printf 1/student | sha256sum`, less the last bit.
    assert derive_seed(1, "student") == 0x32B65B83B45FB5B7 >> 1


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValidationError):
        job().seed = 3  # type: ignore[misc]


def test_mismatches_read_well_without_a_file() -> None:
    with pytest.raises(ValidationError, match=r"hidden_size: got 10, expected a multiple of num_"):
        LlamaModel(kind="llama", hidden_size=10, num_layers=1, num_heads=3, intermediate_size=4)
