"""metrics.jsonl, TensorBoard, what people see; a resumed training takes back what it overtook."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from babyllama_ds import ranks
from babyllama_ds.errors import RunError
from babyllama_ds.training.metrics import (
    MetricsLog,
    duration,
    go_back,
    logged_of,
    tell_as_done,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_log(run_dir: Path, *, first_step: int = 0, stage: str = "student") -> MetricsLog:
    run_dir.mkdir(exist_ok=True)
    return MetricsLog(run_dir, stage, first_step=first_step, total_steps=9)


def scalars(run_dir: Path, stage: str, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run_dir / "tensorboard" / stage))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


# -- what is kept ----------------------------------------------------------------------------------


def test_a_line_and_a_scalar_for_each_written_step(tmp_path: Path) -> None:
    with open_log(tmp_path, stage="teachers/a") as metrics:
        metrics.write(1, {"epoch": 0.5, "tokens": 32, "loss": 2.5, "lr": 1e-3})
        metrics.write(2, {"tokens": 64, "dev_ce": 2.25})
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"stage": "teachers/a", "step": 1, "epoch": 0.5, "tokens": 32, "loss": 2.5, "lr": 1e-3},
        {"stage": "teachers/a", "step": 2, "tokens": 64, "dev_ce": 2.25},
    ]
    assert scalars(tmp_path, "teachers/a", "loss") == [(1, 2.5)]
    assert scalars(tmp_path, "teachers/a", "dev_ce") == [(2, 2.25)]
    board = EventAccumulator(str(tmp_path / "tensorboard" / "teachers" / "a"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["dev_ce", "loss", "lr"]


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    with open_log(tmp_path) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.advance()
        metrics.show(1, {"loss": 1.0}, tokens_per_s=1.0, seconds_left=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_an_error_of_the_run(tmp_path: Path) -> None:
    with open_log(tmp_path) as metrics:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"got ENOSPC .*, expected a place that can be written"):
            metrics.write(1, {"loss": 1.0})


def test_a_board_that_cannot_be_written_neither(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(RunError, match=f"{tmp_path}: got "):
        open_log(tmp_path)


def test_what_was_written_before_an_error_is_there(tmp_path: Path) -> None:
    """As before a stop, which leaves as an error."""
    with suppress(KeyError), open_log(tmp_path) as metrics:
        metrics.write(1, {"loss": 2.0})
        raise KeyError
    assert scalars(tmp_path, "student", "loss") == [(1, 2.0)]


def test_a_resumed_training_overwrites_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with open_log(tmp_path) as metrics:
        for step in (1, 2, 3, 4, 5):
            metrics.write(step, {"loss": 1.0})
    with open_log(tmp_path, first_step=3) as metrics:
        for step in (4, 5, 6):
            metrics.write(step, {"loss": 2.0})
    found = [(line["step"], line["loss"]) for line in lines_of(tmp_path / "metrics.jsonl")]
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert found == expected
    assert scalars(tmp_path, "student", "loss") == expected


def test_lost_boards_are_written_anew_from_the_file(tmp_path: Path) -> None:
    """A first node that was replaced has the metrics of all stages, and no TensorBoard's files."""
    for stage, loss in (("teachers/gpt2", 3.0), ("student", 2.0)):
        with open_log(tmp_path, stage=stage) as metrics:
            for step in (1, 2, 3):
                metrics.write(step, {"loss": loss / step, "tokens": 8 * step, "epoch": 0.1})
    before = {stage: scalars(tmp_path, stage, "loss") for stage in ("teachers/gpt2", "student")}
    shutil.rmtree(tmp_path / "tensorboard")
    with open_log(tmp_path, first_step=2) as metrics:
        metrics.write(3, {"loss": 9.0})
    assert scalars(tmp_path, "teachers/gpt2", "loss") == before["teachers/gpt2"]
    assert scalars(tmp_path, "student", "loss") == [*before["student"][:2], (3, 9.0)]
    # What is there is left alone.
    files = sorted((tmp_path / "tensorboard" / "teachers/gpt2").iterdir())
    with open_log(tmp_path, first_step=3):
        pass
    assert sorted((tmp_path / "tensorboard" / "teachers/gpt2").iterdir()) == files


KILLED_WHILE_BOARDS_ARE_WRITTEN = """
import os, sys
from pathlib import Path
from babyllama_ds.training import metrics

plot, left = metrics._plot, int(sys.argv[2])

def dying(*given):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    plot(*given)

metrics._plot = dying
logged = "".join(f'{{"stage": "theirs", "step": {n}, "loss": {1 / n}}}\\n' for n in range(1, 30))
metrics.tell_as_done(Path(sys.argv[1]), "teachers/a", logged)
"""


