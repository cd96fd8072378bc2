"""What is done is not done again: by the same command, by another evaluation, by another job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.files import sha256_file

pytestmark = pytest.mark.launch

STAGES = ("teachers/gpt2", "teachers/llama", "student", "control")
MODELS = ("gpt2", "llama", "student", "control")


def weights(runs: Path) -> dict[str, tuple[str, int]]:
    """Hash and modification time of every model of a runs folder."""
    found = sorted(path for path in runs.rglob("model.safetensors"))
    facts = {
        str(path.relative_to(runs)): (sha256_file(path), path.stat().st_mtime_ns) for path in found
    }
    assert sum(name.startswith("store/teachers/") for name in facts) >= 2
    return facts


def told(ended: Any, words: str) -> int:
    return sum(line.endswith(words) for line in ended.err.splitlines())


# -- the same command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(once: Any, copy_of_finished: Any, run_ranks: Callable[..., Any]) -> Any:
    def make(scene: Any) -> list[Any]:
        copy_of_finished(scene)
        return [run_ranks(scene.job, "--runs", scene.runs)]

    return once("again", make)


def test_same_command_skips_every_stage(again: Any) -> None:
    again.ended[0].assert_done()
    for stage in STAGES:
        assert told(again.ended[0], f"  {stage}: done before") == 1
    for model in MODELS:
        assert told(again.ended[0], f"  evaluation of {model}: done before") == 1
    assert ": training" not in again.ended[0].err
    assert json.loads((again.run_dir / "state.json").read_text()) == {"status": "done"}


def test_same_command_touches_no_model_and_no_measurement(again: Any, finished: Any) -> None:
    assert weights(again.runs) == weights(finished.runs)
    for name in ("metrics.jsonl", "environment.json", "stages.json", "job.yaml"):
        assert (again.run_dir / name).read_bytes() == (finished.run_dir / name).read_bytes()
    for model in MODELS:
        mine, theirs = (
            (scene.run_dir / "evaluation" / f"{model}.json").read_bytes()
            for scene in (again, finished)
        )
        assert mine == theirs


def test_report_says_the_same_again(again: Any, finished: Any) -> None:
    mine, theirs = (
        json.loads((scene.run_dir / "report" / "report.json").read_text())
        for scene in (again, finished)
    )
    assert mine == theirs


# -- another evaluation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured_anew(once: Any, copy_of_finished: Any, run_alone: Callable[..., Any]) -> Any:
    """Now on one rank: the rank count is no part of what a stage is made from."""

    def make(scene: Any) -> list[Any]:
        copy_of_finished(scene)
        pairs = scene.folder / "pairs"
        pairs.mkdir()
        for number in range(3):
            pair = {"sentence_good": "mara mends", "sentence_bad": f"mara mends{'  ?' * number}"}
            with (pairs / "odd_ends.jsonl").open("a") as stream:
                stream.write(json.dumps({**pair, "UID": "odd_ends"}) + "\n")
        world = scene.folder / "world"
        world.mkdir()
        boxes = {"input_prefix": "mara mends a kite and", "options": [" sees", " a kite", " it"]}
        (world / "boxes.jsonl").write_text(json.dumps({**boxes, "numops": 1}) + "\n")
        world_of_her = {"Context1": "mara has a kite.", "Domain": "things"}
        targets = {"Target1": "she mends it.", "Target2": "she mends her."}
        (world / "ewok.jsonl").write_text(json.dumps({**world_of_her, **targets}) + "\n")
        benchmarks = ", ".join(
            f"{{name: {d}, path: {p}}}" for d, p in (("ends", pairs), ("world", world))
        )
        override = f"evaluation.minimal_pairs=[{benchmarks}]"
        return [run_alone("run", scene.job, "--runs", scene.runs, override)]

    return once("measured_anew", make)


def test_another_evaluation_retrains_nothing(measured_anew: Any, finished: Any) -> None:
    measured_anew.ended[0].assert_done()
    for stage in STAGES:
        assert told(measured_anew.ended[0], f"  {stage}: done before") == 1
    assert ": training" not in measured_anew.ended[0].err
    assert weights(measured_anew.runs) == weights(finished.runs)


def test_another_evaluation_measures_every_model(measured_anew: Any, finished: Any) -> None:
    report = json.loads((measured_anew.run_dir / "report" / "report.json").read_text())
    before = json.loads((finished.run_dir / "report" / "report.json").read_text())
    for model in MODELS:
        scores = report["models"][model]["minimal_pairs"]
        # The first pair is twice the same sentence: a tie, which counts as wrong.
        assert set(scores) == {"ends", "world"}
        assert scores["ends"] < 0.67
        # One rank or two: the same windows.
        dev_ce = before["models"][model]["dev_ce"]
        assert report["models"][model]["dev_ce"] == pytest.approx(dev_ce, rel=1e-6)
    assert report["minimal_pairs"]["ends"]["tasks"]["odd_ends"]["ties"]["student"] == 1


def test_choices_are_a_benchmark_like_others(measured_anew: Any) -> None:
    """A job's files need not be pairs: of three options guessing gets a third."""
    report = json.loads((measured_anew.run_dir / "report" / "report.json").read_text())
    tasks = report["minimal_pairs"]["world"]["tasks"]
    assert list(tasks) == ["boxes_1_ops", "things"]
    assert tasks["boxes_1_ops"]["chance"] == pytest.approx(1 / 3)
    for model in MODELS:
        found = json.loads((measured_anew.run_dir / "evaluation" / f"{model}.json").read_text())
        world = found["minimal_pairs"]["world"]
        right = [task["outcomes"] == "1" for task in world["tasks"].values()]
        assert world["accuracy"] == report["models"][model]["minimal_pairs"]["world"]
        assert world["accuracy"] == sum(right) / 2
    written = (measured_anew.run_dir / "report" / "report.md").read_text()
    assert "Guessing gives 50 %." in written
    assert "Guessing gives 41.67 %." in written  # the mean over a task of threes and one of pairs


