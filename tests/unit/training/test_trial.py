"""A training tried out: where its time goes is told apart, with delays that are known."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.errors import Stopped
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.pace import StepPace
from babyllama_ds.training.stage import RunContext, Stage
from babyllama_ds.training.trial import LEAST_STEPS, try_out

VOCAB, LENGTH, WINDOWS = 61, 10, 14
A_STEP_S, A_TEACHER_S, A_DEV_WINDOW_S, A_CHECKPOINT_S = 0.06, 0.04, 0.03, 0.3
QUICK_S = 0.12
"""What a tiny model's own work may take, above the delays, on a busy machine."""


class SlowWindows:
    """Four steps an epoch; the windows of each take their time."""

    num_windows, length = WINDOWS, LENGTH
    tokens = np.random.default_rng(1).integers(0, VOCAB, (WINDOWS, LENGTH))

    def batch(self, epoch: int, k: int, batch_windows: int) -> NDArray[np.int64]:
        return np.arange(WINDOWS)[k * batch_windows : (k + 1) * batch_windows]

    def numbers(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices

    def begins(self, epoch: int, indices: NDArray[np.int64]) -> None:
        """Windows are whole."""

    def windows(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        time.sleep(A_STEP_S)
        return self.tokens[indices]


class SlowEnsemble(Ensemble):
    def targets(self, windows: Any) -> Any:
        time.sleep(A_TEACHER_S)
        return super().targets(windows)


class SlowFolder(CheckpointFolder):
    saved = 0

    def save(self, *given: Any) -> None:
        time.sleep(A_CHECKPOINT_S)
        super().save(*given)
        self.saved += 1


def slow_dev(batch_windows: int) -> DevWindows:
    tokens = np.random.default_rng(2).integers(0, VOCAB, (40, LENGTH))

    def windows_of(ids: Any) -> NDArray[np.int64]:
        time.sleep(A_DEV_WINDOW_S * len(ids))
        return tokens[list(ids)]

    return DevWindows(windows_of=windows_of, num_windows=40, batch_windows=batch_windows)


Try = Callable[..., tuple[StepPace, SlowFolder]]


@pytest.fixture
def tried(
    tmp_path: Path,
    alone: torch.device,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    engine_config: Callable[..., dict[str, Any]],
) -> Try:
    def run(
        *, seconds: float, distilled: bool = False, stop: bool = False, **changes: Any
    ) -> tuple[StepPace, SlowFolder]:
        training = training_spec(**{"epochs": 100.0, "micro_batch": None, **changes})
        config = engine_config(training, precision="bf16")
        teacher = FrozenModel(tiny_model("llama"), device=alone, dtype=torch.bfloat16)
        folder = SlowFolder(tmp_path / "checkpoints", fingerprint="f")
        request = StopRequest()
        if stop:
            request._signalled = 15
        pace = try_out(
            Stage(
                name="student",
                model=tiny_model("llama"),
                training=training,
                distillation=DistillationSpec() if distilled else None,
                vocab_size=VOCAB,
                seed=3,
                micro_batch=config["train_micro_batch_size_per_gpu"],
                deepspeed=config,
            ),
            RunContext(run_dir=tmp_path, device=alone, stop=request, checkpoints=folder),
            windows=SlowWindows(),
            dev=slow_dev(2),
            ensemble=SlowEnsemble([Member("a", teacher, 1.0)]) if distilled else None,
            seconds=seconds,
        )
        return pace, folder

    return run


def least_step_s(timed: int) -> float:
    """Batches are read beside the step before, the first of the timed ones before the time begins;
    without timed ones the start is looked at, with all of its reading."""
    return A_STEP_S * (timed - 1) / timed if timed else A_STEP_S


def test_each_part_has_its_own_time(tried: Try) -> None:
    pace, folder = tried(seconds=0.5, distilled=True)
    assert least_step_s(pace.steps) <= pace.step_s <= A_STEP_S + A_TEACHER_S + QUICK_S
    assert A_TEACHER_S <= pace.teachers_s <= A_TEACHER_S + QUICK_S
    assert A_DEV_WINDOW_S <= pace.dev_window_s <= A_DEV_WINDOW_S + QUICK_S
    assert 0 < pace.best_s <= QUICK_S
    assert A_CHECKPOINT_S <= pace.checkpoint_s <= A_CHECKPOINT_S + 10 * QUICK_S
    assert 0.5 / (pace.step_s + QUICK_S) - 1 <= pace.steps <= 0.5 / A_STEP_S + 1
    assert folder.saved == 1


def test_a_few_steps_however_long_they_take_and_no_more_than_there_are(tried: Try) -> None:
    pace, _ = tried(seconds=0.0)
    assert pace.steps == LEAST_STEPS
    assert pace.teachers_s == 0.0


@pytest.mark.parametrize(("steps", "timed"), [(4, 2), (1, 0)])
def test_a_training_shorter_than_the_trial(tried: Try, steps: int, timed: int) -> None:
    pace, _ = tried(seconds=60.0, max_steps=steps, warmup_steps=0)
    assert pace.steps == timed
    assert pace.step_s >= least_step_s(timed)


def test_asked_to_stop_it_does(tried: Try) -> None:
    with pytest.raises(Stopped):
        tried(seconds=60.0, stop=True)
