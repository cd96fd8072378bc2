"""Whole trainings of tiny models on random tokens: what is kept, what is due, stopping, resuming.

Run as a script, this file is one of two ranks under the `deepspeed` launcher.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.checkpoint import BestWeights, CheckpointFolder, Progress
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.schedule import learning_rate
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.errors import Stopped, TrainingError
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.spec.job import DistillationSpec, TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training import loop
from babyllama_ds.training.loop import Stage, Surroundings, train

VOCAB, LENGTH, WINDOWS = 61, 10, 14  # 14 windows in batches of 4: the last of an epoch has two
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


class RandomWindows:
    """Training windows of random tokens; `before` is called with the epoch before each batch."""

    def __init__(self, before: Callable[[int, int], None] | None = None) -> None:
        self.num_windows, self.length = WINDOWS, LENGTH
        self.tokens = np.random.default_rng(1).integers(0, VOCAB, (WINDOWS, LENGTH))
        self.before = before

    def batch(self, epoch: int, k: int, batch_windows: int) -> NDArray[np.int64]:
        if self.before is not None:
            self.before(epoch, k)
        order = np.random.default_rng(epoch).permutation(WINDOWS)
        return order[k * batch_windows : (k + 1) * batch_windows]

    def windows(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.tokens[indices]


def dev_windows(tokens: NDArray[np.int64] | None = None) -> DevWindows:
    if tokens is None:
        tokens = np.random.default_rng(2).integers(0, VOCAB, (5, LENGTH))
    return DevWindows(windows_of=lambda ids: tokens[list(ids)], num_windows=5, batch_windows=2)


class StopAfter(StopRequest):
    """Asked to stop when so many steps are done in this process."""

    def __init__(self, steps: int | None) -> None:
        super().__init__()
        self.left = steps

    def agreed(self) -> str | None:
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        if self.left is not None:
            self.left -= 1
        return super().agreed()


class WatchedFolder(CheckpointFolder):
    """Remembers at which steps checkpoints were written."""

    def __init__(self, directory: Path, *, fingerprint: str) -> None:
        super().__init__(directory, fingerprint=fingerprint)
        self.saved: list[int] = []

    def save(self, engine: TrainingEngine, progress: Progress, best: BestWeights) -> None:
        self.saved.append(progress.step)
        super().save(engine, progress, best)


@dataclass
class Run:
    """One training's place and parts; `train` may be called again, as a new process would."""

    directory: Path
    model: Callable[[], nn.Module]
    training: TrainingSpec
    config: dict[str, Any]
    device: torch.device
    distillation: DistillationSpec | None = None
    ensemble: Ensemble | None = None
    seed: int = 3
    last_model: nn.Module = field(default_factory=nn.Module)
    folder: WatchedFolder = field(init=False)

    def train(
        self,
        *,
        stop_after: int | None = None,
        before: Callable[[int, int], None] | None = None,
        dev: DevWindows | None = None,
    ) -> dict[str, Any]:
        self.directory.mkdir(exist_ok=True, parents=True)
        self.last_model = self.model()
        self.folder = WatchedFolder(
            self.directory / "checkpoints" / "student", fingerprint="f" * 64
        )
        stage = Stage(
            name="student",
            model=self.last_model,
            training=self.training,
            distillation=self.distillation,
            vocab_size=VOCAB,
            seed=self.seed,
            micro_batch=self.config["train_micro_batch_size_per_gpu"],
            deepspeed=self.config,
        )
        stop = StopAfter(stop_after)
        around = Surroundings(
            run_dir=self.directory, device=self.device, stop=stop, checkpoints=self.folder
        )
        parts = {"windows": RandomWindows(before), "dev": dev or dev_windows()}
        stop.install()
        try:
            return train(stage, around, **parts, ensemble=self.ensemble)
        finally:
            stop.uninstall()

    def weights(self) -> dict[str, torch.Tensor]:
        return {key: p.detach().clone() for key, p in self.last_model.named_parameters()}

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def dev_ce(self) -> dict[int, float]:
        return {line["step"]: line["dev_ce"] for line in self.metrics() if "dev_ce" in line}

    def logged(self) -> dict[int, dict[str, Any]]:
        return {line["step"]: line for line in self.metrics() if "loss" in line}


