"""The stages of a run that shares its store, or ends between two of its measurements."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch

from babyllama_ds.corpus.prepare import Corpus, CorpusEntries
from babyllama_ds.errors import RunError, Stopped
from babyllama_ds.files import write_manifest
from babyllama_ds.pipeline.measuring import Measurer
from babyllama_ds.pipeline.stages import Pipeline
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store

T = TypeVar("T")


def pipeline(folder: Path, *overrides: str) -> Pipeline:
    return Pipeline(
        load_job(find_job("nursery"), overrides),
        RunDirectory(folder / "run"),
        Store(folder / "store"),
        Storages(),
        torch.device("cpu"),
        StopRequest(),
    )


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Their directories; weights and configuration are all that a measurement is known by."""
    found = {name: tmp_path / name for name in ("big", "student", "control")}
    for name, folder in found.items():
        folder.mkdir()
        (folder / "model.safetensors").write_text(name)
        (folder / "config.json").write_text("{}")
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    entries = CorpusEntries(
        tokenizer_dir=tmp_path,
        tokenizer_key="t",
        tokens_dir=tmp_path,
        tokens_key="t",
        pairs_dir=None,
    )
    return Corpus(
        entries=entries,
        tokenizer=cast(Any, None),
        shards=cast(Any, None),
        byte_lengths=cast(Any, None),
    )


class Measuring:
    """In the place of `Measurer.measure`; stops the run when it comes to a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[str] = []
        self.stop_at: str | None = None
        monkeypatch.setattr(Measurer, "measure", lambda _self, name, *_: self.measure(name))

    def measure(self, name: str) -> dict[str, Any]:
        if name == self.stop_at:
            raise Stopped("SIGTERM")
        self.measured.append(name)
        return {"model": name}


def results(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "run" / "evaluation").glob("*.json"))


def test_nothing_of_another_evaluation_stands_beside_the_new(
    tmp_path: Path, models: dict[str, Path], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference of two models is one of two measurements on the same text."""
    measuring = Measuring(monkeypatch)
    pipeline(tmp_path).evaluations.make(models, corpus)
    assert results(tmp_path) == sorted(models)
    measuring.stop_at = "student"
    again = pipeline(tmp_path, "evaluation.dev_windows=3")
    with pytest.raises(Stopped):
        again.evaluations.make(models, corpus)
    assert results(tmp_path) == ["big"]
    measuring.stop_at, measuring.measured = None, []
    again.evaluations.make(models, corpus)
    assert measuring.measured == ["student", "control"]  # what was measured anew still stands
    found = [json.loads((tmp_path / "run/evaluation" / f"{m}.json").read_text()) for m in models]
    assert [each["model"] for each in found] == list(models)


MEASURED = ("student.milestones=[9, 50]", "evaluation.milestones={dev_windows: 7}")


@pytest.fixture
def kept(tmp_path: Path) -> dict[str, Path]:
    """A finished student with two milestones."""
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    summary = {"milestones": {"chck_9": {"words": 9}, "chck_50": {"words": 50}}}
    (run / "student" / "training.json").write_text(json.dumps(summary))
    places = {name: run / "milestones" / "student" / name for name in summary["milestones"]}
    for name, place in places.items():
        place.mkdir(parents=True)
        (place / "model.safetensors").write_text(name)
        write_manifest(place, fingerprint="f")
    return places


def measured_milestones(folder: Path) -> dict[str, str]:
    """Their names, and the fingerprints of what they were measured by."""
    found = (folder / "run" / "evaluation" / "milestones").glob("*/*.json")
    return {path.stem: json.loads(path.read_text())["fingerprint"] for path in found}


