"""The student of a whole run is the one that Hugging Face's trainer makes from the same start."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import LLAMA, STEPS, TRAINING

STUDENTS = Path(__file__).parents[1] / "benchmarks" / "students.py"


@pytest.mark.launch
def test_whole_trainings_are_the_textbooks(
    tiny_job: Callable[..., Path],
    start_ranks: Callable[..., Any],
    start: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """ZeRO-2 on two ranks, the chunked loss, frozen engines and fused modules against a trainer
    that has none of them: in fp32, weights of the last step, and of the one that was best, differ
    by roundings alone."""
    pytest.importorskip("accelerate", reason="the textbook's trainer needs it")
    # So fast that its best weights are not its last ones, as those of the control are.
    training = {**TRAINING, "learning_rate": 1.5e-2}
    student = {"model": {**LLAMA, "num_layers": 2}, "training": training}
    job = tiny_job(tmp_path, student=student, control={"training": TRAINING})
    runs, out = tmp_path / "runs", tmp_path / "out"
    start_ranks(job, "--runs", runs, "deepspeed.config=zero2_cpu_fp32").end().assert_done()
    run_dir = runs / "tiny-1"
    ended = start([[sys.executable, STUDENTS, run_dir, "--ranks", 1, "--out", out]]).end()
    ended.assert_done()
    assert "| tiny-1 " in ended.out
    assert "ours − textbook fp32" in ended.out

    kept = {
        model: json.loads((run_dir / model / "training.json").read_text())["best_step"]
        for model in ("student", "control")
    }
    assert kept["student"] < kept["control"] == STEPS
    (run,) = json.loads((out / "students.json").read_text())["runs"]
    assert run["models"].keys() == {"student", "control"}
    for model, rows in run["models"].items():
        assert_same_weights(run_dir / model, out / "tiny-1" / model)
        assert rows["ours"]["dev_ce"] == pytest.approx(rows["fp32"]["dev_ce"], abs=1e-6)


def assert_same_weights(ours_dir: Path, theirs_dir: Path) -> None:
    """Next to how far training moved them."""
    ours = load_file(ours_dir / "model.safetensors")
    theirs = load_file(theirs_dir / "fp32" / "model.safetensors")
    began = load_file(theirs_dir / "start" / "model.safetensors")
    assert ours.keys() == theirs.keys() == began.keys()
    for name, before in began.items():
        moved = float((theirs[name] - before).norm())
        off = float((ours[name] - theirs[name]).norm())
        assert moved > 0, name
        assert off < 1e-4 * moved, f"{ours_dir}: {name}"


def test_what_the_textbook_cannot_train_is_told(
    tiny_job: Callable[..., Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "tiny-1"
    job = tiny_job(run, distillation={"divergence": {"kind": "jensen_shannon"}})
    assert job.parent == run
    ended = start([[sys.executable, STUDENTS, run, "--out", tmp_path]]).end()
    assert ended.code == 1
    assert "distillation.divergence" in ended.err
    assert "cache" not in ended.err