# -- another student, beside the first ------------------------------------------------------------


@pytest.fixture(scope="module")
def other_student(
    once: Any, copy_of_finished: Any, finished: Any, run_ranks: Callable[..., Any]
) -> Any:
    """A tied student from one teacher that is there and one that is loaded: the first student."""

    def make(scene: Any) -> list[Any]:
        copy_of_finished(scene)
        loaded = f"{{name: elder, model: {{kind: pretrained, path: {finished.run_dir}/student}}}}"
        overrides = (
            "name=other",
            "student.model.tied_embeddings=true",
            "student.training.max_steps=10",
            "student.milestones=null",
            "evaluation.milestones=null",
            "control=null",
            f"teachers.1={loaded}",
        )
        return [run_ranks(scene.job, "--runs", scene.runs, *overrides)]

    return once("other_student", make)


def test_another_job_trains_no_teacher_again(other_student: Any, finished: Any) -> None:
    ended = other_student.ended[0]
    ended.assert_done()
    assert told(ended, "  teachers/gpt2: done before") == 1
    assert [line for line in ended.err.splitlines() if line.endswith(": training")] == [
        line for line in ended.err.splitlines() if line.endswith("  student: training")
    ]
    before, after = weights(finished.runs), weights(other_student.runs)
    assert {name: after[name] for name in before} == before
    mine, theirs = (
        (runs / run / "teachers" / "gpt2").resolve().name
        for runs, run in ((other_student.runs, "other"), (finished.runs, "tiny-1"))
    )
    assert mine == theirs


def test_a_shared_teacher_is_measured_once(other_student: Any, finished: Any) -> None:
    """Its file is the same to the byte, the time that it took included."""
    words = "  evaluation of gpt2: the same was measured before, found in the store"
    assert told(other_student.ended[0], words) == 1
    assert told(finished.ended[0], words) == 0
    mine, theirs = (
        (runs / run / "evaluation" / "gpt2.json").read_bytes()
        for runs, run in ((other_student.runs, "other"), (finished.runs, "tiny-1"))
    )
    assert mine == theirs
    places = [runs / "store" / "evaluations" for runs in (finished.runs, other_student.runs)]
    before, after = ({entry.parent.name for entry in p.glob("*/manifest.json")} for p in places)
    assert len(before) == len(MODELS) + 4  # and the milestones
    assert before < after


def test_loaded_teacher_is_taken_as_it_is(other_student: Any, finished: Any) -> None:
    elder = other_student.runs / "other" / "teachers" / "elder" / "model.safetensors"
    student = finished.run_dir / "student" / "model.safetensors"
    assert sha256_file(elder) == sha256_file(student)
    report = json.loads((other_student.runs / "other" / "report" / "report.json").read_text())
    before = json.loads((finished.run_dir / "report" / "report.json").read_text())
    assert set(report["models"]) == {"gpt2", "elder", "student"}
    ours, theirs = report["models"]["elder"], before["models"]["student"]
    assert ours["dev_ce"] == pytest.approx(theirs["dev_ce"], rel=1e-9)
    assert ours["params"] == theirs["params"]
    assert not ours["train_tokens"]


def test_another_student_is_another_model(
    other_student: Any, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    run = other_student.runs / "other"
    lines = [line for line in metrics(run) if "kl" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {line["stage"] for line in lines} == {"student"}
    config = json.loads((run / "student" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] == 2