@pytest.mark.parametrize("plotted", [0, 20, 100])
def test_a_kill_while_boards_are_written_leaves_none_by_half(plotted: int, tmp_path: Path) -> None:
    """The next start finds the lines as they should be: the boards have them, too."""
    command = [sys.executable, "-c", KILLED_WHILE_BOARDS_ARE_WRITTEN, str(tmp_path), str(plotted)]
    assert subprocess.run(command, check=False).returncode == (9 if plotted < 29 else 0)
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": "student", "ste')  # cut short
    tell_as_done(tmp_path, "teachers/a", logged_of(tmp_path, "teachers/a"))
    with open_log(tmp_path):
        pass
    assert [step for step, _ in scalars(tmp_path, "teachers/a", "loss")] == [*range(1, 30)]
    folders = sorted(path for path in (tmp_path / "tensorboard").rglob("*") if path.is_dir())
    assert [folder.name for folder in folders] == ["student", "teachers", "a"]


def test_forgetting_leaves_other_stages_and_drops_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [
        '{"stage": "teachers/a", "step": 9, "loss": 1}',
        '{"stage": "control", "step": 70, "loss": 4}',
        '{"stage": "student", "step": 3,   "loss": 2}',  # byte for byte
        '{"stage": "student", "step": 4, "loss": 3}',
    ]
    later = '{"stage": "student", "step": 5, "loss": 5}'
    cut_short = '{"stage": "student", "step": 4, "lo'
    path.write_text("\n".join([kept[0], *kept[2:], later, kept[1], cut_short]))
    path.write_bytes(path.read_bytes() + b"\n\0\0\0\n\xff\xfe")  # as after a power cut
    with open_log(tmp_path, first_step=4):
        pass
    assert path.read_text() == "".join(line + "\n" for line in kept)
    go_back(tmp_path, "student", [])
    assert [line["stage"] for line in lines_of(path)] == ["teachers/a", "control"]
    go_back(tmp_path / "none", "student", [])
    assert not (tmp_path / "none").exists()


# -- steps of another run --------------------------------------------------------------------------


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """A run that died behind step 4 of its teacher `a`, another one done before; its folder."""
    run_dir = tmp_path / "dead"
    with open_log(run_dir, stage="teachers/other") as metrics:
        metrics.write(1, {"loss": 8.0})
    with open_log(run_dir, stage="teachers/a") as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"tokens": 32 * step, "loss": 1 / step})
        metrics.write(3, {"tokens": 96, "dev_ce": 2.5})
    return run_dir


@pytest.mark.parametrize("begun", [None, 1, 5])
def test_what_another_run_logged_is_taken_over(
    begun: int | None, dead: Path, tmp_path: Path
) -> None:
    """By one that waited, or had made some of these steps itself, or more, before it died."""
    logged = logged_of(dead, "teachers/a")
    assert len(logged.splitlines()) == 4
    with open_log(tmp_path / "own", stage="teachers/own") as metrics:
        metrics.write(2, {"loss": 7.0})
    if begun:
        with open_log(tmp_path / "own", stage="teachers/b") as metrics:
            for step in range(1, begun + 1):
                metrics.write(step, {"loss": 100.0 + step})
    with MetricsLog(
        tmp_path / "own", "teachers/b", first_step=3, total_steps=9, logged=lambda: logged
    ) as metrics:
        metrics.write(4, {"tokens": 128, "loss": 0.25})
    assert lines_of(tmp_path / "own" / "metrics.jsonl") == [
        {"stage": "teachers/own", "step": 2, "loss": 7.0},
        *({"stage": "teachers/b", "step": n, "tokens": 32 * n, "loss": 1 / n} for n in (1, 2, 3)),
        {"stage": "teachers/b", "step": 3, "tokens": 96, "dev_ce": 2.5},
        {"stage": "teachers/b", "step": 4, "tokens": 128, "loss": 0.25},
    ]
    assert scalars(tmp_path / "own", "teachers/b", "loss") == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    assert scalars(tmp_path / "own", "teachers/b", "dev_ce") == [(3, 2.5)]
    assert scalars(tmp_path / "own", "teachers/own", "loss") == [(2, 7.0)]


