"""What a trial tries and counts of a job, and what it makes of the times that it is told."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from babyllama_ds.errors import MachineError
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.evaluation.pair_files import Task
from babyllama_ds.pipeline import trial as module
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.making import Maker
from babyllama_ds.pipeline.trial import TIMED_BATCHES, TIMED_PAIRS, _Trial, _TryingMaker
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.training.pace import StagePace

TRAINING = "{batch_windows: 32, learning_rate: 1e-3, epochs: 4}"


@pytest.mark.parametrize(
    ("control", "epochs"), [("{}", 3), (f"{{training: {TRAINING}}}", 4), ("null", None)]
)
def test_each_stage_is_tried_as_a_run_makes_it(
    control: str, epochs: int | None, tmp_path: Path
) -> None:
    """By its own training; the student with the teachers that were just made."""
    job = load_job(
        find_job("nursery"),
        [
            f"control={control}",
            *("teachers.gpt2.training.epochs=1", "teachers.llama.training.epochs=2"),
            *("student.training.epochs=3", "evaluation.minimal_pairs=[]"),
        ],
    )
    made: dict[str, Any] = {}
    measured: dict[str, Any] = {}

    def stage(name: str, model: Any, training: Any, teachers: Any) -> tuple[Any, Path]:
        made[name] = model.num_layers, model.hidden_size, training.epochs, teachers
        return name, tmp_path / name

    def evaluation(name: str, model: Any, path: Path, _: Any) -> str:
        measured[name] = model.hidden_size, path
        return name

    trial: Any = SimpleNamespace(
        setup=JobSetup(job, torch.device("cpu")),
        corpus=SimpleNamespace(entries=SimpleNamespace(pairs_dir=None)),
        _stage=stage,
        _evaluation=evaluation,
    )
    pace = _Trial.run(cast(_Trial, trial))
    teachers = {name: tmp_path / "teachers" / name for name in ("gpt2", "llama")}
    expected = {
        "teachers/gpt2": (4, 192, 1.0, None),
        "teachers/llama": (4, 192, 2.0, None),
        "student": (4, 128, 3.0, teachers),
    } | ({} if epochs is None else {"control": (4, 128, float(epochs), None)})
    assert list(made.items()) == list(expected.items())
    assert measured == {name: (size, tmp_path / name) for name, (_, size, *_) in expected.items()}
    assert dict(pace.stages) == dict(pace.evaluations) == {name: name for name in expected}


@pytest.mark.parametrize("windows", [2, 50])
@pytest.mark.parametrize("pairs", [0, 7, 3 * TIMED_PAIRS])
def test_what_is_measured_of_a_little_is_told_for_one(
    windows: int, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that takes 0.5 s, a pair that takes 0.01 s, a text that takes 2 s."""
    asked: list[tuple[int, int]] = []

    def measure(_: Any, name: str, dev: Any, benchmarks: Any, samples: int = 0) -> float:
        assert name == "student"
        num_windows = 0 if dev is None else dev.num_windows
        num_pairs = sum(len(task.items) for tasks in benchmarks.values() for task in tasks)
        asked.append((num_windows, num_pairs))
        return 0.5 * num_windows + 0.01 * num_pairs + 2.0 * samples

    def windows_of(_: Any) -> Any:
        raise AssertionError("nothing is computed")

    monkeypatch.setattr(module, "load_model", lambda *_, **__: torch.nn.Module())
    job = load_job(find_job("nursery"), ["evaluation.samples=3"])
    dev = DevWindows(windows_of=windows_of, num_windows=windows, batch_windows=5)
    trial: Any = SimpleNamespace(
        setup=SimpleNamespace(
            job=job,
            device=torch.device("cpu"),
            attention=lambda *_, **__: "sdpa",
            dev_windows=lambda *_: dev,
        ),
        corpus=None,
        _measure=measure,
    )
    item: Any = None
    short, long = (item,) * (pairs // 3), (item,) * (pairs - pairs // 3)
    tasks = {"a": [Task(name="one", items=short)], "b": [Task(name="two", items=long)]}
    pace = _Trial._evaluation(cast(_Trial, trial), "student", job.student.model, tmp_path, tasks)
    assert pace.dev_window_s == pytest.approx(0.5)
    assert pace.pair_s == pytest.approx(0.01 if pairs else 0)
    few = min(windows, 5)  # texts begin as development windows do
    assert pace.samples_s == pytest.approx(3 * 2 + few * 0.5)
    assert max(asked)[0] == min(windows, TIMED_BATCHES * 5)
    most = max(number for _, number in asked)
    assert most == pytest.approx(min(pairs, TIMED_PAIRS), abs=1)  # of each task every third


def test_what_is_loaded_after_a_training_has_no_part_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each model, 2 s to build it and 3 s to export it; 70 s of training in between."""
    now_s = 100.0

    def passes(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    def make(self: Any, _stage: str, _spec: Any, training: Any, *_: Any, **__: Any) -> Any:
        passes(2)
        return None, {} if training is None else self._train(None, None)

    def try_out(*_: Any, **__: Any) -> str:
        passes(70)
        return "its pace"

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(Maker, "make", make)
    monkeypatch.setattr(module, "try_out", try_out)
    monkeypatch.setattr(module, "export_model", lambda *_, **__: passes(3))
    trial: Any = SimpleNamespace(
        scratch=tmp_path,
        maker=_TryingMaker.__new__(_TryingMaker),
        setup=SimpleNamespace(dtype=torch.float32),
        corpus=SimpleNamespace(entries=SimpleNamespace(tokenizer_dir=tmp_path)),
    )
    given: Any = object()
    for name, training, pace in (("a", given, "its pace"), ("b", None, None)):
        found, path = _Trial._stage(cast(_Trial, trial), f"teachers/{name}", given, training, None)
        assert found == StagePace(build_s=2, training=cast(Any, pace), export_s=3)
        assert path == tmp_path / "teachers" / name


@pytest.mark.parametrize(
    ("asked", "of_models", "of_milestones"),
    [
        (["milestones={}"], 12, 12),
        (["milestones={max_pairs_per_task: 4}"], 12, 7),
        (["milestones={max_pairs_per_task: 4}", "max_pairs_per_task=2"], 4, 7),
        (["milestones={}", "max_pairs_per_task=2"], 4, 4),
        (["milestones=null"], 12, 0),
    ],
)
def test_pairs_of_milestones_may_be_more_than_those_of_models(
    asked: list[str], of_models: int, of_milestones: int, tmp_path: Path
) -> None:
    """Of a task of nine pairs and one of three."""
    pair = json.dumps({"sentence_good": "a b", "sentence_bad": "b a"}) + "\n"
    for name, number in (("long", 9), ("short", 3)):
        (tmp_path / f"{name}.jsonl").write_text(number * pair)
    overrides = ["student.milestones=[9]", *(f"evaluation.{one}" for one in asked)]
    trial: Any = SimpleNamespace(
        setup=JobSetup(load_job(find_job("nursery"), overrides), torch.device("cpu")),
        corpus=SimpleNamespace(entries=SimpleNamespace(pairs_dir=tmp_path)),
        _stage=lambda *_: (None, tmp_path),
        _evaluation=lambda *_: None,
    )
    pace = _Trial.run(cast(_Trial, trial))
    assert (pace.num_pairs, pace.num_milestone_pairs) == (of_models, of_milestones)


def test_a_machine_that_is_refused_has_its_signals_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    job = load_job(find_job("nursery"), ["deepspeed.device=cuda"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(MachineError, match="0 CUDA devices"):
            module.try_job(job, runs=tmp_path, seconds=1)
    assert signal.getsignal(signal.SIGTERM) is before
