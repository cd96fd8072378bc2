"""Whole trainings of tiny models on random tokens: what is kept, what is due, stopping, resuming.

Run as a script, this file is one of two ranks under the `deepspeed` launcher.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.schedule import learning_rate
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.errors import RunError, Stopped, TrainingError
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.training import EarlyStopping, MovingAverage, Muon, TrainingSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training import clock as clock_module
from babyllama_ds.training.batches import label_mask
from trainings import LENGTH, RandomWindows, Run, assert_equal_weights, dev_windows, windows_of_step

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


@dataclass(frozen=True)
class Ended:
    """What came of a training that ended."""

    summary: dict[str, Any]
    weights: dict[str, torch.Tensor]
    metrics: list[dict[str, Any]]


@pytest.fixture(scope="module")
def ended() -> dict[str, Ended]:
    return {}


@pytest.fixture
def undisturbed(new_run: Callable[..., Run], ended: dict[str, Ended]) -> Callable[..., Ended]:
    """A training from start to end, made once for all tests that ask for the same options."""

    def make(run_of: Callable[..., Run] = new_run, **options: Any) -> Ended:
        key = f"{run_of.__qualname__} {options}"
        if key not in ended:
            run = run_of("undisturbed", **options)
            summary = run.train()
            ended[key] = Ended(summary, run.weights(), run.metrics())
        return ended[key]

    return make


# -- what is due, and what is written --------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "evaluated", "saved"),
    [
        ({}, [4, 8], [4, 8]),  # 14 windows in fours: an epoch has four steps
        ({"epochs": 1.5}, [4, 6], [4, 6]),
        ({"evaluate_every_steps": 3}, [3, 6, 8], [3, 6, 8]),
        ({"checkpoint_every_steps": 2}, [4, 8], [2, 4, 6, 8]),
        ({"checkpoint_every_steps": 5, "max_steps": 7}, [4, 7], [5]),
        ({"max_tokens": 121}, [3], [3]),  # three batches of 40
    ],
)
def test_evaluations_and_checkpoints_where_they_are_due(
    changes: dict[str, Any], evaluated: list[int], saved: list[int], new_run: Callable[..., Run]
) -> None:
    run = new_run(**changes)
    summary = run.train()
    assert list(run.dev_ce()) == evaluated
    assert run.folder.saved == saved
    assert summary["steps"] == evaluated[-1]
    kept = [f"step-{step:08d}" for step in saved[-2:]]
    assert sorted(path.name for path in run.folder.directory.iterdir()) == kept


# -- learning --------------------------------------------------------------------------------------


def test_training_learns(new_run: Callable[..., Run]) -> None:
    run = new_run(epochs=8.0, log_every_steps=1)
    run.train()
    logged = list(run.logged().values())
    assert logged[-1]["ce"] < 0.6 * logged[0]["ce"]


# -- what counts -----------------------------------------------------------------------------------


def test_tokens_without_a_label_are_not_learnt(new_run: Callable[..., Run]) -> None:
    """The logged cross-entropy is over the others; positions all count as seen."""
    run = new_run(precision="fp32", kind="llama", log_every_steps=1, max_steps=1)
    unlabelled = list(range(20))
    run.has_label = label_mask(unlabelled)
    summary = run.train()
    tokens_BS = torch.from_numpy(RandomWindows().tokens[windows_of_step(0)])
    labels_BT = tokens_BS[:, 1:].masked_fill(tokens_BS[:, 1:] < len(unlabelled), -100)
    with torch.no_grad():
        logits_BTV = run.model().eval()(input_ids=tokens_BS).logits[:, :-1].double()
    expected = cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
    assert run.logged()[1]["ce"] == pytest.approx(expected.item(), rel=1e-5)
    assert summary["train_tokens"] == tokens_BS.numel()


def test_documents_of_dev_windows_are_scored_apart(new_run: Callable[..., Run]) -> None:
    """As each would be if it were a sequence of its own."""
    run = new_run(precision="fp32", kind="llama", keep="last", max_steps=2)
    begins_WS = np.zeros((5, LENGTH), np.bool_)
    begins_WS[:, [0, 4]] = True
    dev = replace(dev_windows(), begins_of=lambda ids: begins_WS[list(ids)])
    summary = run.train(dev=dev)
    tokens_WS, model = torch.from_numpy(dev.windows_of(range(5))), run.last_model.eval()
    nll, labels = 0.0, 0
    for piece_WS in (tokens_WS[:, :4], tokens_WS[:, 4:]):
        with torch.no_grad():
            logits_WTV = model(input_ids=piece_WS).logits[:, :-1].double()
        ce_N = cross_entropy(logits_WTV.flatten(0, 1), piece_WS[:, 1:].flatten(), reduction="none")
        nll, labels = nll + ce_N.sum().item(), labels + len(ce_N)
    assert summary["final_dev_ce"] == pytest.approx(nll / labels, rel=1e-5)


# -- which weights leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_weights_asked_for_leave(keep: str, new_run: Callable[..., Run]) -> None:
    """On other tokens than it is trained on, the model gets worse: the first evaluation is best."""
    run = new_run(keep=keep, epochs=6.0, learning_rate=2e-2)
    seen: list[dict[str, torch.Tensor]] = []
    dev = dev_windows()

    def watched(ids: Sequence[int]) -> NDArray[np.int64]:
        if 0 in ids:
            seen.append(run.weights())
        return np.asarray(dev.windows_of(ids))

    summary = run.train(dev=DevWindows(windows_of=watched, num_windows=5, batch_windows=2))
    scores = run.dev_ce()
    assert len(seen) == len(scores) == 6
    best_step = min(scores, key=lambda step: scores[step])
    assert best_step != 24, "the last is best: nothing is told apart"
    assert summary["kept"] == keep
    assert summary["best_step"] == best_step
    assert summary["best_dev_ce"] == scores[best_step]
    assert summary["final_dev_ce"] == scores[24]
    expected = seen[best_step // 4 - 1] if keep == "best" else seen[-1]
    assert_equal_weights(run.weights(), expected)


# -- stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [1, 4, 5, 7])
@pytest.mark.parametrize("distilled", [False, True])
def test_stopped_and_started_again_ends_with_the_same_weights(
    stop_after: int,
    distilled: bool,
    new_run: Callable[..., Run],
    undisturbed: Callable[..., Ended],
) -> None:
    options = {"of_model": DROPOUT, "distilled": distilled, "log_every_steps": 2, "clip_norm": 0.5}
    expected = undisturbed(**options)
    run = new_run("stopped", **options)
    with pytest.raises(Stopped) as caught:
        run.train(stop_after=stop_after)
    assert (caught.value.reason, caught.value.exit_code) == ("SIGTERM", 143)
    assert caught.value.at == f"student, step {stop_after}"
    assert run.folder.saved[-1] == stop_after
    torch.manual_seed(99)  # nothing may depend on what this process drew before
    summary = run.train()
    assert_equal_weights(run.weights(), expected.weights)
    assert without_times(summary) == without_times(expected.summary)
    assert without_timing(run.metrics()) == without_timing(expected.metrics)


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    dropped = ("seconds", "tokens_per_s", "runs")  # runs are called by their folders
    return {k: v for k, v in summary.items() if k not in dropped}


def without_timing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def test_stopped_before_the_first_step_nothing_is_written(new_run: Callable[..., Run]) -> None:
    run = new_run()
    with pytest.raises(Stopped):
        run.train(stop_after=0)
    assert run.folder.saved == []
    run.train()
    assert run.folder.saved == [4, 8]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written after it."""


