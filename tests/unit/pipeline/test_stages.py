"""The stages of a run that shares its store, or ends between two of its measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from babyllama_ds.corpus.prepare import Corpus, CorpusEntries
from babyllama_ds.errors import Stopped
from babyllama_ds.pipeline.measuring import Measurer
from babyllama_ds.pipeline.stages import Pipeline
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store


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
    pipeline(tmp_path).evaluate(models, corpus)
    assert results(tmp_path) == sorted(models)
    measuring.stop_at = "student"
    again = pipeline(tmp_path, "evaluation.dev_windows=3")
    with pytest.raises(Stopped):
        again.evaluate(models, corpus)
    assert results(tmp_path) == ["big"]
    measuring.stop_at, measuring.measured = None, []
    again.evaluate(models, corpus)
    assert measuring.measured == ["student", "control"]  # what was measured anew still stands
    found = [json.loads((tmp_path / "run/evaluation" / f"{m}.json").read_text()) for m in models]
    assert [each["model"] for each in found] == list(models)


def test_a_teacher_that_another_run_finished_has_no_beginning_here(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 9 while another run waited for it, which then trained it to its end."""
    killed = pipeline(tmp_path)
    (teacher,) = killed.job.teachers[:1]
    stage = f"teachers/{teacher.name}"
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    lines = [{"stage": stage, "step": 9}, {"stage": "teachers/own", "step": 24}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(directory: Path) -> None:
        (directory / "training.json").write_text(json.dumps({"steps": 24}))

    monkeypatch.setattr(Pipeline, "_teacher_key", lambda *_: "key")
    entry = killed.store.build("teachers", "key", make)
    # What that one left, if it was killed between the end and the checkpoints' removal.
    building = killed.store.building_place("teachers", "key")
    (building / "step-00000024").mkdir()
    assert killed.teacher(teacher, corpus) == entry
    assert [json.loads(line)["stage"] for line in metrics.read_text().splitlines()] == [
        "teachers/own"
    ]
    assert (tmp_path / "run" / stage / "training.json").exists()
    assert not building.exists()
