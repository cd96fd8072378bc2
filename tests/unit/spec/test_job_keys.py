"""Where a stage stands in the job, as messages name it."""

from __future__ import annotations

import pytest

from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job

OWN = "control.training={batch_windows: 8, epochs: 1, learning_rate: 0.1}"


@pytest.mark.parametrize(
    ("stage", "overrides", "training", "model"),
    [
        ("teachers/gpt2", [], "teachers.gpt2.training", "teachers.gpt2.model"),
        ("student", [], "student.training", "student.model"),
        # What the control does not say itself is said of the student, and changed there.
        ("control", [], "student.training", "student.model"),
        ("control", ["control=null"], "student.training", "student.model"),
        ("control", [OWN], "control.training", "student.model"),
    ],
)
def test_a_stage_is_named_by_the_key_that_decides(
    stage: str, overrides: list[str], training: str, model: str
) -> None:
    job = load_job(find_job("nursery"), overrides)
    assert (job.training_key(stage), job.model_key(stage)) == (training, model)
