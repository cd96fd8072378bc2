"""A job with every term of the loss, from text to report: one rank or two, the same curves.

Another divergence, schedules, a z-loss, tokens without a label and matched layers, on real ranks.
The counts of labels depend on the text, and the last batch of an epoch is short.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

pytestmark = pytest.mark.launch

STEPS = 30
CURVES = (
    *("loss", "ce", "jensen_shannon", "log_z_squared", "hidden_distance"),
    *("grad_norm", "dev_ce", "alpha", "temperature", "student_kl"),
)
UNLABELLED = ["e", "Ġ", "."]
TRAINING = {"batch_windows": 8, "epochs": 100, "warmup_steps": 3}
LLAMA = {"kind": "llama", "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
GPT2 = {"kind": "gpt2", "hidden_size": 24, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
TAUGHT = {"training": {**TRAINING, "max_steps": 60, "learning_rate": 1e-2}}
SECTIONS = {
    "name": "one",
    "teachers": [
        {"name": "gpt2", "model": GPT2, **TAUGHT},
        {"name": "llama", "model": {**LLAMA, "hidden_size": 40, "num_layers": 3}, **TAUGHT},
    ],
    "student": {
        "model": {**LLAMA, "hidden_size": 32, "num_layers": 2, "tied_embeddings": True},
        "training": {
            **TRAINING,
            "max_steps": STEPS,
            "learning_rate": 2e-3,
            "evaluate_every_steps": 15,
            "evaluate_windows": 16,
            "log_every_steps": 1,
            "z_loss": 1e-3,
            "unlabelled_tokens": UNLABELLED,
        },
    },
    "control": None,
    "distillation": {
        "alpha": {"start": 0.9, "end": 0.2, "over": 0.5, "shape": "cosine"},
        "temperature": {"start": 1.0, "end": 2.0},
        "divergence": {"kind": "jensen_shannon", "beta": 0.3},
        "soft_reduction": "token",
        "hidden_matching": {
            "weight": 0.5,
            "layers": [
                {"teacher": "llama", "teacher_layer": 3, "student_layer": 2},
                {"teacher": "llama", "teacher_layer": 1, "student_layer": 1},
                {"teacher": "gpt2", "teacher_layer": 0, "student_layer": 0},
            ],
        },
    },
}
VARIANTS = {"one": (1, 8, 4096), "two": (2, 1, 13)}
"""Ranks, micro-batch, chunk_tokens."""


@pytest.fixture(scope="module")
def scene(once: Any, tiny_job: Callable[..., Path], start_ranks: Callable[..., Any]) -> Any:
    def make(scene: Any) -> list[Any]:
        job = tiny_job(scene.folder, **SECTIONS)
        ended = []
        for name, (num_ranks, micro_batch, chunk_tokens) in VARIANTS.items():
            words = (
                "deepspeed.config=zero2_cpu_fp32",
                f"student.training.micro_batch={micro_batch}",
                f"distillation.chunk_tokens={chunk_tokens}",
                f"name={name}",
            )
            running = start_ranks(job, *words, "--runs", scene.runs, num_ranks=num_ranks)
            ended.append(running.end())
        return ended

    scene = once("objectives", make)
    for ended in scene.ended:
        ended.assert_done()
    return scene


@pytest.mark.parametrize("key", CURVES)
def test_the_same_curve_on_one_rank_and_on_two(
    scene: Any, key: str, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    one, two = (
        [
            line[key]
            for line in metrics(scene.runs / name)
            if line["stage"] == "student" and key in line
        ]
        for name in VARIANTS
    )
    assert len(one) == len(two) == (2 if key == "dev_ce" else STEPS)
    differences = [abs(b - a) / abs(a) for a, b in zip(one, two, strict=True)]
    assert max(differences) <= 2e-5


def test_the_loss_is_the_sum_of_its_terms(
    scene: Any, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    lines = [line for line in metrics(scene.runs / "two") if "jensen_shannon" in line]
    assert len(lines) == STEPS
    for line in lines:
        soft = line["temperature"] ** 2 * line["jensen_shannon"]
        expected = line["alpha"] * line["ce"] + (1 - line["alpha"]) * soft
        expected += 1e-3 * line["log_z_squared"] + 0.5 * line["hidden_distance"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
    assert lines[0]["alpha"] == 0.9
    assert lines[-1]["alpha"] == 0.2
    assert lines[-1]["hidden_distance"] < lines[0]["hidden_distance"]


def test_the_student_leaves_without_the_matrices_and_the_report_tells_all(scene: Any) -> None:
    run = scene.runs / "two"
    with safe_open(run / "student" / "model.safetensors", framework="pt") as tensors:
        assert not [name for name in tensors.keys() if "project" in name]  # noqa: SIM118
    page = (run / "report" / "report.md").read_text()
    assert "JSD(teachers, student; beta 0.3) + 0.001 (log Z)² + 0.5 MSE of hidden states" in page
    assert "0.9 to 0.2 over 50% of the steps (cosine)" in page
    job = yaml.safe_load((run / "job.yaml").read_text())
    assert job["distillation"]["divergence"] == {"kind": "jensen_shannon", "beta": 0.3}
    assert job["student"]["training"]["unlabelled_tokens"] == UNLABELLED
