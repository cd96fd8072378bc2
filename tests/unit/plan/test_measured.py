"""Time reckoned from a pace against sums written out by hand; what may stand beside --measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import cli
from babyllama_ds.errors import MachineError
from babyllama_ds.plan.measured import MeasuredTime, check_within
from babyllama_ds.plan.planned import Question
from babyllama_ds.plan.planner import plan_job
from babyllama_ds.plan.text import plan_as_json, render_plan
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.training.meter import flops_per_token
from babyllama_ds.training.pace import EvaluationPace, JobPace, StagePace, StepPace

Job = Callable[..., JobSpec]
STEP = StepPace(
    steps=7, step_s=0.5, teachers_s=0.2, engine_s=3, dev_window_s=0.01, best_s=0.1, checkpoint_s=2
)
STAGE = StagePace(build_s=1, training=STEP, export_s=0.25)
MEASURING = EvaluationPace(load_s=0.5, dev_window_s=0.02, pair_s=0.001, samples_s=4)
NAMES = ("teachers/gpt2", "teachers/llama", "student", "control")
PACE = JobPace(
    start_s=10,
    preparation_s=20,
    prepared_before=False,
    pairs_s=0.75,
    num_pairs=1400,
    num_milestone_pairs=300,
    stages=dict.fromkeys(NAMES, STAGE),
    evaluations=dict.fromkeys(NAMES, MEASURING),
)
TOKENS, DEV_TOKENS = 64 * 330, 64 * 50  # 329 windows of random offsets: 11 steps of 32 an epoch
SPLIT = "corpus.split={kind: tail, fraction: 0.13157894736842105}"


@pytest.fixture
def plan(files_job: Job, tmp_path: Path) -> Callable[..., Any]:
    """Of 380 windows' text with the nursery's models, 50 of them for development."""

    def make(*overrides: str, pace: JobPace | None = PACE) -> Any:
        tail = (
            f"corpus={{kind: files, train: ['{tmp_path}/*.train'], "
            f"split: {{kind: tail, fraction: {50 / 380}}}}}"
        )
        job = files_job(tail, "deepspeed.device=cpu", *overrides)
        question = Question(tokens=64 * 380, runs=tmp_path, ranks=(1,), pace=pace)
        return plan_job(job, question)

    return make


def parts_of(time: MeasuredTime) -> Mapping[str, Mapping[str, float]]:
    return {stage.name: stage.parts for stage in time.stages}


def test_every_part_of_a_run(plan: Callable[..., Any]) -> None:
    planned = plan(
        "teachers.gpt2.training.checkpoint_every_steps=50",
        "teachers.llama.training.evaluate_every_steps=25",
        "teachers.llama.training.evaluate_windows=20",
        "student.training.epochs=3",
    )
    windows = planned.work.num_windows
    steps = -(-windows // 32)  # of an epoch
    dev = planned.corpus.dev_tokens // 64
    parts = parts_of(planned.measured)
    assert parts["teachers/gpt2"] == pytest.approx(
        {
            "start": 4,
            "cache": 0,
            "steps": 12 * steps * 0.5,
            "evaluations": 12 * (dev * 0.01 + 0.1),
            "checkpoints": (12 * steps // 50) * 2,
            "export": 0.25,
        }
    )
    often = -(-12 * steps // 25)
    assert parts["teachers/llama"]["evaluations"] == pytest.approx(often * (20 * 0.01 + 0.1))
    assert parts["teachers/llama"]["checkpoints"] == pytest.approx(often * 2)
    assert parts["student"]["steps"] == pytest.approx(3 * steps * 0.5)  # its teachers are in it
    assert planned.measured.evaluations["control"] == pytest.approx(
        0.5 + dev * 0.02 + 0.75 + 1400 * 0.001 + 4
    )
    whole = sum(sum(each.values()) for each in parts.values())
    whole += sum(planned.measured.evaluations.values()) + 30
    assert planned.measured.seconds == pytest.approx(whole)
    assert planned.counts[0].seconds["student"] == pytest.approx(sum(parts["student"].values()))


def test_a_cache_takes_the_teachers_out_of_the_steps(plan: Callable[..., Any]) -> None:
    phases = ["windows.offsets={phases: 2}", "distillation.cache=hidden"]
    planned = plan(*phases)
    student = parts_of(planned.measured)["student"]
    windows = planned.work.num_windows
    steps = 12 * -(-windows // 32)
    assert student["steps"] == pytest.approx(steps * (0.5 - 0.2))
    assert student["cache"] == pytest.approx(2 * windows / 32 * 0.2)
    assert parts_of(planned.measured)["control"]["steps"] == pytest.approx(steps * 0.5)
    assert any("reading it back are left out" in line for line in planned.assumptions)


def test_rates_are_those_of_the_steps(plan: Callable[..., Any]) -> None:
    planned = plan()
    (student,) = (stage for stage in planned.measured.stages if stage.name == "student")
    (work,) = (stage for stage in planned.work.stages if stage.name == "student")
    assert student.tokens_per_s == pytest.approx(32 * 64 / 0.5)
    flops = (work.flops.training + work.flops.teachers) / work.steps
    assert student.flops_per_s == pytest.approx(flops / 0.5)


@pytest.mark.parametrize("cache", ["hidden", "topk"])
def test_the_rate_of_a_cache_is_of_what_its_steps_compute(
    cache: Any, plan: Callable[..., Any]
) -> None:
    """As a run's meter counts it: what fills the cache is not in the steps."""
    planned = plan("windows.offsets={phases: 2}", f"distillation.cache={cache}")
    (student,) = (stage for stage in planned.measured.stages if stage.name == "student")
    a_token = flops_per_token(
        planned.work.stages[2].sizes,
        [teacher.sizes for teacher in planned.work.teachers],
        length=64,
        vocab_size=800,
        cache=cache,
    )
    assert student.flops_per_s == pytest.approx(a_token * 32 * 64 / (0.5 - 0.2))


