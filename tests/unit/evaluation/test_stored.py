"""Evaluations in the store: made once, checked when found, made anew when damaged."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import store as store_module
from babyllama_ds.errors import Stopped
from babyllama_ds.evaluation.stored import Steps, remembering, store_key, stored_evaluation
from babyllama_ds.store import Store

MEASURED = {"params": 7, "dev": {"ce": 1.5}, "minimal_pairs": {}, "seconds": 2.0}


class Measuring:
    """Counts how often it is asked."""

    def __init__(self, result: dict[str, Any] | None = None) -> None:
        self.result = {"model": "its own", **(result or MEASURED)}
        self.times = 0

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return self.result


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, logger="babyllama_ds")
    return lambda: caplog.text


def test_it_is_measured_once_and_named_by_each_run(store: Store, told: Callable[[], str]) -> None:
    measure = Measuring()
    first = stored_evaluation(store, "key", measure, name="big")
    assert first == {"model": "big", **MEASURED}
    assert "found in the store" not in told()
    second = stored_evaluation(store, "key", measure, name="small")
    assert second == {"model": "small", **MEASURED}
    assert list(second) == list(first)
    assert measure.times == 1
    assert "evaluation of small: the same was measured before, found in the store" in told()
    entry = store.root / "evaluations" / "key"
    assert json.loads((entry / "evaluation.json").read_text()) == MEASURED  # without a name


def test_another_key_is_another_measurement(store: Store) -> None:
    keys = {
        store_key(fingerprint, device=device, attention=attention, tensor_parallel=parts)
        for fingerprint in ("a", "b")
        for device in ("cpu", "cuda")
        for attention in ("sdpa", "eager")
        for parts in (1, 2, 4)
    }
    assert len(keys) == 24
    measure = Measuring()
    for key in keys:
        stored_evaluation(store, key, measure, name="x")
    assert measure.times == 24


def spoil(path: Path) -> None:
    path.write_text(path.read_text().replace("1.5", "1.4"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed number": lambda entry: spoil(entry / "evaluation.json"),
    "a short file": lambda entry: (entry / "evaluation.json").write_text("{"),
    "a missing file": lambda entry: (entry / "evaluation.json").unlink(),
    "a garbled manifest": lambda entry: (entry / "manifest.json").write_text("{"),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "the manifest of another": lambda entry: (entry / "manifest.json").write_text(
        (entry / "manifest.json").read_text().replace('"key"', '"other"')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_told_of_and_made_anew(
    damage: str, store: Store, told: Callable[[], str]
) -> None:
    stored_evaluation(store, "key", Measuring(), name="big")
    DAMAGES[damage](store.root / "evaluations" / "key")
    anew = Measuring({**MEASURED, "seconds": 3.0})
    assert stored_evaluation(store, "key", anew, name="big")["seconds"] == 3.0
    assert "evaluations/key is damaged (" in told()
    assert "): it is measured anew" in told()
    again = Measuring()
    assert stored_evaluation(store, "key", again, name="big")["seconds"] == 3.0
    assert (anew.times, again.times) == (1, 0)


def test_what_is_stopped_leaves_nothing(store: Store) -> None:
    def stop() -> dict[str, Any]:
        raise Stopped("asked to")

    with pytest.raises(Stopped):
        stored_evaluation(store, "key", stop, name="big")
    measure = Measuring()
    stored_evaluation(store, "key", measure, name="big")
    assert measure.times == 1


def test_who_comes_while_it_is_measured_waits_for_it(tmp_path: Path) -> None:
    begun, waits = threading.Event(), threading.Event()
    results: list[dict[str, Any]] = []

    def slowly() -> dict[str, Any]:
        begun.set()
        assert waits.wait(timeout=30)
        return MEASURED

    first = threading.Thread(
        target=lambda: results.append(
            stored_evaluation(Store(tmp_path), "key", slowly, name="first")
        )
    )
    first.start()
    assert begun.wait(timeout=30)
    second = Measuring()
    result = stored_evaluation(
        Store(tmp_path, while_waiting=waits.set), "key", second, name="second"
    )
    first.join(timeout=30)
    assert results == [{"model": "first", **MEASURED}]
    assert result == {"model": "second", **MEASURED}
    assert second.times == 0


def test_two_runs_that_wait_for_each_others_trainings_both_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both fine-tune the same model, on two ranks that meet after every step. What the one's first
    rank waits for the other's second one has, whose own first rank waits too."""
    monkeypatch.setattr(store_module, "POLL_S", 0.0)
    looks: list[str] = []
    learnt: list[str] = []

    def look() -> None:
        looks.append("it is not free")
        assert len(looks) < 100, "a rank waits, and all others for it"

    def rank(task: str) -> Steps:
        def learn() -> Steps:
            for _ in range(3):
                yield
            learnt.append(task)
            return {"score": len(task)}

        weights = {"model.safetensors": "f"}
        remember = remembering(
            Store(tmp_path, while_waiting=look), weights, "t", device="cpu", attention="sdpa"
        )
        return remember(task, learn)

    # The second ranks come first: they have their locks when the first ones ask for the other's.
    steps = {"A1": rank("long"), "B1": rank("short"), "A0": rank("short"), "B0": rank("long")}
    ended: dict[str, dict[str, Any]] = {}
    while steps:
        for name in list(steps):
            try:
                next(steps[name])
            except StopIteration as end:
                ended[name] = end.value
                del steps[name]
    assert sorted(learnt) == ["long", "short"]
    assert ended == {name: {"score": 4 if name in ("A1", "B0") else 5} for name in ended}
    assert len(ended) == 4
