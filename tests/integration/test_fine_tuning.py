"""Fine-tuning in a run and at the command line: every model learns every task, once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import cli
from suites import TASKS, asked, write_suite

MODELS = ("gpt2", "llama", "student", "control")


# -- on two ranks, and again on one ----------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tuned(once: Any, copy_of_finished: Any, run_ranks: Any, run_alone: Any) -> Any:
    """The finished run on two ranks; then on one, from nothing but its models."""

    def make(scene: Any) -> list[Any]:
        copy_of_finished(scene)
        words = (scene.job, "--runs", scene.runs, asked(write_suite(scene.folder / "suite")))
        return [run_ranks(*words), run_alone("run", *words)]

    return once("fine_tuned", make)


def evaluation(run_dir: Path, model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "evaluation" / f"{model}.json").read_text())
    return found


@pytest.mark.launch
def test_every_model_learns_every_task_and_nothing_is_trained_again(fine_tuned: Any) -> None:
    first, again = fine_tuned.ended
    first.assert_done()
    assert ": training" not in first.err
    for model in MODELS:
        suite = evaluation(fine_tuned.run_dir, model)["fine_tuning"]["toy"]
        assert tuple(suite["tasks"]) == TASKS
        for task in suite["tasks"].values():
            assert (task["examples"], len(task["predictions"]), len(task["labels"])) == (24, 1, 24)
            assert 0 < task["epochs"][0] <= 10
    kept = fine_tuned.runs / "store" / "classifiers"
    assert len([entry for entry in kept.iterdir() if entry.is_dir()]) == len(MODELS) * len(TASKS)
    again.assert_done()
    done = [line for line in again.err.splitlines() if "evaluation of" in line]
    assert len([line for line in done if "milestones/" not in line]) == len(MODELS)
    assert "done before" in again.err


@pytest.mark.launch
def test_a_model_by_itself_learns_what_it_did_in_the_run(
    fine_tuned: Any, run_alone: Callable[..., Any]
) -> None:
    """`evaluate` has the suite's defaults, and so does the job, but for the tokens of an example,
    of which none has so many."""
    suite = f"toy={fine_tuned.folder / 'suite'}"
    ended = run_alone(
        *("evaluate", fine_tuned.run_dir, "--fine-tune", suite, "--tasks", "rte", "--json"),
        *("--length", "32", "--max-tokens", "60"),
    )
    ended.assert_done()
    alone = json.loads(ended.out)["fine_tuning"]["toy"]["tasks"]["rte"]
    of_run = evaluation(fine_tuned.run_dir, "student")["fine_tuning"]["toy"]["tasks"]["rte"]
    assert alone == of_run


# -- asked to stop ---------------------------------------------------------------------------------


@pytest.mark.launch
def test_what_the_launcher_tells_one_rank_ends_both(
    once: Any, copy_of_finished: Any, start_launcher: Callable[..., Any], run_alone: Any
) -> None:
    """It tells the second only half a minute later, when it has killed the first."""

    def make(scene: Any) -> list[Any]:
        copy_of_finished(scene)
        suite = write_suite(scene.folder / "suite", lines=200)
        long = asked(suite, epochs=100_000, patience=None, teachers=False)
        running = start_launcher(scene.job, "--runs", scene.runs, long)
        kept = scene.runs / "store" / "classifiers"
        running.wait_until(lambda: len(list(kept.glob(".*.lock.json"))) == 2, "two trainings")
        os.kill(running.pid_of("deepspeed.launcher.launch"), signal.SIGTERM)
        stopped = running.end()
        state = (scene.run_dir / "state.json").read_text()
        (scene.folder / "state.json").write_text(state)
        short = asked(suite, epochs=1, teachers=False)
        return [stopped, run_alone("run", scene.job, "--runs", scene.runs, short)]

    scene = once("fine_tuning_stopped", make)
    state = json.loads((scene.folder / "state.json").read_text())
    assert (state["status"], state["reason"]) == ("stopped", "SIGTERM")
    scene.ended[1].assert_done()
    assert "fine_tuning" in evaluation(scene.run_dir, "student")


# -- at the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "rte"], "--tasks: got 0 directories by --fine-tune, expected one"),
        (["--fine-tune", "a b=DIR"], "got 'a b', expected a name of letters"),
        (["--fine-tune", "toy"], "got 'toy', expected NAME=DIR"),
        (["--fine-tune", "toy=DIR", "toy=DIR"], "--fine-tune: got two called toy"),
        (["--fine-tune", "toy=DIR", "--tasks", "x"], "x.train.jsonl: got no such file"),
        (["--fine-tune", "toy=DIR", "--max-tokens", "2"], "got '2', expected a whole number, 3 or"),
        (["--fine-tune", "toy=DIR", "--max-tokens", "500"], "--max-tokens: got examples of 500"),
    ],
)
@pytest.mark.launch
def test_wrong_words(
    words: list[str], told: str, fine_tuned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = str(fine_tuned.folder / "suite")
    given = [word.replace("DIR", suite) for word in words]
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main(["evaluate", str(fine_tuned.run_dir), *given]))
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
