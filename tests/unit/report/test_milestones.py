"""Milestones in a report: facts, figures, tables, scalars, a card, and what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from babyllama_ds.report.board import write_boards
from babyllama_ds.report.card import render_milestone_card
from babyllama_ds.report.collect import collect_report
from babyllama_ds.report.html import view_of
from babyllama_ds.report.markdown import render_markdown
from babyllama_ds.report.milestones import curves_on, curves_on_text
from babyllama_ds.report.write import write_report

WORDS = (1_000_077, 2_000_077, 3_000_077, 10_000_077)
STUDENT_CE = 2.05 + 0.07


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()


def test_each_milestone_has_what_it_measured_at(run: Path) -> None:
    report = collect_report(run)
    assert list(report["milestones"]) == ["control", "student"]  # as the models are
    student = report["milestones"]["student"]
    assert [one["name"] for one in student] == ["chck_1M", "chck_2M", "chck_3M", "chck_10M"]
    assert [one["words"] for one in student] == list(WORDS)
    assert [one["steps"] for one in student] == [60, 120, 180, 600]
    for one in student:
        assert one["dev_ce"] == pytest.approx(STUDENT_CE + 1e6 / one["words"])
        finished = report["models"]["student"]["minimal_pairs"]["blimp"]
        assert one["minimal_pairs"]["blimp"] == pytest.approx(finished - 1e5 / one["words"])
    json.dumps(report, allow_nan=False)


def test_curves_are_against_words(run: Path) -> None:
    figures = {figure.name: figure for figure in view_of(collect_report(run), {}).milestones}
    assert list(figures) == [
        "milestones",
        "milestones-blimp",
        "milestones--script-document-title-taken-script-",
    ]
    ends = "control 2.35, student 2.22"
    assert figures["milestones"].alt.endswith(f"against words seen. The curves end at: {ends}.")
    milestones = collect_report(run)["milestones"]
    student = milestones["student"]
    student[1]["minimal_pairs"]["blimp"] = 0.0  # measured, and so a point
    del student[2]["minimal_pairs"]["blimp"]
    on_text, on_pairs = curves_on_text(milestones), curves_on(milestones, "blimp")
    assert on_text["student"].seen == on_text["control"].seen == WORDS
    assert on_text["student"].values == tuple(one["dev_ce"] for one in student)
    assert on_pairs["student"].seen == (WORDS[0], WORDS[1], WORDS[3])
    first, last = (100 * student[n]["minimal_pairs"]["blimp"] for n in (0, 3))
    assert on_pairs["student"].values == (first, 0.0, last)
    write_report(run)
    page = (run / "report" / "report.html").read_text()
    assert 'href="#milestones"' in page
    assert "measured on the first 200 pairs of each task." in page


def test_the_table_has_a_row_for_each(run: Path) -> None:
    page = render_markdown(collect_report(run))
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| chck_")]
    cells = [[cell.strip() for cell in row[1:6]] for row in rows]
    assert cells[4] == [
        "chck_1M",
        "student",
        "1,000,077",
        "60",
        f"{STUDENT_CE + 1e6 / WORDS[0]:.4f}",
    ]
    assert len(cells) == 8


def test_tensorboard_has_them_at_their_steps(run: Path) -> None:
    report = collect_report(run)
    write_boards(run, report)
    board = EventAccumulator(str(run / "tensorboard" / "student"))
    board.Reload()
    scalars = board.Scalars("milestones/minimal_pairs/blimp")
    shown = [(one.step, one.value) for one in scalars]
    kept = report["milestones"]["student"]
    expected = [(one["steps"], one["minimal_pairs"]["blimp"]) for one in kept]
    assert shown == [(step, pytest.approx(share)) for step, share in expected]
    assert len(board.Scalars("milestones/dev_ce")) == 4


def test_a_milestones_card_has_its_own_numbers(run: Path) -> None:
    report = collect_report(run)
    facts = {"milestone": "chck_2M", "words": WORDS[1], "train_tokens": 3, "steps": 120}
    card = render_milestone_card(report, "student", facts)
    assert f"| dev_ce | {STUDENT_CE + 1e6 / WORDS[1]:.4f} |" in " ".join(card.split())
    assert "the first 200 pairs of each task" in card
    report["milestones"] = {}
    assert "Results" not in render_milestone_card(report, "student", facts)


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ({"student": "best", "control": "best"}, "The finished control and student have the"),
        ({"student": "last", "control": "best"}, "The finished control has the weights of the"),
        ({"student": "last", "control": "last"}, None),
    ],
)
def test_the_best_evaluations_weights_are_told_of_where_they_are_kept(
    run: Path, kept: dict[str, str], told: str | None
) -> None:
    """`keep: last` leaves those of the last step."""
    for model, which in kept.items():
        path = run / model / "training.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kept": which}))
    page = render_markdown(collect_report(run))
    assert ("best evaluation" in page) == (told is not None)
    assert told is None or told in page


def test_what_was_not_measured_is_told_of(run: Path) -> None:
    for name in ("chck_1M", "chck_2M", "chck_10M"):
        (run / "milestones" / "student" / name).mkdir(parents=True)
    folder = run / "evaluation" / "milestones" / "student"
    (folder / "chck_2M.json").unlink()
    (folder / "chck_3M.json").unlink()  # which nobody can measure any more
    report = collect_report(run)
    assert [one["name"] for one in report["milestones"]["student"]] == ["chck_1M", "chck_10M"]
    assert report["unfinished"]["missing"] == [
        "the evaluation of 1 of the milestones of the student"
    ]


def test_a_measurement_that_goes_while_the_report_is_made_is_one_that_is_not_there(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is started with another `evaluation` removes it, whoever reads."""
    folder = run / "evaluation"
    going = [folder / "control.json", folder / "milestones" / "student" / "chck_2M.json"]
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path in going:
            path.unlink()
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    report = collect_report(run)
    kept = [one["name"] for one in report["milestones"]["student"]]
    assert kept == ["chck_1M", "chck_3M", "chck_10M"]
    assert report["models"]["control"]["dev_ce"] is None
    assert "the evaluation of the control" in report["unfinished"]["missing"]


@pytest.mark.parametrize("evaluation", [None, {"samples": 0}, {"milestones": None}])
def test_without_them_nothing_is_said(
    make_run: Callable[..., Path], evaluation: dict[str, Any] | None
) -> None:
    """Also of a run whose job has no such part: one of before."""
    changes = {} if evaluation is None else {"evaluation": evaluation}
    run = make_run(**changes)
    if evaluation is None:
        shutil.rmtree(run / "evaluation" / "milestones")
    report = collect_report(run)
    assert report["milestones"] == {}
    assert view_of(report, {}).milestones == []
    assert "Milestones" not in render_markdown(report)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_pairs_per_task": None, "dev_windows": None}, "what the finished models"),
        ({"max_pairs_per_task": None, "dev_windows": 1000}, "at most 1,000 development windows"),
        ({"max_pairs_per_task": 5, "dev_windows": 9}, "5 pairs of each task and at most 9 dev"),
    ],
)
def test_on_how_much_is_said(
    make_run: Callable[..., Path], asked: dict[str, int | None], said: str
) -> None:
    assert said in render_markdown(collect_report(make_run(evaluation={"milestones": asked})))
