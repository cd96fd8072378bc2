"""The loop: a model, its data and its teachers enter; the trained model and a summary leave.

It resumes from the newest checkpoint by itself, evaluates, keeps the best weights, and stops at a
step boundary when it is asked to, all ranks at the same one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.engine.checkpoint import BestWeights, CheckpointFolder
from babyllama_ds.engine.schedule import learning_rate
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.errors import ModelError, Problem, TrainingError
from babyllama_ds.evaluation.cross_entropy import evaluate_cross_entropy
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.models.build import count_parameters
from babyllama_ds.models.compiled import forget_compiled
from babyllama_ds.rundir import METRICS_NAME
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest, stopped
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.teachers.watch import broken_windows, measures, warnings_of
from babyllama_ds.training.ahead import BatchesAhead
from babyllama_ds.training.batches import Batch, BatchPlan, LabelMask, WindowSource
from babyllama_ds.training.breakdown import PARTS, UNMEASURED, Breakdown, Parts
from babyllama_ds.training.clock import Clock
from babyllama_ds.training.limits import Limits
from babyllama_ds.training.meter import Meter
from babyllama_ds.training.metrics import MetricsLog
from babyllama_ds.training.objective import objective_of
from babyllama_ds.training.step import StepSums, train_step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained, and how."""

    name: str
    """`student`, `control` or `teachers/NAME`."""
    model: nn.Module
    training: TrainingSpec
    distillation: DistillationSpec | None
    """The loss of a distilled model; none: plain cross-entropy."""
    vocab_size: int
    seed: int
    micro_batch: int
    """Windows in one forward pass of one rank."""
    deepspeed: Mapping[str, Any]
    """DeepSpeed's configuration."""
    compiled: bool = False
    """Whether torch compiles the model in training."""
    has_label: LabelMask | None = None
    """Which positions of a window have a label; none: all but its last."""
    meter: Meter | None = None
    """What a token costs and what the machine can do; none: only tokens per second are told."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the stage needs from its run."""

    run_dir: Path
    device: torch.device
    stop: StopRequest
    checkpoints: CheckpointFolder


def train(
    stage: Stage,
    surroundings: Surroundings,
    *,
    windows: WindowSource,
    dev: DevWindows,
    ensemble: Ensemble | None,
) -> dict[str, Any]:
    """Train `stage.model` to its limits; rank 0's module then holds the kept weights.

    Returns the summary that the report reads (`training.json`).

    Raises:
        TrainingError: a loss or gradient is not finite.
        Stopped: the run was asked to stop; a checkpoint was written.
    """
    with trainer_of(stage, surroundings, windows=windows, dev=dev, ensemble=ensemble) as trainer:
        trainer.run()
        return trainer.finish()


@contextmanager
def trainer_of(
    stage: Stage,
    surroundings: Surroundings,
    *,
    windows: WindowSource,
    dev: DevWindows,
    ensemble: Ensemble | None,
) -> Iterator[Trainer]:
    """Within, the training in progress; behind it the engine is freed and the model as it was."""
    trainer = Trainer(stage, surroundings, windows, dev, ensemble)
    try:
        yield trainer
    finally:
        trainer.ahead.close()
        trainer.engine.destroy()
        trainer.objective.release()
        if stage.compiled:
            forget_compiled()