def asked_at_batch(number: int | None) -> DevWindows:
    """Three batches an evaluation; at one of them, counted from 1, this process gets a SIGTERM."""
    dev, turns = dev_windows(), itertools.count(1)

    def windows_of(ids: Sequence[int]) -> NDArray[np.int64]:
        if next(turns) == number:
            signal.raise_signal(signal.SIGTERM)
        return np.asarray(dev.windows_of(ids))

    return replace(dev, windows_of=windows_of)


@pytest.mark.parametrize(
    "options",
    [
        {"of_model": DROPOUT, "distilled": True},
        {"checkpoint_every_steps": 3, "ema": MovingAverage(decay=0.9)},
        {"epochs": 6.0, "learning_rate": 2e-2, "early_stopping": EarlyStopping(patience=2)},
    ],
    ids=["plain", "average", "early stopping"],
)
@pytest.mark.parametrize("stops", [(1,), (3,), (5,), (2, 1, 4)])
def test_a_stop_within_an_evaluation_loses_nothing(
    stops: tuple[int, ...],
    options: dict[str, Any],
    new_run: Callable[..., Run],
    undisturbed: Callable[..., Ended],
) -> None:
    """In the first evaluation, after it was made whole, and more than once."""
    options = {"log_every_steps": 1, **options}
    expected, run = undisturbed(**options), new_run("stopped", **options)
    step = 0
    for batch in stops:
        step += 4 * math.ceil(batch / 3) if step == 0 else 4 * ((batch - 1) // 3)
        dev = asked_at_batch(batch)
        with pytest.raises(Stopped) as caught:
            run.train(dev=dev)
        assert (caught.value.reason, caught.value.exit_code) == ("SIGTERM", 143)
        assert caught.value.at == f"student, the evaluation at step {step}"
        assert run.folder.saved[-1] == step
        assert step in run.logged()
        assert step not in run.dev_ce()
    torch.manual_seed(99)
    summary = run.train()
    assert_equal_weights(run.weights(), expected.weights)
    assert without_times(summary) == without_times(expected.summary)
    assert without_timing(run.metrics()) == without_timing(expected.metrics)


def test_a_stop_within_an_evaluation_ends_it(new_run: Callable[..., Run]) -> None:
    """Of its three batches the second and third are not looked at."""
    run, seen = new_run(), []
    dev = asked_at_batch(1)
    counted = replace(dev, windows_of=lambda ids: (seen.append(len(ids)), dev.windows_of(ids))[1])
    with pytest.raises(Stopped):
        run.train(dev=counted)
    assert seen == [2]


def test_an_evaluation_that_was_put_off_is_made_once(
    new_run: Callable[..., Run], undisturbed: Callable[..., Ended]
) -> None:
    """A checkpoint after it is an ordinary one."""
    expected, run = undisturbed(), new_run("stopped")
    with pytest.raises(Stopped, match="the evaluation at step 4"):
        run.train(dev=asked_at_batch(1))
    with pytest.raises(Stopped, match="step 5"):
        run.train(stop_after=1)
    run.train()
    assert_equal_weights(run.weights(), expected.weights)
    assert without_timing(run.metrics()) == without_timing(expected.metrics)


@pytest.mark.parametrize("step", [4, 8])
def test_killed_after_an_evaluation_that_was_put_off_it_is_told_once(
    step: int, new_run: Callable[..., Run], undisturbed: Callable[..., Ended]
) -> None:
    expected, run = undisturbed(), new_run("killed")
    with pytest.raises(Stopped):
        run.train(dev=asked_at_batch(1 if step == 4 else 4))
    if step == 4:

        def kill(epoch: int, k: int) -> None:
            raise Killed

        with pytest.raises(Killed):
            run.train(before=kill)
        assert list(run.dev_ce()) == [4], "it was told, and no checkpoint is of after it"
    else:
        run.train()  # it was the last: killed before the export
    run.train()
    assert_equal_weights(run.weights(), expected.weights)
    assert without_timing(run.metrics()) == without_timing(expected.metrics)


@pytest.mark.parametrize("at", [(0, 3), (1, 0), (1, 3)])
def test_killed_at_any_step_ends_with_the_same_weights(
    at: tuple[int, int], new_run: Callable[..., Run], undisturbed: Callable[..., Ended]
) -> None:
    def kill(epoch: int, k: int) -> None:
        if (epoch, k) == at:
            raise Killed

    options = {"of_model": DROPOUT, "checkpoint_every_steps": 2, "evaluate_every_steps": 3}
    expected = undisturbed(**options)
    run = new_run("killed", **options)
    with pytest.raises(Killed):
        run.train(before=kill)
    run.train()
    assert_equal_weights(run.weights(), expected.weights)
    assert without_timing(run.metrics()) == without_timing(expected.metrics)


def test_after_the_last_checkpoint_only_the_end_is_left(new_run: Callable[..., Run]) -> None:
    """Killed between the last step and the export: no step is made again."""
    run = new_run()
    summary = run.train()
    weights = run.weights()

    def no_step(epoch: int, k: int) -> None:
        raise AssertionError(f"batch {k} of epoch {epoch} again")

    again = run.train(before=no_step)
    assert again == summary
    assert_equal_weights(run.weights(), weights)


def test_a_run_goes_on_with_what_others_began(
    new_run: Callable[..., Run], undisturbed: Callable[..., Ended]
) -> None:
    """One is killed, a second stopped, a third has steps of its own that are worth nothing now."""

    def kill(epoch: int, k: int) -> None:
        if (epoch, k) == (0, 3):
            raise Killed

    options = {"of_model": DROPOUT, "checkpoint_every_steps": 2, "log_every_steps": 1}
    expected = undisturbed(**options)
    one, two, three = (new_run(name, **options) for name in ("one", "two", "three"))
    with pytest.raises(Stopped):
        three.train(stop_after=1)
    with pytest.raises(Killed):
        one.train(before=kill)
    assert sorted(one.logged()) == [1, 2, 3]
    two.checkpoints = three.checkpoints = one.folder.directory
    with pytest.raises(Stopped):
        two.train(stop_after=3)
    assert two.folder.saved == [4, 5]
    so_far_s = json.loads((one.folder.directory / "step-00000005" / "progress.json").read_text())[
        "seconds"
    ]
    began_s = time.perf_counter()
    summary = three.train()
    took_s = time.perf_counter() - began_s
    assert three.folder.saved == [6, 8]
    assert_equal_weights(three.weights(), expected.weights)
    assert without_times(summary) == without_times(expected.summary)
    assert (expected.summary["runs"], summary["runs"]) == (["undisturbed"], ["one", "two", "three"])
    assert so_far_s < summary["seconds"] < so_far_s + took_s
    assert without_timing(three.metrics()) == without_timing(expected.metrics)


def test_a_checkpoint_without_what_was_logged_leaves_the_runs_own(
    new_run: Callable[..., Run], undisturbed: Callable[..., Ended]
) -> None:
    """As one of an earlier version."""
    expected, run = undisturbed(), new_run("stopped")
    with pytest.raises(Stopped):
        run.train(stop_after=5)
    for path in run.folder.directory.glob("*/metrics.jsonl"):
        path.unlink()
        manifest = path.parent / "manifest.json"
        plain = json.loads(manifest.read_text())
        del plain["files"]["metrics.jsonl"]
        manifest.write_text(json.dumps(plain))
    run.train()
    assert without_timing(run.metrics()) == without_timing(expected.metrics)


def test_micro_batches_change_nothing_but_rounding(new_run: Callable[..., Run]) -> None:
    runs = [
        new_run(str(size), precision="fp32", micro_batch=size, distilled=True, epsilon=1e-4)
        for size in (1, 4)
    ]
    for run in runs:
        run.train()
    ones, whole = (run.weights() for run in runs)
    for key in whole:
        error = (ones[key] - whole[key]).abs().max().item()
        assert error <= 2e-5 * whole[key].abs().max().item(), key


# -- objectives beyond the published one -----------------------------------------------------------


EVERY_TERM = {
    "alpha": {"start": 0.9, "end": 0.1, "over": 0.75, "shape": "cosine"},
    "temperature": {"start": 1.0, "end": 3.0},
    "divergence": {"kind": "reverse_kl"},
    "hidden_matching": {
        "weight": 0.5,
        "layers": (
            {"teacher": "0", "teacher_layer": 1, "student_layer": 1},
            {"teacher": "1", "teacher_layer": 2, "student_layer": 2},
        ),
    },
}


@pytest.fixture
def every_term(
    new_run: Callable[..., Run], tiny_model: Callable[..., Any], alone: torch.device
) -> Callable[..., Run]:
    def make(name: str, **changes: Any) -> Run:
        run = new_run(name, distilled=True, z_loss=1e-3, log_every_steps=1, **changes)
        run.distillation = DistillationSpec.model_validate(EVERY_TERM)
        run.ensemble = Ensemble(
            [
                Member(
                    str(k),
                    FrozenModel(
                        tiny_model("llama", seed=k, hidden_size=width),
                        device=alone,
                        dtype=torch.bfloat16,
                        layers=[k + 1],
                    ),
                    1.0,
                )
                for k, width in enumerate((16, 32))
            ]
        )
        return run

    return make


def test_every_term_is_logged_and_alpha_and_temperature_go_their_way(
    every_term: Callable[..., Run],
) -> None:
    run = every_term("all")
    run.train()
    logged = run.logged()
    assert list(logged) == list(range(1, 9))
    for step, line in logged.items():
        done = (step - 1) / 8
        way = (1 - math.cos(math.pi * min(1.0, done / 0.75))) / 2
        assert line["alpha"] == pytest.approx(0.9 - 0.8 * way)
        assert line["temperature"] == pytest.approx(1 + 2 * done)
        # The published reduction: summed over a window's ten positions.
        soft = line["temperature"] ** 2 * 10 * line["reverse_kl"]
        expected = line["alpha"] * line["ce"] + (1 - line["alpha"]) * soft
        expected += 1e-3 * line["log_z_squared"] + 0.5 * line["hidden_distance"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
        assert "kl" not in line
        assert line["student_kl"] > 0  # the forward one, watched as ever


@pytest.mark.parametrize("stop_after", [1, 5])
def test_stopped_and_started_again_every_term_goes_on_to_the_bit(
    every_term: Callable[..., Run], undisturbed: Callable[..., Ended], stop_after: int
) -> None:
    """The matrices of matched layers, their moments and the way of the schedules included."""
    expected = undisturbed(every_term)
    run = every_term("stopped")
    with pytest.raises(Stopped):
        run.train(stop_after=stop_after)
    run.train()
    assert_equal_weights(run.weights(), expected.weights)
    assert without_timing(run.metrics()) == without_timing(expected.metrics)
    assert not any("projections" in key for key in run.weights())


def test_matched_states_come_closer(every_term: Callable[..., Run]) -> None:
    run = every_term("closer", epochs=8.0)
    run.train()
    distances = [line["hidden_distance"] for line in run.logged().values()]
    assert distances[-1] < 0.8 * distances[0]


# -- ends before the planned steps -----------------------------------------------------------------

OVERFITTED: dict[str, Any] = {"epochs": 6.0, "learning_rate": 2e-2}
"""On other tokens than it is trained on, such a model is soon at its best."""


def test_early_stopping_ends_a_training_as_done(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    whole = new_run("whole", **OVERFITTED)
    whole.train()
    run = new_run(
        "ended", early_stopping=EarlyStopping(patience=2), log_every_steps=1, **OVERFITTED
    )
    with caplog.at_level(logging.INFO):
        summary = run.train()
    assert list(run.dev_ce()) == [4, 8, 12, 16]
    assert run.folder.saved == [4, 8, 12, 16]
    assert [summary[key] for key in ("steps", "planned_steps", "ended_by", "best_step")] == [
        *(16, 24, "early_stopping", 8)
    ]
    assert "student ends after step 16 of 24: early stopping, 2 evaluations without" in caplog.text
    assert_equal_weights(run.weights(), whole.weights())  # the second evaluation's, of both
    for step, line in run.logged().items():
        assert line["lr"] == learning_rate(run.training, step - 1, 24), "the schedule is another"


def test_a_training_that_still_improves_is_not_ended(new_run: Callable[..., Run]) -> None:
    run = new_run(early_stopping=EarlyStopping(patience=1), epochs=4.0)
    tokens = RandomWindows().tokens[:5]  # what it is trained on
    summary = run.train(dev=dev_windows(tokens))
    assert [summary[key] for key in ("steps", "planned_steps", "ended_by")] == [16, 16, "steps"]


@pytest.mark.parametrize("stop_after", [5, 8, 11])
def test_patience_goes_on_where_it_was(
    stop_after: int, new_run: Callable[..., Run], undisturbed: Callable[..., Ended]
) -> None:
    options = {**OVERFITTED, "early_stopping": EarlyStopping(patience=2), "of_model": DROPOUT}
    expected, run = undisturbed(**options), new_run("stopped", **options)
    with pytest.raises(Stopped):
        run.train(stop_after=stop_after)
    planned = expected.summary["planned_steps"]
    assert run.train()["steps"] == expected.summary["steps"] == 16 < planned
    assert_equal_weights(run.weights(), expected.weights)

    def no_step(epoch: int, k: int) -> None:
        raise AssertionError("it had ended")

    again = run.train(before=no_step)  # killed between the end and the export
    assert again["ended_by"] == "early_stopping"
    assert_equal_weights(run.weights(), expected.weights)


def seconds_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stay under the training's clock takes a second."""
    now = itertools.count()
    fake = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(clock_module, "time", fake)


def test_the_minutes_of_all_starts_end_a_training(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    seconds_by_turns(monkeypatch)
    # A step takes a second, and one that is logged two: the first.
    options = {"max_minutes": 4.5 / 60, "evaluate_every_steps": 3, "log_every_steps": 100}
    undisturbed, run = new_run("undisturbed", **options), new_run("stopped", **options)
    with caplog.at_level(logging.INFO):
        summary = undisturbed.train()
    assert list(undisturbed.dev_ce()) == [3, 4]
    assert undisturbed.folder.saved == [3, 4]
    assert [summary[key] for key in ("steps", "planned_steps", "ended_by")] == [4, 8, "max_minutes"]
    assert summary["seconds"] == 5
    assert "student ends after step 4 of 8: 0.1 minutes of steps, max_minutes" in caplog.text
    with pytest.raises(Stopped):
        run.train(stop_after=2)
    assert run.train() == summary | {"runs": ["stopped"]}
    assert_equal_weights(run.weights(), undisturbed.weights())


def test_parts_of_steps_that_were_not_made_are_not_told(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds_by_turns(monkeypatch)
    run = new_run(max_minutes=2.5 / 60, profile_steps=5)
    assert run.train()["step_s"] is None


# -- a moving average ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_average_is_evaluated_and_leaves(keep: str, new_run: Callable[..., Run]) -> None:
    options = {**OVERFITTED, "epochs": 3.0, "precision": "fp32", "keep": keep}
    plain, run = (
        new_run("plain", **options),
        new_run("run", ema=MovingAverage(decay=0.8), **options),
    )
    raw: dict[str, list[dict[str, torch.Tensor]]] = {"plain": [], "run": []}
    seen: list[dict[str, torch.Tensor]] = []
    dev = dev_windows()

    def watched(ids: Sequence[int]) -> NDArray[np.int64]:
        if 0 in ids:
            seen.append(run.weights())
        return np.asarray(dev.windows_of(ids))

    plain.train(before=lambda *_: raw["plain"].append(plain.weights()))
    summary = run.train(
        before=lambda *_: raw["run"].append(run.weights()),
        dev=DevWindows(windows_of=watched, num_windows=5, batch_windows=2),
    )
    # Evaluations show the average for a while; the steps never see it.
    for one, other in zip(raw["plain"], raw["run"], strict=True):
        assert_equal_weights(one, other)
    average = {key: weight.double() for key, weight in raw["run"][0].items()}
    averages = [average]
    for step, weights in enumerate(raw["run"][1:], start=1):
        decay = min(0.8, (1 + step) / (10 + step))
        average = {k: decay * average[k] + (1 - decay) * weights[k].double() for k in average}
        averages.append(average)
    for step, shown in ((4, seen[0]), (8, seen[1])):
        for key, weight in shown.items():
            torch.testing.assert_close(weight.double(), averages[step][key], rtol=1e-5, atol=1e-6)
    assert summary["averaged"] == 0.8
    scores = run.dev_ce()
    assert summary["best_step"] == min(scores, key=lambda step: scores[step])
    assert_equal_weights(
        run.weights(), seen[summary["best_step"] // 4 - 1 if keep == "best" else -1]
    )
    assert plain.train()["averaged"] is None


# -- options over stops and kills ------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "ema": {"ema": MovingAverage(decay=0.9)},
    "muon": {"muon": Muon()},
    "muon and ema, last": {"muon": Muon(), "ema": MovingAverage(ramp=False), "keep": "last"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "attention dropout": {"kind": "llama", "of_model": {"attention_dropout": 0.3}},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_options_end_with_the_same_weights_after_a_stop_or_a_kill(
    end: str, name: str, new_run: Callable[..., Run], undisturbed: Callable[..., Ended]
) -> None:
    options = {"of_model": DROPOUT, "distilled": True, "checkpoint_every_steps": 2, **OPTIONS[name]}
    expected, run = undisturbed(**options), new_run(end, **options)

    def kill(epoch: int, k: int) -> None:
        if (epoch, k) == (1, 1):
            raise Killed

    with pytest.raises(Stopped if end == "stopped" else Killed):
        run.train(**({"stop_after": 5} if end == "stopped" else {"before": kill}))
    torch.manual_seed(99)
    summary = run.train()
    assert_equal_weights(run.weights(), expected.weights)
    assert summary["best_dev_ce"] == expected.summary["best_dev_ce"]
    assert without_timing(run.metrics()) == without_timing(expected.metrics)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("distilled", [False, True])
def test_gradient_checkpointing_changes_no_bit(
    distilled: bool, precision: str, new_run: Callable[..., Run]
) -> None:
    """Dropout's masks included: the second time they are those of the first."""
    options = {"of_model": DROPOUT, "distilled": distilled, "precision": precision}
    plain = new_run("plain", **options)
    recomputing = new_run("recomputing", gradient_checkpointing=True, **options)
    plain.train()
    recomputing.train()
    for run in (plain, recomputing):
        layers = [m for m in run.last_model.modules() if hasattr(m, "gradient_checkpointing")]
        assert layers
        assert all(m.gradient_checkpointing == (run is recomputing) for m in layers)
    assert_equal_weights(recomputing.weights(), plain.weights())
    assert without_timing(recomputing.metrics()) == without_timing(plain.metrics())


def test_attention_dropout_depends_on_seed_and_step_alone(new_run: Callable[..., Run]) -> None:
    options = {"kind": "llama", "precision": "fp32"}
    dropped = [new_run(f"{n}", of_model={"attention_dropout": 0.4}, **options) for n in range(3)]
    dropped[2].seed += 1
    plain = new_run("plain", **options)
    for run in (*dropped, plain):
        torch.manual_seed(len(run.directory.name))  # nothing depends on it
        run.train()
    assert_equal_weights(dropped[0].weights(), dropped[1].weights())
    for other in (dropped[2], plain):
        assert not torch.equal(*(r.weights()["lm_head.weight"] for r in (dropped[0], other)))


def test_the_engine_is_freed_also_after_an_error(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed = []
    original = TrainingEngine.destroy

    def destroy(engine: TrainingEngine) -> None:
        destroyed.append(weakref.ref(engine._engine.optimizer))
        original(engine)

    monkeypatch.setattr(TrainingEngine, "destroy", destroy)
    run = new_run()
    with pytest.raises(Stopped):
        run.train(stop_after=1)
    run.train()
    assert [optimizer() for optimizer in destroyed] == [None, None]


# -- two ranks -------------------------------------------------------------------------------------

TWO_RANK_TRAINING = {"batch_windows": 4, "micro_batch": 1, "epochs": 2.0, "learning_rate": 1e-2}
TWO_RANK_TRAINING |= {"log_every_steps": 1, "epsilon": 1e-4, "evaluate_every_steps": 3}


@pytest.fixture(scope="module")
def two_ranks(
    once: Callable[..., Any],
    launch_script: Callable[..., None],
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    engine_config: Callable[..., dict[str, Any]],
) -> Path:
    """The folder with what two ranks, started once, trained."""

    def make(scene: Any) -> list[Any]:
        tiny_model("gpt2").save_pretrained(scene.folder / "student")
        tiny_model("llama", seed=5).save_pretrained(scene.folder / "teacher")
        training = training_spec(**TWO_RANK_TRAINING)
        (scene.folder / "training.json").write_text(training.model_dump_json())
        config = json.dumps(engine_config(training, ranks=2))
        (scene.folder / "deepspeed.json").write_text(config)
        launch_script(__file__, scene.folder)
        return []

    folder: Path = once("training_on_two_ranks", make).folder
    return folder


def run_of(folder: Path, name: str, config: dict[str, Any], device: torch.device) -> Run:
    """The distilled training that one rank and two make alike."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    frozen = FrozenModel(teacher, device=device, dtype=torch.float32)
    return Run(
        directory=folder / name,
        model=lambda: AutoModelForCausalLM.from_pretrained(folder / "student"),
        training=TrainingSpec.model_validate_json((folder / "training.json").read_text()),
        config=config,
        device=device,
        distillation=DistillationSpec(soft_reduction="token"),
        ensemble=Ensemble([Member("teacher", frozen, 1.0)]),
    )


@pytest.mark.launch
def test_two_ranks_train_as_one(
    two_ranks: Path,
    alone: torch.device,
    engine_config: Callable[..., dict[str, Any]],
    training_spec: Callable[..., TrainingSpec],
) -> None:
    """The world size is no part of the mathematics: also with a short last batch."""
    from safetensors.torch import load_file

    run = run_of(two_ranks, "one_rank", engine_config(training_spec(**TWO_RANK_TRAINING)), alone)
    summary = run.train()
    ours, theirs = run.weights(), load_file(two_ranks / "undisturbed.safetensors")
    for key, weight in ours.items():
        error = (weight - theirs[key]).abs().max().item()
        assert error <= 2e-5 * weight.abs().max().item(), key
    lines = [json.loads(x) for x in (two_ranks / "undisturbed/metrics.jsonl").open()]
    for one, two in zip(run.metrics(), lines, strict=True):
        assert list(one) == list(two)
        for key in one.keys() - {"tokens_per_s", "stage"}:
            assert two[key] == pytest.approx(one[key], rel=2e-5), (one["step"], key)
    results = [json.loads((two_ranks / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for result in results:
        assert result["summary"]["best_dev_ce"] == pytest.approx(summary["best_dev_ce"], rel=2e-5)
        assert result["summary"]["train_tokens"] == summary["train_tokens"] == 280


@pytest.mark.launch
def test_a_signal_on_one_rank_stops_both_and_the_same_start_goes_on(two_ranks: Path) -> None:
    from safetensors.torch import load_file

    for rank in (0, 1):
        result = json.loads((two_ranks / f"rank{rank}.json").read_text())
        assert result["stopped"] == ["SIGTERM", 143]
        assert result["saved"] == [3, 5]
        assert result["stopped_again"] == "student, the evaluation at step 8"
        assert result["saved_again"] == 8
    undisturbed = load_file(two_ranks / "undisturbed.safetensors")
    assert_equal_weights(load_file(two_ranks / "resumed.safetensors"), undisturbed)


@pytest.mark.launch
def test_one_rank_goes_on_where_two_stopped(
    two_ranks: Path,
    alone: torch.device,
    engine_config: Callable[..., dict[str, Any]],
    training_spec: Callable[..., TrainingSpec],
) -> None:
    """A checkpoint is by parameter name: the number of ranks may change."""
    from safetensors.torch import load_file

    run = run_of(two_ranks, "handed_over", engine_config(training_spec(**TWO_RANK_TRAINING)), alone)
    before = run.metrics()
    run.train()
    assert run.metrics()[: len(before)] == before, "it began anew"
    assert min(run.folder.saved) > 5
    undisturbed = load_file(two_ranks / "undisturbed.safetensors")
    for key, weight in run.weights().items():
        error = (weight - undisturbed[key]).abs().max().item()
        assert error <= 2e-5 * weight.abs().max().item(), key


@pytest.mark.launch
def test_ranks_with_other_clocks_end_at_the_same_step(two_ranks: Path) -> None:
    for rank in (0, 1):
        result = json.loads((two_ranks / f"rank{rank}.json").read_text())
        assert result["limited"] == [4, "max_minutes"]


@pytest.mark.launch
def test_not_finite_on_one_rank_is_the_same_error_on_both(two_ranks: Path) -> None:
    results = [json.loads((two_ranks / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["error"] == results[1]["error"]
    assert results[0]["error"].startswith("student: step 2: got a gradient that is not finite")


@pytest.mark.launch
def test_a_teacher_not_finite_on_one_rank_is_the_same_error_on_both(two_ranks: Path) -> None:
    """Of the second batch's four windows, the second rank has every other one."""
    results = [json.loads((two_ranks / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["teacher_error"] == results[1]["teacher_error"]
    windows = ", ".join(map(str, windows_of_step(1)[1::2]))
    assert results[0]["teacher_error"].startswith(
        "student: step 2: got logits of teacher teacher that are not finite, "
        f"in epoch 0, windows {windows}, expected finite numbers"
    )


@pytest.mark.launch
def test_a_full_disk_of_rank_zero_is_the_same_error_on_both(two_ranks: Path) -> None:
    results = [json.loads((two_ranks / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["disk_error"] == results[1]["disk_error"]
    assert f"{two_ranks / 'full_disk'}: got ENOSPC" in results[0]["disk_error"]


def run_as_rank(folder: Path) -> None:
    from safetensors.torch import save_file

    device = distributed.start("cpu")
    config = json.loads((folder / "deepspeed.json").read_text())
    result: dict[str, Any] = {}

    run = run_of(folder, "undisturbed", config, device)
    result["summary"] = run.train()
    if ranks.rank() == 0:
        save_file(run.weights(), folder / "undisturbed.safetensors")

    run = run_of(folder, "stopped", config, device)
    try:
        run.train(stop_after=5 if ranks.rank() == 1 else None)
    except Stopped as stop:
        result["stopped"], result["saved"] = (stop.reason, stop.exit_code), run.folder.saved
    if ranks.rank() == 0:
        shutil.copytree(run.directory, folder / "handed_over")
    # An evaluation has two batches on rank 0 and one on rank 1. In that at step 8, which is its
    # second, rank 0 is asked in the last batch, when rank 1 has none left.
    try:
        run.train(dev=asked_at_batch(4) if ranks.rank() == 0 else None)
    except Stopped as stop:
        result["stopped_again"], result["saved_again"] = stop.at, run.folder.saved[-1]
    run.train()
    if ranks.rank() == 0:
        save_file(run.weights(), folder / "resumed.safetensors")

    run = run_of(folder, "limited", config, device)
    run.training = run.training.model_copy(update={"max_minutes": 6.5 / 60})
    turns = itertools.count(step=1 + 2 * ranks.rank())  # the second rank's clock is fast
    clock_module.time = SimpleNamespace(  # type: ignore[assignment]
        perf_counter=lambda: float(next(turns)), monotonic=time.monotonic
    )
    summary = run.train()
    result["limited"] = (summary["steps"], summary["ended_by"])
    clock_module.time = time

    run = run_of(folder, "broken", config, device)

    def spoil(epoch: int, k: int) -> None:
        if (k, ranks.rank()) == (1, 1):
            run.last_model.get_output_embeddings().weight.data.fill_(float("nan"))

    try:
        run.train(before=spoil)
    except TrainingError as error:
        result["error"] = str(error)

    run = run_of(folder, "broken_teacher", config, device)

    def spoil_teacher(epoch: int, k: int) -> None:
        if (k, ranks.rank()) == (1, 1) and run.ensemble is not None:
            run.ensemble.members[0].head.weight_PD.data[11] = float("nan")

    try:
        run.train(before=spoil_teacher)
    except TrainingError as error:
        result["teacher_error"] = str(error)

    run = run_of(folder, "full_disk", config, device)

    def fill_the_disk(epoch: int, k: int) -> None:
        if (k, ranks.rank()) == (1, 0):
            (run.directory / "metrics.jsonl").unlink(missing_ok=True)
            (run.directory / "metrics.jsonl").symlink_to("/dev/full")

    try:
        run.train(before=fill_the_disk)
    except RunError as error:
        result["disk_error"] = str(error)
    (folder / f"rank{ranks.rank()}.json").write_text(json.dumps(result))
    distributed.stop()


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[-1]))
