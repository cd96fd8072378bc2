"""Fine-tuning in a run: every model learns every task, once, and goes on where it was ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import cli
from babyllama_ds.errors import DataError, JobError
from babyllama_ds.evaluation import fine_tuning
from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.loading import load_job

MODELS = ("gpt2", "llama", "student", "control")
TASKS = ("cola", "rte", "wsc")


def write_suite(folder: Path, *, lines: int = 24) -> Path:
    """Three tasks of the tiny job's language: is it paint, the same person twice, and whose."""
    folder.mkdir(parents=True)
    people, acts = ("mara", "old tim"), ("paints", "hides")
    for part in ("train", "valid"):
        records: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
        for i in range(lines):
            who, act, other = people[i % 2], acts[i // 2 % 2], people[i // 4 % 2]
            text = f"{who} {act} the long ladder {i}."
            records["cola"].append({"sentence": text, "label": int(act == "paints")})
            twice = {"sentence1": text, "sentence2": f"{other} laughs."}
            records["rte"].append({**twice, "label": int(who == other)})
            spans = {"text": text, "span1_text": other, "span2_text": act}
            records["wsc"].append({**spans, "label": int(who == other)})
        for task, of_task in records.items():
            text = "".join(json.dumps(record) + "\n" for record in of_task)
            (folder / f"{task}.{part}.jsonl").write_text(text)
    return folder


def asked(folder: Path, **fields: Any) -> str:
    # The tiny models have 64 positions.
    suite = {"name": "toy", "path": str(folder), "max_tokens": 60, **fields}
    return f"evaluation.fine_tuning=[{json.dumps(suite)}]"


# -- on two ranks, and again on one ----------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tuned(once: Any, copy_of_finished: Any, launch: Any, run_alone: Any) -> Any:
    """The finished run on two ranks; then on one, from nothing but its models."""

    def make(scene: Any) -> list[Any]:
        copy_of_finished(scene)
        words = (scene.job, "--runs", scene.runs, asked(write_suite(scene.folder / "suite")))
        return [launch(*words), run_alone("run", *words)]

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
    assert sum("evaluation of" in line for line in again.err.splitlines()) == len(MODELS)
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


# -- ended and started again -----------------------------------------------------------------------


@pytest.fixture
def begin(
    tmp_path: Path, tiny_job: Callable[..., Path], process_as_it_was: None
) -> Callable[..., Path]:
    """One rank, one teacher `one`, a suite for the student alone unless asked otherwise."""
    model = {"kind": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model |= {"intermediate_size": 24, "max_positions": 64}
    training = {"batch_windows": 8, "epochs": 1.0, "max_steps": 2, "learning_rate": 1e-2}
    job = tiny_job(
        tmp_path / "job",
        teachers=[{"name": "one", "model": model, "training": training}],
        student={"model": model, "training": training},
        control=None,
        evaluation={"dev_windows": 8},
    )
    return lambda *overrides: run_job(load_job(job, list(overrides)), runs=tmp_path / "runs")


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
    told = told_at_once(begin, tmp_path, suite)
    assert "evaluation.fine_tuning.toy.max_tokens: got 100, expected at most 64" in told
    assert "raise student.model.max_positions" in told
    student = [suite, "student.model.max_positions=128"]
    assert "the positions of teachers/one" in told_at_once(begin, tmp_path, *student)


def test_a_model_that_diverges_is_told_with_the_task(
    begin: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("babyllama_ds.evaluation.classifier.INITIAL_STD", float("inf"))
    suite = asked(write_suite(tmp_path / "suite"), teachers=False)
    with pytest.raises(Exception, match=r"student: toy/.*: got a training loss of nan"):
        begin(suite)
    (state,) = (tmp_path / "runs").glob("*/state.json")
    assert json.loads(state.read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "rte"], "--tasks: got 0 directories by --fine-tune, expected one"),
        (["--fine-tune", "a b=DIR"], "got 'a b', expected a name of letters"),
        (["--fine-tune", "toy"], "got 'toy', expected NAME=DIR"),
        (["--fine-tune", "toy=DIR", "toy=DIR"], "--fine-tune: got two called toy"),
        (["--fine-tune", "toy=DIR", "--tasks", "x"], "x.train.jsonl: got no such file"),
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