def test_milestones_are_measured_after_the_models_and_once(
    tmp_path: Path,
    models: dict[str, Path],
    kept: dict[str, Path],
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measuring = Measuring(monkeypatch)
    measuring.stop_at = "milestones/student/chck_50"
    asked = pipeline(tmp_path, *MEASURED).evaluations
    with pytest.raises(Stopped):
        asked.make(models, corpus)
    assert measuring.measured == [*models, "milestones/student/chck_9"]
    measuring.stop_at, measuring.measured = None, []
    asked.make(models, corpus)
    assert measuring.measured == ["milestones/student/chck_50"]  # all else stands
    before = measured_milestones(tmp_path)
    fewer = pipeline(tmp_path, *MEASURED, "evaluation.milestones.dev_windows=5").evaluations
    fewer.make(models, corpus)
    assert measuring.measured[1:] == [f"milestones/student/{name}" for name in kept]
    after = measured_milestones(tmp_path)
    assert len({*before.values(), *after.values()}) == 4
    assert results(tmp_path) == sorted(models)


def test_milestones_that_are_gone_or_not_asked_for_have_no_measurements(
    tmp_path: Path,
    models: dict[str, Path],
    kept: dict[str, Path],
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measuring = Measuring(monkeypatch)
    asked = pipeline(tmp_path, *MEASURED).evaluations
    asked.make(models, corpus)
    shutil.rmtree(kept["chck_9"])
    asked.make(models, corpus)
    assert list(measured_milestones(tmp_path)) == ["chck_50"]
    pipeline(tmp_path).evaluations.make(models, corpus)
    assert measured_milestones(tmp_path) == {}
    assert len(measuring.measured) == len(models) + 2


def test_a_damaged_milestone_is_not_measured(
    tmp_path: Path, models: dict[str, Path], kept: dict[str, Path], corpus: Corpus
) -> None:
    (kept["chck_50"] / "model.safetensors").write_text("chck_5O")
    with pytest.raises(RunError) as caught:
        pipeline(tmp_path, *MEASURED).evaluations.make(models, corpus)
    (problem,) = caught.value.problems
    assert problem.where == str(kept["chck_50"] / "model.safetensors")
    assert problem.hint == (
        f"delete the folder {kept['chck_50']}: it is then left out, and not made anew"
    )


class TwoNodes(Storages):
    """Of the second one a milestone's weights were damaged."""

    damaged: Path

    def on_each(self, work: Callable[[], T]) -> list[T]:
        of_first, content = work(), self.damaged.read_text()
        self.damaged.write_text(content[::-1])
        try:
            return [of_first, work()]
        finally:
            self.damaged.write_text(content)


def test_a_milestone_is_whole_on_every_node(
    tmp_path: Path, models: dict[str, Path], kept: dict[str, Path], corpus: Corpus
) -> None:
    """Its ranks measure what lies there."""
    asked = pipeline(tmp_path, *MEASURED).evaluations
    TwoNodes.damaged = kept["chck_50"] / "model.safetensors"
    asked.storages = TwoNodes()
    with pytest.raises(RunError, match=f"{kept['chck_50']}/model.safetensors: got SHA-256"):
        asked.make(models, corpus)


@pytest.mark.parametrize("stopped_at", [9, 30])
def test_of_a_teacher_that_another_run_finished_that_ones_metrics_are_told(
    stopped_at: int, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while another run waited for it, which then trained it to its end: with a limit of
    time, on a slower machine, that may come before the step at which this one was."""
    killed = pipeline(tmp_path)
    (teacher,) = killed.job.teachers[:1]
    stage = f"teachers/{teacher.name}"
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    other = {"stage": "teachers/own", "step": 24}
    metrics.write_text(json_lines({"stage": stage, "step": stopped_at, "loss": 3.0}, other))

    def make(directory: Path) -> None:
        (directory / "training.json").write_text(json.dumps({"steps": 24}))
        of_it = ({"stage": "teachers/theirs", "step": n, "loss": 1.0} for n in (9, 24))
        (directory / "metrics.jsonl").write_text(json_lines(*of_it))

    monkeypatch.setattr(Pipeline, "_teacher_key", lambda *_: "key")
    entry = killed.store.build("teachers", "key", make)
    # What that one left, if it was killed between the end and the checkpoints' removal.
    building = killed.store.building_place("teachers", "key")
    (building / "step-00000024").mkdir()
    assert killed.teacher(teacher, corpus) == entry
    assert metrics.read_text() == json_lines(
        other, *({"stage": stage, "step": n, "loss": 1.0} for n in (9, 24))
    )
    assert (tmp_path / "run" / stage / "training.json").exists()
    assert not building.exists()


@pytest.mark.parametrize("step", [9, 24])
def test_a_teacher_of_an_earlier_version_tells_no_metrics(
    step: int, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that stand here stay, of a run that trained it itself to the end; the beginning of a
    training that another run made would pass for the whole."""
    run = pipeline(tmp_path)
    (teacher,) = run.job.teachers[:1]
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(json_lines({"stage": f"teachers/{teacher.name}", "step": step, "loss": 3.0}))
    board = tmp_path / "run" / "tensorboard" / "teachers" / teacher.name
    board.mkdir(parents=True)
    before = metrics.read_text()
    monkeypatch.setattr(Pipeline, "_teacher_key", lambda *_: "key")

    def make(entry: Path) -> None:
        (entry / "training.json").write_text(json.dumps({"steps": 24}))

    run.store.build("teachers", "key", make)
    run.teacher(teacher, corpus)
    assert metrics.read_text() == (before if step == 24 else "")
    assert board.exists() == (step == 24)


def json_lines(*objects: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)