def test_a_run_that_goes_on_by_itself_keeps_its_boards(dead: Path) -> None:
    """And of its lines those that the checkpoint has: an evaluation behind it is not in it."""
    logged = "".join(logged_of(dead, "teachers/a").splitlines(keepends=True)[:3])
    before = sorted((dead / "tensorboard" / "teachers" / "a").iterdir())
    go_back(dead, "teachers/a", logged.splitlines())
    assert sorted((dead / "tensorboard" / "teachers" / "a").iterdir()) == before
    assert logged_of(dead, "teachers/a") == logged
    assert logged_of(dead, "teachers/other") != ""


@pytest.mark.parametrize("begun", [0, 2, 3, 5])
def test_what_another_run_finished_is_told_here(begun: int, dead: Path, tmp_path: Path) -> None:
    """By one that had made none of its steps, some, all, or (until another end) more."""
    logged = logged_of(dead, "teachers/a")
    for stage in ["teachers/own", *["teachers/b"] * bool(begun)]:
        with open_log(tmp_path / "own", stage=stage) as metrics:
            for step in range(1, begun + 1):
                metrics.write(step, {"loss": 100.0 + step})
    tell_as_done(tmp_path / "own", "teachers/b", logged)
    path = tmp_path / "own" / "metrics.jsonl"
    assert [line for line in lines_of(path) if line["stage"] == "teachers/b"] == [
        *({"stage": "teachers/b", "step": n, "tokens": 32 * n, "loss": 1 / n} for n in (1, 2, 3)),
        {"stage": "teachers/b", "step": 3, "tokens": 96, "dev_ce": 2.5},
    ]
    assert scalars(tmp_path / "own", "teachers/b", "loss") == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3)
    ]
    own = [(step, 100.0 + step) for step in range(1, begun + 1)]
    assert [
        (line["step"], line["loss"]) for line in lines_of(path) if line["stage"] == "teachers/own"
    ] == own

    # The next start finds it so.
    before = path.read_bytes()
    boards = {one: one.read_bytes() for one in (tmp_path / "own" / "tensorboard").rglob("*tfev*")}
    tell_as_done(tmp_path / "own", "teachers/b", logged)
    assert path.read_bytes() == before
    assert boards
    assert all(one.read_bytes() == content for one, content in boards.items())


def test_nothing_is_told_of_what_was_loaded(tmp_path: Path) -> None:
    tell_as_done(tmp_path / "none", "teachers/loaded", "")  # no run yet
    assert not (tmp_path / "none").exists()


def test_a_disk_that_refuses_what_another_run_finished(dead: Path, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(RunError, match="expected a place that can be written"):
        tell_as_done(tmp_path, "teachers/b", logged_of(dead, "teachers/a"))


# -- what people see -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (75, "1:15"),
        (3599.7, "1:00:00"),
        (3675, "1:01:15"),
        (90_061, "25:01:01"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


SHOWN = {"loss": 3.14159, "ce": 2.0, "note": "x", "none": None}


def test_without_a_terminal_there_are_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    with caplog.at_level(logging.INFO), open_log(tmp_path) as metrics:
        metrics.advance()
        metrics.show(1, SHOWN, tokens_per_s=12345.6, seconds_left=75.0)
    (record,) = [one for one in caplog.records if one.name == "babyllama_ds.training.metrics"]
    assert record.getMessage() == "student  step 1/9  loss 3.142  ce 2  12,346 tok/s  1:15 left"
    assert stderr.getvalue() == ""


def test_the_machines_part_is_shown_where_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO), open_log(tmp_path) as metrics:
        metrics.show(1, SHOWN, tokens_per_s=12345.6, mfu=0.3149, seconds_left=75.0)
    assert "12,346 tok/s  mfu 0.31  1:15 left" in caplog.text


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    with caplog.at_level(logging.INFO), open_log(tmp_path, first_step=4) as metrics:
        for step in (5, 6):
            metrics.advance()
            metrics.show(step, SHOWN, tokens_per_s=12345.6, seconds_left=75.0)
    assert not [one for one in caplog.records if one.name.startswith("babyllama_ds")]
    bar = stderr.getvalue()
    assert "student:" in bar
    assert "6/9" in bar
    assert "loss 3.142  ce 2  12,346 tok/s" in bar


def test_only_numbers_are_plotted(tmp_path: Path) -> None:
    with open_log(tmp_path) as metrics:
        metrics.write(1, {"loss": math.pi, "what": "text", "nothing": None})
    board = EventAccumulator(str(tmp_path / "tensorboard" / "student"))
    board.Reload()
    assert board.Tags()["scalars"] == ["loss"]
