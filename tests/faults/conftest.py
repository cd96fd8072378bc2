"""The smallest run that has all stages, for faults that are planted in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.loading import load_job

MODEL = {
    "kind": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 24,
}
TRAINING = {
    "batch_windows": 8,
    "epochs": 1.0,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "evaluate_windows": 8,
    "checkpoint_every_steps": 2,
}


@pytest.fixture
def smallest_job(tiny_job: Callable[..., Path]) -> Callable[..., Path]:
    """Writes the job into a folder: one teacher `one` and a student, six steps each."""

    def write(folder: Path, **changes: Any) -> Path:
        sections = {
            "teachers": [{"name": "one", "model": MODEL, "training": TRAINING}],
            "student": {"model": MODEL, "training": TRAINING},
            "control": None,
            "evaluation": {"dev_windows": 8},
        }
        return tiny_job(folder, **sections | changes)

    return write


@pytest.fixture
def begin(tmp_path: Path, smallest_job: Callable[..., Path]) -> Callable[..., Path]:
    """Starts the run below `tmp_path / "runs"`, or goes on with it: one rank."""
    job = smallest_job(tmp_path / "job")
    return lambda *overrides: run_job(load_job(job, list(overrides)), runs=tmp_path / "runs")
