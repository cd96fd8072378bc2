"""Fine-tuning that is ended goes on with the next task; wrong suites are told before any training.

One rank, in this process, through the real pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.errors import DataError, JobError
from babyllama_ds.evaluation import fine_tuning
from suites import TASKS, asked, write_suite

pytestmark = pytest.mark.usefixtures("process_as_it_was")


def evaluation(run_dir: Path, model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "evaluation" / f"{model}.json").read_text())
    return found


def test_trainings_that_had_ended_are_not_done_again(
    begin: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = asked(write_suite(tmp_path / "suite"), epochs=2, teachers=False)
    learn, begun = fine_tuning.fine_tune, []

    def killed_at_the_third(learner: Any, of: Any, task: Any, *words: Any, **more: Any) -> Any:
        begun.append(task.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return learn(learner, of, task, *words, **more)

    monkeypatch.setattr(fine_tuning, "fine_tune", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        begin(suite)
    run = begin(suite)
    assert len(begun) == 4
    assert begun[2] == begun[3]
    assert "fine_tuning" not in evaluation(run, "one")
    whole = evaluation(run, "student")["fine_tuning"]["toy"]
    assert set(whole["tasks"]) == set(TASKS)


# -- what is wrong, told before anything is trained ------------------------------------------------


def told_at_once(begin: Callable[..., Path], tmp_path: Path, *overrides: str) -> str:
    with pytest.raises((JobError, DataError)) as caught:
        begin(*overrides)
    assert not list((tmp_path / "runs").rglob("model.safetensors"))
    return str(caught.value)


def test_files_that_are_wrong(begin: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    with (folder / "rte.valid.jsonl").open("a") as stream:
        stream.write('{"sentence1": "a"}\n')
    told = told_at_once(begin, tmp_path, asked(folder))
    assert f"{folder}/rte.valid.jsonl:25: sentence2: got nothing" in told


def test_examples_longer_than_the_models_positions(
    begin: Callable[..., Path], tmp_path: Path
) -> None:
    suite = asked(write_suite(tmp_path / "suite"), max_tokens=100)
    told = told_at_once(begin, tmp_path, suite, "student.model.max_positions=64")
    assert "evaluation.fine_tuning.toy.max_tokens: got 100, expected at most 64" in told
    assert "raise student.model.max_positions" in told
    of_teacher = [suite, "teachers.one.model.max_positions=64"]
    assert "the positions of teachers/one" in told_at_once(begin, tmp_path, *of_teacher)
    # A teacher that learns nothing needs no more.
    alone = asked(tmp_path / "suite", max_tokens=100, teachers=False, epochs=1)
    run = begin(alone, *of_teacher[1:])
    assert "fine_tuning" in evaluation(run, "student")


def test_a_model_that_diverges_is_told_with_the_task(
    begin: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("babyllama_ds.evaluation.classifier.INITIAL_STD", float("inf"))
    suite = asked(write_suite(tmp_path / "suite"), teachers=False)
    with pytest.raises(Exception, match=r"student: toy/.*: got a training loss of nan"):
        begin(suite)
    (state,) = (tmp_path / "runs").glob("*/state.json")
    assert json.loads(state.read_text())["status"] == "failed"
