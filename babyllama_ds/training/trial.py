"""A training tried out: what `loop.train` takes and some seconds enter; its pace leaves.

The steps are those of the job: its engine, its batches, its loss, compiled where it would be. The
weights are worth nothing afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch

from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.training.batches import WindowSource
from babyllama_ds.training.loop import Trainer
from babyllama_ds.training.metrics import MetricsLog
from babyllama_ds.training.pace import StepPace
from babyllama_ds.training.stage import RunContext, Stage

WARM_UP_STEPS = 2
"""Not timed: the first compiles, allocates and touches memory, the second finds it in place."""
LEAST_STEPS = 3
"""Timed, however long they take; fewer where the training has no more."""
TIMED_PASSES = 3
"""Passes of the teachers over a step's windows that are timed."""
TIMED_BATCHES = 4
"""Forward passes of an evaluation that are timed."""


def try_out(
    stage: Stage,
    context: RunContext,
    *,
    windows: WindowSource,
    dev: DevWindows,
    ensemble: Ensemble | None,
    seconds: float,
) -> StepPace:
    """The pace of a training, from about so many seconds of its steps. On one rank: of several,
    each would make as many steps as its own clock says.

    Raises:
        TrainingError: a loss or gradient is not finite.
        Stopped: it was asked to stop.
    """
    started = time.perf_counter()
    with (
        closing(Trainer(stage, context, windows=windows, dev=dev, ensemble=ensemble)) as trainer,
        MetricsLog(
            context.run_dir, stage.name, first_step=0, total_steps=trainer.batches.total_steps
        ) as metrics,
    ):
        tried = _Tried(trainer, context, metrics)
        warm = tried.steps(WARM_UP_STEPS)
        engine_s = time.perf_counter() - started
        steps, took_s = tried.steps_for(seconds)
        step_s = took_s / steps if steps else engine_s / max(warm, 1)
        return StepPace(
            steps=steps,
            step_s=step_s,
            teachers_s=tried.teachers_s() if ensemble else 0.0,
            engine_s=max(0.0, engine_s - warm * step_s) if steps else 0.0,
            dev_window_s=tried.dev_window_s(dev),
            best_s=tried.seconds_of(lambda: trainer.best.take(trainer.objective)),
            checkpoint_s=tried.seconds_of(trainer.checkpoint),
        )


class _Tried:
    """One trainer, timed."""

    def __init__(self, trainer: Trainer, context: RunContext, metrics: MetricsLog) -> None:
        self.trainer, self.context, self.metrics = trainer, context, metrics

    def steps(self, number: int) -> int:
        """Make so many steps, fewer where there are no more; how many were made."""
        number = min(number, self._left)
        for _ in range(number):
            self._step()
        self._wait()
        return number

    def steps_for(self, seconds: float) -> tuple[int, float]:
        """Make steps for so long; how many, and how long they took."""
        made, began = 0, time.perf_counter()
        while self._left and (made < LEAST_STEPS or time.perf_counter() - began < seconds):
            self._step()
            made += 1
        self._wait()
        return made, time.perf_counter() - began

    def teachers_s(self) -> float:
        """The teachers' forward passes of one step."""
        trainer = self.trainer
        assert trainer.ensemble is not None
        batch = trainer.batches.batch(trainer.progress.step - 1)
        began = time.perf_counter()
        for _ in range(TIMED_PASSES):
            for micro in batch.micro_batches:
                trainer.ensemble.targets(micro)
        self._wait()
        return (time.perf_counter() - began) / TIMED_PASSES

    def dev_window_s(self, dev: DevWindows) -> float:
        """A window of an evaluation, from a few forward passes behind a first one."""
        size = dev.batch_windows
        self._evaluate(min(dev.num_windows, size))
        timed = min(dev.num_windows, TIMED_BATCHES * size)
        return self.seconds_of(lambda: self._evaluate(timed)) / timed

    def _evaluate(self, windows: int) -> None:
        self.trainer.dev = replace(self.trainer.dev, num_windows=windows)
        self.trainer.dev_ce()

    def seconds_of(self, work: Callable[[], None]) -> float:
        """How long a call takes, until the device has done it."""
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _step(self) -> None:
        self.context.stop.check()
        self.trainer.step(self.metrics)

    @property
    def _left(self) -> int:
        return self.trainer.batches.total_steps - self.trainer.progress.step

    def _wait(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
