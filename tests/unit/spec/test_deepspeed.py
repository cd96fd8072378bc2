"""The DeepSpeed dict: one owner per number, in words that DeepSpeed takes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama_ds.errors import JobError
from babyllama_ds.spec.base import divisors
from babyllama_ds.spec.deepspeed import (
    accumulation_steps,
    deepspeed_config,
    micro_batch,
    offloads,
    precision,
)
from babyllama_ds.spec.deepspeed_file import read_config
from babyllama_ds.spec.job import DeepSpeedSpec, JobSpec
from babyllama_ds.spec.shipped import shipped_names
from babyllama_ds.spec.training import Muon, TrainingSpec


def training(**changes: Any) -> TrainingSpec:
    return TrainingSpec(**{"batch_windows": 24, "epochs": 1.0, "learning_rate": 1e-3, **changes})


def job(**deepspeed: Any) -> JobSpec:
    model = {"kind": "pretrained", "path": "x"}
    data = {
        "name": "small",
        "corpus": {"kind": "nursery"},
        "tokenizer": {"kind": "bpe"},
        "teachers": [{"name": "one", "model": model}],
        "student": {"model": model, "training": training().model_dump(mode="json")},
        "deepspeed": deepspeed,
    }
    return JobSpec.model_validate_json(json.dumps(data))


def machinery() -> dict[str, Any]:
    return read_config(DeepSpeedSpec(), "cpu")


def offloading() -> dict[str, Any]:
    config = machinery()
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


# -- the merged dict -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_names("ds_configs"))
@pytest.mark.parametrize("ranks", [1, 2])
def test_shipped_files_become_what_deepspeed_accepts(name: str, ranks: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = deepspeed_config(job(config=name), training(micro_batch=6), device="cpu", ranks=ranks)
    parsed = DeepSpeedConfig({**config, "train_batch_size": 24 // ranks})  # alone, it sees one rank
    assert parsed.train_micro_batch_size_per_gpu == 6
    assert parsed.gradient_accumulation_steps == 24 // 6 // ranks
    assert parsed.gradient_clipping == 1.0
    assert parsed.zero_optimization_stage == 2
    assert parsed.zero_config.overlap_comm is False
    assert parsed.optimizer_name is None
    assert parsed.scheduler_name is None
    assert parsed.steps_per_print is None
    assert not parsed.wall_clock_breakdown
    assert not parsed.timers_config.enabled
    assert parsed.grad_accum_dtype == "fp32"
    assert str(parsed.communication_data_type) == "torch.float32"
    assert parsed.bfloat16_config.enabled == (precision(config) == "bf16") == ("fp32" not in name)


def test_the_numbers_are_the_jobs() -> None:
    config = deepspeed_config(
        job(), training(batch_windows=48, micro_batch=4, clip_norm=0.5), device="cpu", ranks=2
    )
    assert config["train_batch_size"] == 48
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 6
    assert config["gradient_clipping"] == 0.5


def test_no_clipping_is_said_in_deepspeeds_words() -> None:
    config = deepspeed_config(job(), training(clip_norm=None), device="cpu", ranks=1)
    assert config["gradient_clipping"] == 0.0  # absent would mean 1.0


def test_auto_takes_the_devices_file() -> None:
    cpu = deepspeed_config(job(), training(), device="cpu", ranks=1)
    cuda = deepspeed_config(job(), training(), device="cuda", ranks=1)
    assert (
        cpu["zero_optimization"]
        == read_config(DeepSpeedSpec(config="zero2_cpu"), "cuda")["zero_optimization"]
    )
    assert (
        cuda["zero_optimization"]
        == read_config(DeepSpeedSpec(config="zero2_cuda"), "cpu")["zero_optimization"]
    )
    assert cpu["zero_optimization"] != cuda["zero_optimization"]


def test_a_base_is_checked_and_left_alone() -> None:
    base = {**machinery(), "wall_clock_breakdown": True}
    before = copy.deepcopy(base)
    config = deepspeed_config(job(), training(), device="cpu", ranks=1, base=base)
    assert base == before
    assert config["wall_clock_breakdown"] is True  # asked for, so not quieted
    with pytest.raises(JobError):
        deepspeed_config(job(), training(), device="cpu", ranks=1, base={"zero_optimization": 2})


def test_precision() -> None:
    config = machinery()
    assert precision(config) == "bf16"
    assert precision({**config, "bf16": {"enabled": False}}) == "fp32"
    del config["bf16"]
    assert precision(config) == "fp32"


def test_an_offloaded_optimizer_is_torchs() -> None:
    """DeepSpeed would otherwise insist on its own, which it has to compile."""
    base = offloading()
    config = deepspeed_config(job(), training(), device="cpu", ranks=1, base=base)
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert offloads(config)
    plain = deepspeed_config(job(), training(), device="cpu", ranks=1, base=machinery())
    assert "zero_force_ds_cpu_optimizer" not in plain
    assert not offloads(plain)


def test_muon_is_not_offloaded() -> None:
    base = offloading()
    spec = training(muon=Muon())
    deepspeed_config(job(), spec, device="cpu", ranks=1, base=machinery())
    with pytest.raises(JobError) as caught:
        deepspeed_config(job(), spec, device="cpu", ranks=1, base=base, where="teachers.a.training")
    (problem,) = caught.value.problems
    assert problem.where == "teachers.a.training.muon"
    assert problem.got == "Muon with an optimizer that is offloaded"


# -- batch arithmetic ----------------------------------------------------------------------------


@given(ranks=st.integers(1, 9), micro=st.integers(1, 9), steps=st.integers(1, 9))
def test_batches_multiply_out(ranks: int, micro: int, steps: int) -> None:
    spec = training(batch_windows=ranks * micro * steps, micro_batch=micro)
    assert accumulation_steps(spec, ranks) == steps
    assert micro_batch(spec, ranks) == micro
    whole = training(batch_windows=ranks * micro * steps)
    assert accumulation_steps(whole, ranks) == 1
    assert micro_batch(whole, ranks) == micro * steps


@given(number=st.integers(1, 2_000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "got", "expected", "hint"),
    [
        (24, None, 5, "24 windows for 5 ranks", "a multiple of 5", "20 or 25 would do"),
        (3, None, 4, "3 windows for 4 ranks", "a multiple of 4", "4 would do"),
        (24, 8, 2, "24 windows for 2 ranks with micro_batch 8", "a multiple of 2 × 8 = 16",
         "batch_windows 16 or 32 would do, or micro_batch 6 or 12"),
        (8, 8, 2, "8 windows for 2 ranks with micro_batch 8", "a multiple of 2 × 8 = 16",
         "batch_windows 16 would do, or micro_batch 4"),
        (10**12, 10**12, 2, "1000000000000 windows for 2 ranks with micro_batch 1000000000000",
         "a multiple of 2 × 1000000000000 = 2000000000000", "or micro_batch 500000000000"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [accumulation_steps, micro_batch])
def test_batches_that_do_not_divide(
    function: Any, batch: int, micro: int | None, ranks: int, got: str, expected: str, hint: str
) -> None:
    spec = training(batch_windows=batch, micro_batch=micro)
    with pytest.raises(JobError) as caught:
        function(spec, ranks, where="teachers[0].training")
    (problem,) = caught.value.problems
    assert problem.where == "teachers[0].training.batch_windows"
    assert (problem.got, problem.expected) == (got, expected)
    assert hint in (problem.hint or "")
