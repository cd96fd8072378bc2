"""World size is no part of the mathematics: the same job, one rank or two, whole or accumulated.

In fp32, without dropout. The last batch of an epoch is short, so that padding windows take part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

STEPS = 20
OVERRIDES = (
    "deepspeed.config=zero2_cpu_fp32",
    "control=null",
    "teachers.0.model.dropout=0.0",
    "distillation.soft_reduction=token",
    *(
        f"{model}.training.{setting}"
        for model in ("teachers.0", "teachers.1", "student")
        # Slow, so that rounding is not amplified.
        for setting in (f"max_steps={STEPS}", "learning_rate=2e-3")
    ),
)
STAGES = ("teachers/gpt2", "teachers/llama", "student")


@pytest.fixture(scope="module")
def traces(
    once: Any,
    tiny_job: Callable[..., Path],
    run_ranks: Callable[..., Any],
    run_alone: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    def make(scene: Any) -> list[Any]:
        job = tiny_job(scene.folder)
        micro = [f"{stage}.training.micro_batch=2" for stage in ("teachers.0", "student")]
        return [
            run_ranks(job, *OVERRIDES, "--runs", scene.folder / "two ranks"),
            run_alone("run", job, *OVERRIDES, "--runs", scene.folder / "one rank"),
            run_alone("run", job, *OVERRIDES, *micro, "--runs", scene.folder / "accumulated"),
        ]

    scene = once("rank_count", make)
    for ended in scene.ended:
        ended.assert_done()
    names = ("two ranks", "one rank", "accumulated")
    return {name: metrics(scene.folder / name / "tiny-1") for name in names}


@pytest.mark.parametrize("other", ["two ranks", "accumulated"])
@pytest.mark.parametrize(
    ("stage", "key"),
    [
        *((stage, key) for stage in STAGES for key in ("loss", "ce", "grad_norm", "dev_ce")),
        ("student", "kl"),
    ],
)
def test_same_curve(
    traces: dict[str, list[dict[str, Any]]], other: str, stage: str, key: str
) -> None:
    def curve(name: str) -> list[float]:
        return [line[key] for line in traces[name] if line["stage"] == stage and key in line]

    expected = curve("one rank")
    assert len(expected) == (3 if key == "dev_ce" else STEPS)
    # A KL is a small difference of log-probabilities, of which fp32 keeps 5e-7 each.
    assert curve(other) == pytest.approx(expected, rel=1e-5, abs=1e-6 if key == "kl" else 0)