class Trainer:
    """One training in progress: the engine, where it stands, and the best weights so far."""

    def __init__(
        self,
        stage: Stage,
        surroundings: Surroundings,
        windows: WindowSource,
        dev: DevWindows,
        ensemble: Ensemble | None,
    ) -> None:
        self.stage = stage
        self.around = surroundings
        self.dev = dev
        self.ensemble = ensemble
        self.batches = BatchPlan(
            windows,
            stage.training,
            rank=ranks.rank(),
            num_ranks=ranks.world_size(),
            micro_batch=stage.micro_batch,
            device=surroundings.device,
            has_label=stage.has_label,
        )
        self.ahead = BatchesAhead(
            self.batches.batch,
            total_steps=self.batches.total_steps,
            device=surroundings.device,
        )
        self.objective = objective_of(
            stage.model,
            ensemble,
            vocab_size=stage.vocab_size,
            training=stage.training,
            distillation=stage.distillation,
            seed=stage.seed,
        )
        self.engine = TrainingEngine(
            self.objective,
            training=stage.training,
            config=stage.deepspeed,
            device=surroundings.device,
        )
        if stage.compiled:
            self.objective.compile_layers()
        self.best = BestWeights()
        self.progress = surroundings.checkpoints.resume(self.engine, self.best)
        self.clock = Clock(self.progress.seconds)
        self.limits = Limits(stage.training, total_steps=self.batches.total_steps)
        # None of them where only their mixture is remembered (`cache: topk`): it is not watched.
        self.teachers = [member.name for member in ensemble.members] if ensemble else []
        self.warned: set[str] = set()
        self.profiled = self._profiled_steps()
        self.breakdown = Breakdown(surroundings.device)

    def run(self) -> None:
        """Steps until a limit is reached, with evaluations and checkpoints where they are due."""
        first, total = self.progress.step, self.batches.total_steps
        with MetricsLog(
            self.around.run_dir, self.stage.name, first_step=first, total_steps=total
        ) as metrics:
            while self.limits.ended_by(self.progress) is None:
                self._stop_if_asked()
                self.step(metrics)
                if self._due_evaluation():
                    self._evaluate(metrics)
                if self._due_checkpoint():
                    self.checkpoint()
        if self.limits.ended_by(self.progress) != "steps":
            log.info("%s %s", self.stage.name, self.limits.told(self.progress))

    def finish(self) -> dict[str, Any]:
        """Put the kept weights in place and sum up."""
        progress, kept = self.progress, "last"
        if self.stage.training.keep == "best" and progress.best_step is not None:
            self.best.put(self.objective)
            kept = "best"
        else:
            self.engine.show_average()
        ema = self.stage.training.ema
        tokens_per_s = progress.tokens / max(progress.seconds, 1e-9)
        return {
            "params": count_parameters(self.stage.model),
            "vocab_size": self.stage.vocab_size,
            "steps": progress.step,
            "planned_steps": self.batches.total_steps,
            "ended_by": self.limits.ended_by(progress),
            "train_tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_s": tokens_per_s,
            **self._metered(tokens_per_s),
            "step_s": self._seconds_of_parts() if self._all_profiled() else None,
            "kept": kept,
            "averaged": None if ema is None else ema.decay,
            "best_dev_ce": progress.best_dev_ce,
            "best_step": progress.best_step,
            "final_dev_ce": progress.last_dev_ce,
        }

    # -- one step ---------------------------------------------------------------------------------

    def step(self, metrics: MetricsLog) -> None:
        """The next optimizer step, logged where it is due."""
        step = self.progress.step
        rate = learning_rate(self.stage.training, step, self.batches.total_steps)
        with self.clock, self._parts(step) as parts:
            with parts.part("data"):
                batch = self.ahead.batch(step)
            sums = train_step(
                self.engine,
                self.objective,
                self.ensemble,
                batch,
                rate=rate,
                seed=self.stage.seed,
                step=step,
                done=step / self.batches.total_steps,
                watch=bool(self.teachers) and self._due_log(step + 1),
                parts=parts,
            )
        if self.engine.overflowed:
            raise self._not_finite("a gradient", step, batch)
        self.progress = replace(
            self.progress,
            step=step + 1,
            tokens=self.progress.tokens + batch.num_valid,
            seconds=self.limits.seconds(self.clock.seconds),
        )
        if self._due_log(step + 1):
            self._log(step, batch, sums, rate, metrics)
        if self._all_profiled() and step + 1 == self.profiled.stop:
            self._tell_parts(metrics)
        metrics.advance()

    def _log(
        self, step: int, batch: Batch, sums: StepSums, rate: float, metrics: MetricsLog
    ) -> None:
        with self.clock:  # .item() waits for the device: that time belongs to the steps
            totals = sums.over_all_ranks()
            watched = self._watched(sums, batch)
        loss = self.objective.value(
            totals.ce, totals.kl, sums.counts, z_sum=totals.z, matching_sum=totals.matching
        )
        grad_norm = self.engine.grad_norm
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise self._not_finite(f"a loss of {loss}, gradient norm {grad_norm}", step, batch)
        if not all(map(math.isfinite, watched.values())):
            raise self._not_finite("a logit of the student", step, batch)
        self._warn(watched)
        shown = {"loss": loss, **self.objective.measures(totals, sums.counts)}
        tokens_per_s = self.clock.rate(self.progress.tokens)
        metered = self._metered(tokens_per_s)
        metrics.write(
            self.progress.step,
            {
                "epoch": self.progress.step / self.batches.steps_per_epoch,
                "tokens": self.progress.tokens,
                **shown,
                **watched,
                "lr": rate,
                "grad_norm": grad_norm,
                "tokens_per_s": tokens_per_s,
                **metered,
            },
        )
        if self.clock.line_due(last=self.progress.step == self.batches.total_steps):
            left_s = (self.batches.total_steps - self.progress.step) * self.clock.seconds_a_step(
                self.progress.step
            )
            metrics.show(
                self.progress.step,
                shown,
                tokens_per_s=tokens_per_s,
                mfu=metered.get("mfu"),
                seconds_left=left_s,
            )

    def _watched(self, sums: StepSums, batch: Batch) -> dict[str, float]:
        """How the teachers, their ensemble and the student agree (`teachers.watch`)."""
        if sums.agreement is None:
            return {}
        return measures(
            sums.agreement,
            self.teachers,
            num_labelled=batch.num_labelled,
            num_valid=batch.num_valid,
        )

    def _warn(self, watched: Mapping[str, float]) -> None:
        """Each warning once; the report finds the same in the metrics."""
        for warning in warnings_of(watched, self.teachers, vocab_size=self.stage.vocab_size):
            if warning not in self.warned and ranks.rank() == 0:
                log.warning("warning: %s", warning)
            self.warned.add(warning)

    def _not_finite(self, what: str, step: int, batch: Batch) -> TrainingError:
        """The error that names the teachers to blame, or else the student. A collective."""
        where = f"{self.stage.name}: step {step + 1}"  # counted from 1, as in the metrics
        broken = self._broken_teachers(batch)
        if broken:
            return TrainingError.all_of(
                [
                    Problem(
                        where=where,
                        got=f"logits of teacher {name} that are not finite, in "
                        f"epoch {batch.epoch}, windows {_listed(windows)}",
                        expected="finite numbers",
                        hint=f"the weights of {name} are damaged, or its training had diverged: "
                        "train it again, or leave it out",
                    )
                    for name, windows in broken.items()
                ]
            )
        return TrainingError.of(
            where,
            got=f"{what} that is not finite, in epoch {batch.epoch}, "
            f"windows {_listed(batch.window_ids)}",
            expected="finite numbers",
            hint=self._after_divergence(),
        )

    def _broken_teachers(self, batch: Batch) -> dict[str, NDArray[np.int64]]:
        """Teachers with logits that are not finite on this batch, and the windows, of all ranks.

        The teachers run once more: nothing of them is kept during a step.
        """
        if self.ensemble is None or not self.teachers:
            return {}
        ensemble = self.ensemble
        own_MKB = ranks.on_every_rank(
            lambda: [
                broken_windows(
                    ensemble.states(micro),
                    micro.valid_N,
                    len(micro.input_ids_BS),
                    vocab_size=self.stage.vocab_size,
                )
                for micro in batch.micro_batches
            ]
        )
        # A batch is dealt out micro-batch by micro-batch, rank by rank, its padding last.
        broken_KMRB = np.stack(ranks.gather_objects(np.stack(own_MKB))).transpose(2, 1, 0, 3)
        return {
            name: batch.window_ids[broken_MRB.reshape(-1)[: batch.num_windows]]
            for name, broken_MRB in zip(self.teachers, broken_KMRB, strict=True)
            if broken_MRB.any()
        }

    def _after_divergence(self) -> str:
        return (
            "lower the learning rate or lengthen the warm-up; last good checkpoint: "
            f"{self.around.checkpoints.newest_name()}"
        )

    # -- how fast, and where the time goes --------------------------------------------------------

    def _metered(self, tokens_per_s: float) -> dict[str, float]:
        return self.stage.meter.read(tokens_per_s) if self.stage.meter else {}

    def _profiled_steps(self) -> range:
        """The steps whose parts are timed: not this start's first one, which warms up."""
        asked = self.stage.training.profile_steps or 0
        first, total = self.progress.step + 1, self.batches.total_steps
        return range(first, min(first + asked, total)) if asked else range(0)

    def _all_profiled(self) -> bool:
        """Whether there are such steps, and all of them were made."""
        return bool(self.profiled) and self.progress.step >= self.profiled.stop

    @contextmanager
    def _parts(self, step: int) -> Iterator[Parts]:
        """What this step tells its parts to."""
        if step not in self.profiled:
            yield UNMEASURED
            return
        backbone: nn.Module = self.stage.model.base_model  # type: ignore[assignment]
        with (
            self.breakdown.of_module(backbone, "student forward"),
            self.engine.communicating(lambda: self.breakdown.part("communication")),
        ):
            yield self.breakdown

    def _seconds_of_parts(self) -> dict[str, float]:
        """Seconds of a step's parts, a mean over ranks and profiled steps. A collective."""
        times = ranks.world_size() * len(self.profiled)
        sums = ranks.sum_floats(*self.breakdown.seconds.values())
        return {part: total / times for part, total in zip(PARTS, sums, strict=True)}

    def _tell_parts(self, metrics: MetricsLog) -> None:
        seconds = self._seconds_of_parts()
        metrics.write(self.progress.step, {f"step_s/{part}": s for part, s in seconds.items()})
        whole = sum(seconds.values())
        shares = (f"{part} {1e3 * s:.1f} ms ({s / whole:.0%})" for part, s in seconds.items())
        log.info("%s  a step of %.1f ms: %s", self.stage.name, 1e3 * whole, ", ".join(shares))

    # -- between steps ----------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        reason = self.around.stop.agreed()
        if reason is None:
            return
        if self.progress.step > 0:
            self.checkpoint()
        raise stopped(reason, at=f"{self.stage.name}, step {self.progress.step}")

    def _evaluate(self, metrics: MetricsLog) -> None:
        with self.engine.averaged():
            dev_ce, step = self.dev_ce(), self.progress.step
            self.progress = replace(self.progress, last_dev_ce=dev_ce)
            if self.progress.best_dev_ce is None or dev_ce < self.progress.best_dev_ce:
                self.progress = replace(self.progress, best_dev_ce=dev_ce, best_step=step)
                self.best.take(self.objective)
        self.progress = self.limits.after_evaluation(self.progress, dev_ce)
        metrics.write(step, {"tokens": self.progress.tokens, "dev_ce": dev_ce})
        log.info("%s  step %d  dev cross-entropy %.4f", self.stage.name, step, dev_ce)

    def dev_ce(self) -> float:
        """Nats per token, of the weights that the module holds."""
        try:
            return evaluate_cross_entropy(
                self.stage.model,
                self.dev.windows_of,
                self.dev.num_windows,
                device=self.around.device,
                batch_windows=self.dev.batch_windows,
                vocab_size=self.stage.vocab_size,
                begins_of=self.dev.begins_of,
            ).cross_entropy
        except ModelError as error:  # not finite: the last update overflowed the weights
            raise TrainingError.of(
                f"{self.stage.name}: step {self.progress.step}",
                got="a development cross-entropy that is not finite",
                expected="finite numbers",
                hint=self._after_divergence(),
            ) from error

    def checkpoint(self) -> None:
        """Write one, of where the training stands. A collective."""
        self.around.checkpoints.save(self.engine, self.progress, self.best)
        self.around.checkpoints.keep_beside(self.around.run_dir / METRICS_NAME)

    def _due_log(self, step: int) -> bool:
        every = self.stage.training.log_every_steps
        return step % every == 0 or step in (1, self.batches.total_steps)

    def _due_evaluation(self) -> bool:
        every = self.stage.training.evaluate_every_steps or self.batches.steps_per_epoch
        return self.progress.step % every == 0 or self._ends()

    def _ends(self) -> bool:
        """Whether this step is the last one, as far as is known before its evaluation."""
        last = self.progress.step == self.batches.total_steps
        return last or self.limits.time_is_up(self.progress)

    def _due_checkpoint(self) -> bool:
        every = self.stage.training.checkpoint_every_steps
        if every is None:
            return self._due_evaluation()
        return self.progress.step % every == 0


def _listed(windows: NDArray[np.int64]) -> str:
    return ", ".join(map(str, windows.tolist()))
