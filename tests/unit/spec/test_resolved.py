"""What `dump_job` writes, `load_job` reads back: the same job, every default spelled out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.resolved import dump_job, read_values

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
COUNTS = st.integers(1, 10**9)
# Any text that UTF-8 can hold; control characters are quoted and escaped.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "batch_windows": draw(COUNTS),
        "epochs": draw(st.floats(0, 10**9, exclude_min=True) | st.integers(1, 9)),
        "learning_rate": draw(POSITIVE),
        "schedule": draw(st.sampled_from(["cosine", "linear"])),
        "clip_norm": draw(st.none() | POSITIVE),
        "betas": [draw(st.floats(0, 1, exclude_max=True)), 0.999],
        "keep": draw(st.sampled_from(["best", "last"])),
    }


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    llama = {"kind": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    corpora = st.one_of(
        st.just({"kind": "nursery"}),
        st.fixed_dictionaries(
            {
                "kind": st.just("files"),
                "train": st.lists(TEXTS, min_size=1, max_size=3),
                "split": st.just({"kind": "tail"})
                | st.fixed_dictionaries(
                    {"kind": st.just("held_out"), "dev": st.lists(TEXTS, min_size=1, max_size=2)}
                ),
            }
        ),
    )
    data = {
        "name": draw(NAMES.filter(lambda name: name != "store"))
        + draw(st.sampled_from(["", "{seed}"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "corpus": draw(corpora),
        "tokenizer": draw(
            st.sampled_from([{"kind": "bpe"}, {"kind": "pretrained", "path": "a b"}])
        ),
        "teachers": [
            {
                "name": f"t-{number}",
                "model": {"kind": "pretrained", "path": draw(TEXTS)},
                "training": draw(st.none() | trainings()),
                "weight": draw(POSITIVE),
            }
            for number in range(draw(st.integers(1, 2)))
        ],
        "student": {
            "model": {
                **llama,
                "intermediate_size": draw(COUNTS),
                "tied_embeddings": draw(st.booleans()),
            },
            "training": draw(trainings()),
        },
        "control": draw(st.sampled_from([None, {}])),
        "deepspeed": {"config": draw(TEXTS)},
    }
    return JobSpec.model_validate_json(json.dumps(data))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(job=jobs())
def test_a_job_survives_the_round_trip(job: JobSpec, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(job), encoding="utf-8")
    assert load_job(path, environ={}) == job


@given(text=TEXTS)
@example(text="yes")
@example(text="3e-4")
@example(text="1_000")
@example(text="12:30")
@example(text="2024-01-31")
@example(text="0x1F")
@example(text="null")
@example(text="~")
@example(text="<<")
@example(text="${HOME}/$x$$")
@example(text="# no comment")
@example(text="\x85")
@example(text=" spaces \n lines \t")
@example(text="\x85\u2028\ufeff")
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives(text: str, tmp_path: Path) -> None:
    job = small_job(deepspeed={"config": text})
    path = tmp_path / "job.yaml"
    path.write_bytes(dump_job(job).encode())
    assert load_job(path, environ={}).deepspeed.config == text
    assert read_values(path.read_bytes().decode()) == job.model_dump(mode="json")


def small_job(**changes: Any) -> JobSpec:
    training = {"batch_windows": 4, "epochs": 1, "learning_rate": 1e-3}
    data = {
        "name": "small",
        "corpus": {"kind": "nursery"},
        "tokenizer": {"kind": "bpe"},
        "teachers": [
            {"name": name, "model": {"kind": "pretrained", "path": "x"}, "training": training}
            for name in ("one", "two")
        ],
        "student": {"model": {"kind": "pretrained", "path": "x"}, "training": training},
        **changes,
    }
    return JobSpec.model_validate_json(json.dumps(data))


def test_every_default_is_spelled_out_and_nothing_is_an_alias() -> None:
    text = dump_job(small_job())
    data = yaml.safe_load(text)
    assert "&" not in text
    assert data["teachers"][1]["training"]["clip_norm"] == 1.0
    assert data["distillation"] == {
        "alpha": 0.5,
        "temperature": 2.0,
        "divergence": {"kind": "forward_kl"},
        "hidden_matching": None,
        "soft_reduction": "sequence",
        "mean_of": "logits",
        "chunk_tokens": None,
        "cache": "none",
        "cache_tier": "auto",
        "cache_kept": True,
        "cache_top_k": 64,
    }
    assert list(data) == list(JobSpec.model_fields)


@pytest.mark.parametrize("text", ["yes", "3e-4", "1_000", "2024-01-31", "0o7", "null", "1:30"])
def test_other_yaml_readers_see_text_as_text(text: str) -> None:
    dumped = dump_job(small_job(deepspeed={"config": text}))
    assert yaml.safe_load(dumped)["deepspeed"]["config"] == text
