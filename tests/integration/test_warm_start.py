"""A student that starts from a model: exactly its weights, the control's too, also after a kill.

One rank, in this process, through the real pipeline. What it starts from is a student that an
earlier job of this project exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from babyllama_ds.errors import JobError, ModelError, RunError
from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.loading import load_job
from babyllama_ds.training import loop

pytestmark = pytest.mark.usefixtures("process_as_it_was")

STEPS = 6
TRAINING = {
    "batch_windows": 8,
    "epochs": 1.0,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "log_every_steps": 1,
    "evaluate_windows": 8,
    "evaluate_every_steps": 3,
    "checkpoint_every_steps": 2,
}
GPT2 = {
    "kind": "gpt2",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "max_positions": 32,
    "dropout": 0.2,
}
STANDING = "student.training.learning_rate=1e-30"
"""Steps that leave every weight where it was."""


@pytest.fixture(scope="module")
def start_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first")


@pytest.fixture
def job(tmp_path: Path, start_of: Path, tiny_job: Callable[..., Path]) -> Path:
    """A job whose student starts from `start_of/model`; its teacher is that model too."""
    path = start_of / "model"
    model = {"kind": "pretrained", "path": str(path)}
    if not path.exists():
        first = tiny_job(
            start_of / "job",
            teachers=[{"name": "one", "model": GPT2, "training": TRAINING}],
            student={"model": GPT2, "training": TRAINING},
            control=None,
            evaluation={"dev_windows": 8},
        )
        (run_job(load_job(first, []), runs=start_of / "runs") / "student").rename(path)
    return tiny_job(
        tmp_path / "job",
        teachers=[{"name": "elder", "model": model}],
        student={"model": model, "training": TRAINING},
        control={},
        evaluation={"dev_windows": 8},
    )


def run(job: Path, tmp_path: Path, *overrides: str) -> Path:
    return run_job(load_job(job, overrides), runs=tmp_path / "runs")


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def assert_equal_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_student_and_control_start_from_exactly_those_weights(
    job: Path, tmp_path: Path, start_of: Path
) -> None:
    run_dir = run(job, tmp_path, STANDING, "student.training.ema={}")
    for name in ("student", "control"):
        assert_equal_weights(weights(run_dir / name), weights(start_of / "model"))
        config, start = (
            json.loads((folder / "config.json").read_text())
            for folder in (run_dir / name, start_of / "model")
        )
        assert config == start
    report = json.loads((run_dir / "report" / "report.json").read_text())["models"]
    expected = sum(weight.numel() for weight in weights(start_of / "model").values())
    assert report["student"]["params"] == report["control"]["params"] == expected
    assert report["student"]["dev_ce"] == report["elder"]["dev_ce"]
    assert report["student"]["averaged"] == 0.999
    # The teacher is the student's start: they agree, but for the student's dropout.
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    ces = {n: [x["ce"] for x in lines if x["stage"] == n and "ce" in x] for n in report}
    assert ces["student"] == ces["control"]  # the same windows, and the same masks


def test_it_learns_from_there_and_the_control_without_teachers(
    job: Path, tmp_path: Path, start_of: Path
) -> None:
    run_dir = run(job, tmp_path, "student.training.keep=last")
    start = weights(start_of / "model")
    moved = [weights(run_dir / name) for name in ("student", "control")]
    key = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(moved[0][key], start[key])
    assert not torch.equal(moved[0][key], moved[1][key])


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written after it."""


def test_killed_and_started_again_it_ends_with_the_same_weights(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(job, tmp_path, "name=undisturbed")
    original, made = loop.train_step, []

    def train_step(*parts: Any, **named: Any) -> Any:
        made.append(named["step"])
        if len(made) == 4:
            raise Killed
        return original(*parts, **named)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(Killed):
        run(job, tmp_path, "name=killed")
    killed = run(job, tmp_path, "name=killed")
    assert made[4:10] == [2, 3, 4, 5, 0, 1], "it did not go on from its checkpoint"
    for name in ("student", "control"):
        assert_equal_weights(weights(killed / name), weights(undisturbed / name))


def test_another_start_is_another_experiment(job: Path, tmp_path: Path, start_of: Path) -> None:
    run(job, tmp_path, STANDING, "control=null")
    config = start_of / "model" / "config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(before), "embd_pdrop": 0.5}))
        with pytest.raises(RunError, match="fingerprint"):
            run(job, tmp_path, STANDING, "control=null")
    finally:
        config.write_text(before)


def test_dropout_of_its_own(job: Path, tmp_path: Path) -> None:
    dropped = ("student.model.dropout=0.0", "student.model.attention_dropout=0.0")
    run_dir = run(job, tmp_path, STANDING, "control=null", *dropped)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    distances = [line["student_kl"] for line in lines if "student_kl" in line]
    assert len(distances) == STEPS
    assert max(distances) < 1e-6  # the teacher's own logits
    config = json.loads((run_dir / "student" / "config.json").read_text())
    assert (config["resid_pdrop"], config["attn_pdrop"]) == (0.0, 0.0)


def test_a_teacher_that_is_not_trained_has_no_dropout(job: Path) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job, ["teachers.elder.model.attention_dropout=0.1"])
    (problem,) = caught.value.problems
    assert problem.where.endswith("model.attention_dropout")
    assert problem.expected == "none for a teacher that is not trained"


def test_a_start_with_fewer_positions_than_a_window_is_refused(job: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"elder.*got 32 positions, expected at least 48"):
        run(job, tmp_path, "windows.length=48")