def test_a_loaded_teacher_takes_no_steps(plan: Callable[..., Any]) -> None:
    loaded = replace(STAGE, training=None)
    pace = replace(PACE, stages={"teachers/other": loaded, "student": STAGE, "control": STAGE})
    planned = plan(pace=pace)
    assert parts_of(planned.measured)["teachers/other"] == {"start": 1, "export": 0.25}
    assert list(planned.counts[0].seconds) == ["student", "control"]  # stages that train


def test_no_more_development_windows_are_measured_than_the_job_asks_for(
    plan: Callable[..., Any],
) -> None:
    of_all, of_seven = (
        plan(f"evaluation.dev_windows={number}").measured.evaluations["student"]
        for number in ("null", 7)
    )
    available = plan().corpus.dev_tokens // 64
    assert of_all - of_seven == pytest.approx((available - 7) * 0.02)


@pytest.mark.parametrize(
    ("words", "cache", "prepared_before"),
    [
        ("preparation: the prepared text stood in the store", "none", True),
        ("student: its steps with the teachers' heads, which a top-k cache spares", "topk", False),
    ],
)
def test_what_was_not_as_it_will_be_is_told(
    words: str, cache: str, prepared_before: bool, plan: Callable[..., Any]
) -> None:
    def told(cache: str, *, before: bool) -> bool:
        pace = replace(PACE, prepared_before=before)
        planned = plan("windows.offsets=fixed", f"distillation.cache={cache}", pace=pace)
        return any(line.startswith(words) for line in planned.assumptions)

    assert told(cache, before=prepared_before)
    assert not told("hidden", before=False)


def test_what_is_shown(plan: Callable[..., Any]) -> None:
    planned = plan()
    text = render_plan(planned)
    assert "rates, measured on this machine" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["student", "500.0", "4,096"] in [row[:3] for row in rows]
    assert "measuring control" in text
    assert "left out: writing the report" in text
    assert "N times as fast" not in text
    assert "steps that were timed: teachers/gpt2 7, teachers/llama 7, student 7, control 7" in text
    shown = plan_as_json(planned)["measured"]
    assert shown["seconds"] == planned.measured.seconds
    assert shown["stages"]["student"]["parts"] == dict(parts_of(planned.measured)["student"])
    assert plan_as_json(plan(pace=None))["measured"] is None
    assert json.dumps(shown)


def test_milestones_are_measured_as_often_as_there_are_any(plan: Callable[..., Any]) -> None:
    planned = plan(
        "student.milestones=[9, 50]",
        "control.milestones=[9]",
        "evaluation={samples: 3, milestones: {dev_windows: 7}}",
    )
    found = planned.measured.evaluations
    one = 0.5 + 7 * 0.02 + 0.75 + 300 * 0.001  # and writes no texts
    assert found["milestones of student"] == pytest.approx(2 * one)
    assert found["milestones of control"] == pytest.approx(one)
    assert "measuring milestones of student" in render_plan(planned)
    student, without = planned.work.stages[2], plan("student.milestones=[9, 50]").work.stages[2]
    vocab = planned.corpus.vocab_size
    assert student.flops.evaluation - without.flops.evaluation == (
        2 * 7 * 64 * student.sizes.forward_flops(64, vocab)
    )


def test_too_long_is_an_error_that_names_what_takes_longest(plan: Callable[..., Any]) -> None:
    slow = replace(PACE, evaluations=dict.fromkeys(NAMES, replace(MEASURING, load_s=35)))
    time = plan("teachers.gpt2.training.epochs=24", pace=slow).measured
    minutes = time.seconds / 60
    check_within(time, minutes * 1.0001, name="nursery-1")
    with pytest.raises(MachineError) as caught:
        check_within(time, minutes * 0.9999, name="nursery-1")
    (problem,) = caught.value.problems
    assert problem.where == "--within, nursery-1 on this machine"
    assert problem.got == f"{minutes:.1f} minutes by what was measured"
    longest = next(stage for stage in time.stages if stage.name == "teachers/gpt2").seconds
    evaluations = sum(time.evaluations.values())
    assert max(stage.seconds for stage in time.stages[1:]) < evaluations < longest
    assert problem.hint == (
        f"what takes longest: teachers/gpt2 {longest / 60:.1f}, "
        f"the evaluations {evaluations / 60:.1f} minutes"
    )


def test_preparation_may_be_what_takes_longest(plan: Callable[..., Any]) -> None:
    time = plan(pace=replace(PACE, preparation_s=6_000)).measured
    with pytest.raises(MachineError, match=r"what takes longest: preparation 100\.0, "):
        check_within(time, 1, name="nursery-1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--within", "5"], "--within: got no --measure, expected --measure beside it"),
        (["--seconds", "5"], "--seconds: got no --measure"),
        (["--measure", "--rate", "5"], "--rate: got 5 beside --measure, expected one of them"),
        (["--measure", "--tokens", "5"], "--tokens: got 5 beside --measure"),
        (["--measure", "--gpu", "L4"], "--gpu: got L4 beside --measure"),
        (["--measure", "--ranks", "1,2"], "--ranks: got 1,2 beside --measure"),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "nursery", "--runs", str(tmp_path), *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "soon"])
def test_minutes_are_a_number_above_zero(minutes: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "nursery", "--measure", "--within", minutes])
