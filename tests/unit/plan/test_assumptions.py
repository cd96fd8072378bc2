"""What a plan says that it rests on: it says it where it is so, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from babyllama_ds.plan.machines import Machine
from babyllama_ds.plan.planned import Question
from babyllama_ds.plan.planner import plan_job
from babyllama_ds.spec.job import JobSpec

Job = Callable[..., JobSpec]
ON_CPU = "deepspeed.device=cpu"


@pytest.fixture
def said(nursery: Job, tmp_path: Path) -> Callable[..., list[str]]:
    """The assumptions that begin with some words, of the nursery with changes."""

    def make(
        words: str, *overrides: str, ranks: Sequence[int] = (1,), known: bool = False
    ) -> list[str]:
        tokens = None if known else 65_000
        question = Question(tokens=tokens, runs=tmp_path, ranks=ranks)
        found = plan_job(nursery(ON_CPU, *overrides), question).assumptions
        return [line for line in found if line.startswith(words)]

    return make


def test_evaluations_are_left_out_where_their_text_is_not_known(
    said: Callable[..., list[str]],
) -> None:
    assert len(said("evaluations during training: left out")) == 1
    assert said("evaluations during training", known=True) == []


def test_limits_that_may_end_a_training_early(said: Callable[..., list[str]]) -> None:
    changes = (
        "student.training.max_minutes=5",
        "teachers.gpt2.training.early_stopping={patience: 2}",
        "control={training: {batch_windows: 32, epochs: 12, learning_rate: 1e-3}}",
    )
    limits = [
        f"{stage}: all 384 steps; {limit} may end it earlier"  # 12 epochs of 32
        for stage, limit in (("teachers/gpt2", "early_stopping"), ("student", "max_minutes"))
    ]
    assert [line for line in said("", *changes) if "may end it earlier" in line] == limits


def test_micro_batches_that_the_job_gives_are_no_assumption(
    said: Callable[..., list[str]],
) -> None:
    changes = ("student.training.micro_batch=auto", "teachers.gpt2.training.micro_batch=8")
    told = " ".join(said("micro-batch of", *changes))
    assert "micro-batch of student: auto" in told
    assert "gpt2" not in told


def test_rank_counts_that_cannot_be_settle_nothing(said: Callable[..., list[str]]) -> None:
    (told,) = said("micro-batch of student", "student.training.micro_batch=auto", ranks=(2, 7))
    assert told.endswith(": 16")


def test_the_room_that_a_cache_is_taken_to_have(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the disk; on a CPU the host's memory is what ranks compute in, and is counted."""
    changes = ("windows.offsets=fixed", "distillation.cache=hidden")
    usable = {1: 1 << 40, 4: 2_000_000}
    monkeypatch.setattr(Machine, "usable_bytes", lambda _self, ranks: usable[ranks])
    assert said("teacher cache", *changes, ranks=(1, 4)) == [
        "teacher cache: tier auto, the first that fits: host (ranks 1), disk (ranks 4); "
        "enough room on the disk"
    ]
