"""Remembered teachers make the same student: to the bit where the micro-batch has the same shape.

Two phases of offsets, so that windows come twice. The runs share a store, as a sweep does: the
teachers are trained by the first of them, and a cache is computed by the first that wants it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

STEPS = 24
BATCH = 24
TIMES = ("tokens_per_s", "flops_per_s", "mfu")  # what no two runs have in common
PHASES = {"length": 32, "offsets": {"phases": 2}}
ALONE = (f"student.training.micro_batch={BATCH // 2}",)  # the shape that each of two ranks has
FP32 = (
    "deepspeed.config=zero2_cpu_fp32",
    "distillation.soft_reduction=token",
    "student.training.learning_rate=2e-3",  # slow, so that rounding is not amplified
)
CASES = {
    # name: (ranks, overrides)
    "live": (2, ()),
    "hidden": (2, ("distillation.cache=hidden",)),
    "disk": (2, ("distillation.cache=hidden", "distillation.cache_tier=disk")),
    "alone-live": (1, ALONE),
    "alone-hidden": (1, (*ALONE, "distillation.cache=hidden")),
    "topk": (2, ("distillation.cache=topk", "distillation.cache_top_k=40")),
    "fp32-live": (1, FP32),
    "fp32-hidden": (
        2,
        (*FP32, "student.training.micro_batch=4", "distillation.cache=hidden"),
    ),
    "topk-again": (1, (*ALONE, "distillation.cache=topk", "distillation.cache_top_k=40")),
}


@pytest.fixture(scope="module")
def ran(
    once: Any,
    tiny_job: Callable[..., Path],
    run_ranks: Callable[..., Any],
    run_alone: Callable[..., Any],
) -> Any:
    def make(scene: Any) -> list[Any]:
        job = tiny_job(scene.folder, windows=PHASES, control=None)
        ended = []
        for name, (num_ranks, overrides) in CASES.items():
            words = (
                job,
                f"name={name}",
                "student.training.keep=last",
                f"student.training.batch_windows={BATCH}",
                *overrides,
                "--runs",
                scene.runs,
            )
            ended.append(run_ranks(*words) if num_ranks == 2 else run_alone("run", *words))
        return ended

    scene = once("cache", make)
    for ended in scene.ended:
        ended.assert_done()
    return scene


@pytest.fixture(scope="module")
def said(ran: Any) -> dict[str, str]:
    """What each run told."""
    return {name: ended.err for name, ended in zip(CASES, ran.ended, strict=True)}


def weights(ran: Any, name: str) -> bytes:
    path: Path = ran.runs / name / "student" / "model.safetensors"
    return path.read_bytes()


@pytest.mark.parametrize(
    ("live", "remembered"),
    [("live", "hidden"), ("live", "disk"), ("alone-live", "alone-hidden")],
)
def test_the_same_student_to_the_bit(
    ran: Any, live: str, remembered: str, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    def curve(name: str) -> list[dict[str, Any]]:
        lines = [line for line in metrics(ran.runs / name) if line["stage"] == "student"]
        return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]

    assert weights(ran, remembered) == weights(ran, live)
    assert curve(remembered) == curve(live)
    assert len([line for line in curve(live) if "loss" in line]) == STEPS


@pytest.mark.parametrize("key", ["loss", "ce", "kl", "grad_norm", "dev_ce"])
def test_ranks_and_micro_batches_are_no_part_of_the_mathematics(
    ran: Any, key: str, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """In fp32: two ranks that read what was computed in fours, one that has live teachers see 24
    windows at once."""

    def curve(name: str) -> list[float]:
        lines = metrics(ran.runs / name)
        return [line[key] for line in lines if line["stage"] == "student" and key in line]

    expected = curve("fp32-live")
    assert len(expected) == (3 if key == "dev_ce" else STEPS)
    # A KL is a small difference of log-probabilities, of which fp32 keeps 5e-7 each.
    tolerance = 1e-6 if key == "kl" else 0
    assert curve("fp32-hidden") == pytest.approx(expected, rel=1e-5, abs=tolerance)


def test_windows_did_come_again(ran: Any) -> None:
    """Each of the two phases was seen twice."""
    (layout, *_) = ran.runs.glob("store/teacher_cache/*/layout.json")
    num_windows = json.loads(layout.read_text())["num_windows"]
    assert 2 * num_windows <= STEPS * BATCH


def test_a_cache_is_computed_by_all_ranks_once_and_read_by_any_number(
    said: dict[str, str],
) -> None:
    computed = {name: re.findall(r"cache of (.+): computing", text) for name, text in said.items()}
    assert {name: caches for name, caches in computed.items() if caches} == {
        "hidden": ["teachers/gpt2", "teachers/llama"],
        "fp32-hidden": ["teachers/gpt2", "teachers/llama"],
        "topk": ["the ensemble"],
    }
    assert "read in files, mapped into memory" in said["disk"]
    assert "read in the host's memory" in said["hidden"]


def test_the_top_k_make_another_student_near_the_exact_one(
    ran: Any, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    def losses(name: str) -> list[float]:
        lines = metrics(ran.runs / name)
        return [line["loss"] for line in lines if line["stage"] == "student" and "loss" in line]

    assert weights(ran, "topk") != weights(ran, "live")
    assert losses("topk")[-1] == pytest.approx(losses("live")[-1], rel=0.2)


@pytest.mark.parametrize("name", ["topk", "topk-again"])
def test_the_error_of_the_top_k_is_measured_and_reported(ran: Any, name: str) -> None:
    summary = json.loads((ran.runs / name / "student" / "training.json").read_text())
    facts = summary["topk"]
    assert facts["k"] == 40
    assert facts["windows"] == 64
    assert 0 < facts["topk_kl"] < facts["exact_kl"]
    assert 0 < facts["relative_kl_error"] < 1
    assert 0.5 < facts["gradient_cosine"] < 1
    report = json.loads((ran.runs / name / "report" / "report.json").read_text())
    assert report["topk"] == facts
    text = (ran.runs / name / "report" / "report.md").read_text()
    assert "top-k" in text


@pytest.mark.parametrize("name", ["live", "hidden"])
def test_exact_targets_have_no_error_to_report(ran: Any, name: str) -> None:
    summary = json.loads((ran.runs / name / "student" / "training.json").read_text())
    assert "topk" not in summary
    report = json.loads((ran.runs / name / "report" / "report.json").read_text())
    assert report["topk"] is None


def test_nothing_unfinished_is_left(ran: Any) -> None:
    names = [path.name for path in ran.runs.rglob("*")]
    assert [name for name in names if ".tmp" in name or ".building" in name] == []