def assert_equal_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.fixture
def new_run(
    tmp_path: Path,
    alone: torch.device,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    engine_config: Callable[..., dict[str, Any]],
) -> Callable[..., Run]:
    def make(
        name: str = "run",
        *,
        kind: str = "gpt2",
        precision: str = "bf16",
        distilled: bool = False,
        of_model: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Run:
        training = training_spec(**{"epochs": 2.0, "micro_batch": 2, **changes})
        teachers = [tiny_model("llama", seed=seed) for seed in (5, 6)] if distilled else []
        members = [
            Member(str(k), FrozenModel(teacher, device=alone, dtype=torch.bfloat16), 1.0 + k)
            for k, teacher in enumerate(teachers)
        ]
        return Run(
            directory=tmp_path / name,
            model=lambda: tiny_model(kind, **(of_model or {})),
            training=training,
            config=engine_config(training, precision=precision),
            device=alone,
            distillation=DistillationSpec(alpha=0.5, temperature=2.0) if distilled else None,
            ensemble=Ensemble(members) if distilled else None,
        )

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


def test_logged_lines(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    run = new_run(log_every_steps=3, warmup_steps=2)
    with caplog.at_level(logging.INFO):
        summary = run.train()
    logged = run.logged()
    assert list(logged) == [1, 3, 6, 8]
    tokens = {1: 40, 3: 120, 6: 220, 8: 280}  # the fourth and the eighth batch have two windows
    for step, line in logged.items():
        assert set(line) == {
            *("stage", "step", "epoch", "tokens", "loss", "ce"),
            *("lr", "grad_norm", "tokens_per_s"),
        }
        assert line["stage"] == "student"
        assert line["tokens"] == tokens[step]
        assert line["epoch"] == pytest.approx(step / 4)
        assert line["lr"] == learning_rate(run.training, step - 1, 8)
        assert line["loss"] == line["ce"]
        assert line["grad_norm"] > 0
        assert line["tokens_per_s"] > 0
    assert summary["train_tokens"] == 280
    assert summary["tokens_per_s"] == pytest.approx(280 / summary["seconds"])
    assert summary["params"] == sum(p.numel() for p in run.last_model.parameters())
    shown = [one.getMessage() for one in caplog.records if "tok/s" in one.getMessage()]
    # Not at a terminal: at once, then every ten seconds, and at the end.
    assert shown[0].startswith("student  step 1/8  loss ")
    assert shown[-1].startswith("student  step 8/8  loss ")
    assert shown[-1].endswith("0:00 left")
    assert len(shown) == 2


def test_a_distilled_step_logs_ce_and_kl_and_their_weighted_sum(
    new_run: Callable[..., Run],
) -> None:
    run = new_run(distilled=True, log_every_steps=1, epochs=1.0)
    run.train()
    logged = run.logged()
    assert list(logged) == [1, 2, 3, 4]
    for line in logged.values():
        assert line["kl"] > 0
        # The published reduction: KL summed over a window's ten positions, T² = 4.
        expected = 0.5 * line["ce"] + 0.5 * 4 * 10 * line["kl"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_training_learns(new_run: Callable[..., Run]) -> None:
    run = new_run(epochs=8.0, log_every_steps=1)
    run.train()
    logged = list(run.logged().values())
    assert logged[-1]["ce"] < 0.6 * logged[0]["ce"]


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
    stop_after: int, distilled: bool, new_run: Callable[..., Run]
) -> None:
    options = {"of_model": DROPOUT, "distilled": distilled, "log_every_steps": 2, "clip_norm": 0.5}
    undisturbed = new_run("undisturbed", **options)
    expected = undisturbed.train()
    run = new_run("stopped", **options)
    with pytest.raises(Stopped) as caught:
        run.train(stop_after=stop_after)
    assert (caught.value.reason, caught.value.exit_code) == ("SIGTERM", 143)
    assert caught.value.at == f"student, step {stop_after}"
    assert run.folder.saved[-1] == stop_after
    torch.manual_seed(99)  # nothing may depend on what this process drew before
    summary = run.train()
    assert_equal_weights(run.weights(), undisturbed.weights())
    timing = ("seconds", "tokens_per_s")
    assert {k: v for k, v in summary.items() if k not in timing} == {
        k: v for k, v in expected.items() if k not in timing
    }
    assert without_timing(run.metrics()) == without_timing(undisturbed.metrics())


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


@pytest.mark.parametrize("at", [(0, 3), (1, 0), (1, 3)])
def test_killed_at_any_step_ends_with_the_same_weights(
    at: tuple[int, int], new_run: Callable[..., Run]
) -> None:
    def kill(epoch: int, k: int) -> None:
        if (epoch, k) == at:
            raise Killed

    options = {"of_model": DROPOUT, "checkpoint_every_steps": 2, "evaluate_every_steps": 3}
    undisturbed = new_run("undisturbed", **options)
    undisturbed.train()
    run = new_run("killed", **options)
    with pytest.raises(Killed):
        run.train(before=kill)
    run.train()
    assert_equal_weights(run.weights(), undisturbed.weights())
    assert without_timing(run.metrics()) == without_timing(undisturbed.metrics())


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


# -- numbers that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_gradient_that_is_not_finite_ends_training(
    precision: str, new_run: Callable[..., Run]
) -> None:
    run = new_run(precision=precision, checkpoint_every_steps=2, log_every_steps=100)

    def spoil(epoch: int, k: int) -> None:
        if (epoch, k) == (1, 1):  # the sixth step
            with torch.no_grad():
                next(run.last_model.parameters())[7].fill_(float("inf"))

    with pytest.raises(TrainingError) as caught:
        run.train(before=spoil)
    (problem,) = caught.value.problems
    ids = np.random.default_rng(1).permutation(WINDOWS)[4:8]  # epoch 1, batch 1
    assert problem.where == "student: step 6"
    assert problem.got.startswith("a gradient that is not finite")
    assert problem.got.endswith(f"epoch 1, windows {', '.join(map(str, ids))}")
    assert problem.expected == "finite numbers"
    assert "lower the learning rate" in (problem.hint or "")
    assert (problem.hint or "").endswith(str(run.folder.directory / "step-00000004"))
    assert max(run.folder.saved) == 4


def test_without_a_checkpoint_the_error_says_so(new_run: Callable[..., Run]) -> None:
    run = new_run()

    def spoil(epoch: int, k: int) -> None:
        run.last_model.get_output_embeddings().weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"student: step 1: .*\n.*checkpoint: none yet"):
        run.train(before=spoil)


