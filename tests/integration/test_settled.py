"""What a job leaves open (`auto`) is found out at the first start, and done so ever after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

STUDENT, CONTROL = "student on 1 cpu ranks", "control on 1 cpu ranks"


@pytest.fixture(scope="module")
def run_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_job: Callable[..., Path],
    run_alone: Callable[..., Any],
) -> Path:
    """A run whose student was started before, on a machine with little memory."""
    folder = tmp_path_factory.mktemp("settled")
    run_dir = folder / "runs" / "tiny-1"
    run_dir.mkdir(parents=True)
    earlier = {STUDENT: {"micro_batch": 2, "compile": "none"}}
    (run_dir / "settled.json").write_text(json.dumps(earlier), encoding="utf-8")
    ended = run_alone(
        "run", tiny_job(folder), "student.training.micro_batch=auto", "--runs", folder / "runs"
    )
    ended.assert_done()
    assert "student: micro_batch auto: 2 windows" in ended.err
    assert "control: micro_batch auto: 8 windows" in ended.err
    return run_dir


def test_what_was_found_before_is_kept(run_dir: Path) -> None:
    settled = json.loads((run_dir / "settled.json").read_text())
    assert settled[STUDENT] == {"micro_batch": 2, "compile": "none"}
    assert settled[CONTROL] == {"micro_batch": 8, "compile": "none"}, "a tiny model fits whole"


def test_the_report_says_what_was_found(run_dir: Path) -> None:
    report = json.loads((run_dir / "report" / "report.json").read_text())
    assert report["environment"]["settled"][STUDENT]["micro_batch"] == 2
    assert report["environment"]["settled"][CONTROL]["micro_batch"] == 8


def test_a_compiler_used_before_and_missing_now_is_an_error(
    tmp_path: Path, tiny_job: Callable[..., Path], run_alone: Callable[..., Any]
) -> None:
    run_dir = tmp_path / "runs" / "tiny-1"
    run_dir.mkdir(parents=True)
    earlier = {"teachers/gpt2 on 1 cpu ranks": {"compile": "all"}}
    (run_dir / "settled.json").write_text(json.dumps(earlier), encoding="utf-8")
    words = ("run", tiny_job(tmp_path), "--runs", tmp_path / "runs")
    ended = run_alone(*words, env={"CXX": "no-such-compiler"})
    assert ended.code == 2
    assert "got no C++ compiler on this machine, for 'all'" in ended.err
    assert "or set deepspeed.compile=none" in ended.err
    assert "Traceback" not in ended.err


def test_it_is_no_part_of_the_experiment(run_dir: Path) -> None:
    assert "micro_batch: auto" in (run_dir / "job.yaml").read_text()
