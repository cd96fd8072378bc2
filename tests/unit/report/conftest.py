"""A run directory with everything in it that a report can show, some of it hostile."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = '<script>document.title="taken"</script>'
"""A name that does harm in a page that does not escape it."""

TRAINING = {
    "batch_windows": 32,
    "epochs": 6.0,
    "max_steps": None,
    "learning_rate": 7e-4,
    "schedule": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "betas": [0.9, 0.999],
}
STEPS, TOKENS_A_STEP = 600, 2048
ENDS = {"wide": 2.31, "deep": 2.24, "control": 2.18, "student": 2.05}


def job() -> dict[str, Any]:
    return {
        "name": "demo-{seed}",
        "seed": 11,
        "corpus": {"kind": "files", "train": [f"data/{SCRIPT}.train"]},
        "windows": {"length": 128, "offsets": "random"},
        "teachers": [
            {"name": "wide", "model": {"kind": "gpt2", "dropout": 0.1}, "training": TRAINING},
            {"name": "deep", "model": {"kind": "llama"}, "training": TRAINING},
        ],
        "student": {"model": {"kind": "llama"}, "training": TRAINING},
        "control": {"training": None},
        "evaluation": {"milestones": {"max_pairs_per_task": 200, "dev_windows": None}},
        "distillation": {
            "alpha": 0.5,
            "temperature": 2.0,
            "soft_reduction": "sequence",
            "mean_of": "logits",
        },
    }


MILESTONES = {
    f"chck_{million}M": {"words": million * 1_000_000 + 77, "steps": 60 * million}
    for million in (1, 2, 3, 10)
}
"""Of student and control."""


def milestone(model: str, words: int) -> dict[str, Any]:
    """One that learns: farther from the finished model the fewer words it has seen."""
    found = json.loads(json.dumps(evaluation(model)))  # its benchmarks are one object
    found["dev"]["ce"] += 1_000_000 / words
    for scores in found["minimal_pairs"].values():
        scores["accuracy"] -= 0.1 * 1_000_000 / words
    return {key: found[key] for key in ("dev", "minimal_pairs")}


def stage_of(model: str) -> str:
    return model if model in ("student", "control") else f"teachers/{model}"


def summary(params: int) -> dict[str, Any]:
    return {
        "params": params,
        "train_tokens": STEPS * TOKENS_A_STEP,
        "seconds": 160.0,
        "tokens_per_s": STEPS * TOKENS_A_STEP / 160,
        "flops_per_s": 5e11,
        "mfu": 0.4,
        "step_s": {"data": 0.001, "teachers": 0.02, "loss": 0.0305},
        "steps": STEPS,
        "best_dev_ce": 2.1,
        "best_step": STEPS,
        "final_dev_ce": 2.1,
        "vocab_size": 1000,
        "finished": "2026-03-01T12:34:56+00:00",
    }


def evaluation(model: str) -> dict[str, Any]:
    ce = ENDS[model] + 0.07
    shift = 3 - ENDS[model]
    tasks = {
        f"task_{number}": {
            "accuracy": 0.55 + 0.04 * ((number * 7) % 5) + 0.05 * shift,
            "pairs": 100,
            "ties": 0,
            "term": ("agreement", "filler_gap", "npi_licensing", SCRIPT)[number % 4],
        }
        for number in range(24)
    }
    accuracy = sum(task["accuracy"] for task in tasks.values()) / len(tasks)
    pairs = {
        "accuracy": accuracy,
        "pooled_accuracy": accuracy,
        "tasks": tasks,
        "prefix": None,
        "leading_space": True,
    }
    return {
        "model": model,
        "params": 999,
        "dev": {"ce": ce, "perplexity": math.exp(ce), "bits_per_byte": ce / 3, "tokens": 1270},
        "minimal_pairs": {"blimp": pairs, SCRIPT: pairs},
        "fine_tuning": {"glue": fine_tuning(model)},
        "samples": [{"prompt": "The dog", "text": f" sees {SCRIPT}\nand & runs."}],
    }


def fine_tuning(model: str) -> dict[str, Any]:
    """A suite of three tasks, two seeds each; the student says most of them rightly."""
    num_wrong = round(10 * ENDS[model] - 14)
    labels = "0110100110" * 4
    tasks: dict[str, Any] = {}
    for place, (task, metric) in enumerate((("cola", "mcc"), ("rte", "accuracy"), (SCRIPT, "f1"))):
        said = [
            "".join("10"[int(x)] for x in labels[:n]) + labels[n:]
            for n in (num_wrong + place, num_wrong + place + 1)
        ]
        scores = [1 - n / 20 for n in (num_wrong + place, num_wrong + place + 1)]
        tasks[task] = {
            "metric": metric,
            "score": sum(scores) / 2,
            "scores": scores,
            "majority": 0.5 * place,
            "examples": len(labels),
            "train_examples": 1234,
            "epochs": [3, 10],
            "labels": labels,
            "predictions": said,
        }
    settings = {
        "learning_rate": 5e-5,
        "batch_size": 64,
        "epochs": 10,
        "patience": 3,
        "max_tokens": 128,
        "seeds": 2,
        "per_task": {"rte": {"learning_rate": 1e-5, "patience": None}},
    }
    score = sum(task["score"] for task in tasks.values()) / len(tasks)
    return {"score": score, "tasks": tasks, "settings": settings}


def metrics() -> Iterator[dict[str, Any]]:
    for model, end in ENDS.items():
        for step in range(1, STEPS + 1):
            ce = end + 4.5 * math.exp(-step / 40) + 0.05 * math.sin(step)
            line = {
                "stage": stage_of(model),
                "step": step,
                "tokens": step * TOKENS_A_STEP,
                "loss": ce,
                "ce": ce,
                "grad_norm": 1.0,
                "tokens_per_s": 9000.0,
            }
            if model == "student":
                line |= {"kl": 0.1 + 2 * math.exp(-step / 60), "loss": 30.0, **watched()}
            yield line
            if step % 60 == 0:
                yield {
                    "stage": stage_of(model),
                    "step": step,
                    "tokens": step * TOKENS_A_STEP,
                    "dev_ce": ce + 0.1,
                }


def watched() -> dict[str, float]:
    return {
        "teacher_ce/wide": 2.3,
        "teacher_ce/deep": 6.95,  # no better than chance: a warning
        "teacher_kl/wide": 0.2,
        "teacher_kl/deep": 0.3,
        "teacher_agreement/wide": 0.75,
        "teacher_agreement/deep": 0.5,
        "teacher_distance/wide/deep": 0.25,
        "target_entropy": 4.0,
        "student_agreement": 0.625,
        "student_kl": 0.5,
    }


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def make_run(tmp_path: Path, make_run_in: Callable[..., Path]) -> Callable[..., Path]:
    """A run's directory in this test's own folder."""
    return partial(make_run_in, tmp_path)


@pytest.fixture(scope="session")
def make_run_in() -> Callable[..., Path]:
    """A run's directory; `without` names files and folders that it lacks."""

    def make(
        folder: Path, *without: str, state: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        run = folder / "demo-11"
        run.mkdir()
        (run / "job.yaml").write_text(yaml.safe_dump({**job(), **changes}))
        write(run / "state.json", state or {"status": "done"})
        environment = {"commit": "0123abc", "versions": {"torch": "2.13.0"}, "hardware": SCRIPT}
        write(run / "environment.json", environment)
        for model in ENDS:
            write(run / stage_of(model) / "training.json", summary(1_290_000))
            write(run / "evaluation" / f"{model}.json", evaluation(model))
        for model in ("student", "control"):
            kept = summary(1_290_000) | {"milestones": MILESTONES}
            write(run / model / "training.json", kept)
            for name, seen in MILESTONES.items():
                place = run / "evaluation" / "milestones" / model / f"{name}.json"
                write(place, milestone(model, seen["words"]))
        lines = [json.dumps(line) for line in metrics()]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        for name in without:
            path = run / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return run

    return make


@pytest.fixture(scope="session")
def domains() -> dict[str, dict[str, dict[str, float]]]:
    """Development cross-entropy by domain and model, as a report holds it."""
    return {
        domain: {model: {"ce": end + 0.3 * place, "tokens": 500} for model, end in ENDS.items()}
        for place, domain in enumerate(("childes", "gutenberg", SCRIPT, "$x_i$ 中文"))
    }


@pytest.fixture
def script() -> str:
    return SCRIPT