def test_a_development_loss_that_is_not_finite_ends_training(new_run: Callable[..., Run]) -> None:
    run = new_run(precision="fp32", learning_rate=1e30, evaluate_every_steps=1)
    expected = r"student: step 1: got a development cross-entropy that is not finite.*\n.*none yet"
    with pytest.raises(TrainingError, match=expected):
        run.train()


def test_the_engine_is_freed_also_after_an_error(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed = []
    original = TrainingEngine.destroy
    monkeypatch.setattr(
        TrainingEngine, "destroy", lambda engine: destroyed.append(1) or original(engine)
    )
    run = new_run()
    with pytest.raises(Stopped):
        run.train(stop_after=1)
    run.train()
    assert len(destroyed) == 2


def test_time_counts_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 103.0, 200.0, 201.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))
    clock = loop._Clock(10.0)
    with clock:
        pass
    assert clock.seconds == 13
    assert clock.rate(130) == 10  # since the start, what was done before the resume included
    with clock:
        pass
    assert clock.seconds == 14
    assert clock.rate(190) == 60  # since the last call
    assert clock.seconds_a_step(7) == 2


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
def test_not_finite_on_one_rank_is_the_same_error_on_both(two_ranks: Path) -> None:
    results = [json.loads((two_ranks / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["error"] == results[1]["error"]
    assert results[0]["error"].startswith("student: step 2: got a gradient that is not finite")


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
    run.train()
    if ranks.rank() == 0:
        save_file(run.weights(), folder / "resumed.safetensors")

    run = run_of(folder, "broken", config, device)

    def spoil(epoch: int, k: int) -> None:
        if (k, ranks.rank()) == (1, 1):
            run.last_model.get_output_embeddings().weight.data.fill_(float("nan"))

    try:
        run.train(before=spoil)
    except TrainingError as error:
        result["error"] = str(error)
    (folder / f"rank{ranks.rank()}.json").write_text(json.dumps(result))
    distributed.stop()


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[-1]))
