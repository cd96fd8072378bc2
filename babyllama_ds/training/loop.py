"""The loop: a model, its data and its teachers enter; the trained model and a summary leave.

It resumes from the newest checkpoint by itself, evaluates, keeps the best weights and the models of
milestones, and stops when it is asked to, all ranks at the same step boundary, or within an
evaluation, which comes first when it goes on.

    step        one optimizer step
    step_log    what is logged of it
    profiling   where its time goes, on request
    limits      what ends the training before its last step
    not_finite  numbers that are not finite, and whose they are
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from typing import Any

from babyllama_ds import ranks
from babyllama_ds.engine.checkpoint import BestWeights
from babyllama_ds.engine.schedule import learning_rate
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.errors import ModelError, Stopped
from babyllama_ds.evaluation.cross_entropy import evaluate_cross_entropy
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.evaluation.forward import OnBatch
from babyllama_ds.heartbeat import Heartbeat
from babyllama_ds.models.build import count_parameters
from babyllama_ds.models.compiled import forget_compiled
from babyllama_ds.stopping import stopped
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.training.ahead import BatchesAhead
from babyllama_ds.training.batches import BatchPlan, WindowSource
from babyllama_ds.training.clock import Clock
from babyllama_ds.training.limits import Limits
from babyllama_ds.training.metrics import MetricsLog, logged_of
from babyllama_ds.training.not_finite import NotFinite
from babyllama_ds.training.objective import objective_of
from babyllama_ds.training.profiling import ProfiledSteps
from babyllama_ds.training.stage import RunContext, Stage
from babyllama_ds.training.step import train_step
from babyllama_ds.training.step_log import StepLog

log = logging.getLogger(__name__)


def train(
    stage: Stage,
    context: RunContext,
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
    with closing(Trainer(stage, context, windows=windows, dev=dev, ensemble=ensemble)) as trainer:
        trainer.run()
        return trainer.finish()


class Trainer:
    """One training in progress: the engine, where it stands, and the best weights so far."""

    def __init__(
        self,
        stage: Stage,
        context: RunContext,
        *,
        windows: WindowSource,
        dev: DevWindows,
        ensemble: Ensemble | None,
    ) -> None:
        self.stage = stage
        self.context = context
        self.dev = dev
        self.ensemble = ensemble
        self.batches = BatchPlan(
            windows,
            stage.training,
            rank=ranks.rank(),
            num_ranks=ranks.world_size(),
            micro_batch=stage.micro_batch,
            device=context.device,
            has_label=stage.has_label,
        )
        self.ahead = BatchesAhead(
            self.batches.batch,
            total_steps=self.batches.total_steps,
            device=context.device,
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
            device=context.device,
        )
        if stage.compiled:
            self.objective.compile_layers()
        self.best = BestWeights()
        self.progress = context.checkpoints.resume(self.engine, self.best)
        if context.milestones is not None:
            context.milestones.go_on_from(self.progress.step)
        run = context.run_dir.name
        self.runs = list(dict.fromkeys([*self.progress.runs, run]))
        if others := [name for name in self.progress.runs if name != run]:
            log.info("%s was begun by %s: going on with it", stage.name, " and ".join(others))
        self.clock = Clock(self.progress.seconds, self.progress.tokens)
        self.limits = Limits(stage.training, total_steps=self.batches.total_steps)
        self.not_finite = NotFinite(
            stage=stage.name,
            vocab_size=stage.vocab_size,
            ensemble=ensemble,
            checkpoints=context.checkpoints,
        )
        self.step_log = StepLog(
            stage,
            engine=self.engine,
            objective=self.objective,
            ensemble=ensemble,
            batches=self.batches,
            clock=self.clock,
            not_finite=self.not_finite,
        )
        self.profiled = ProfiledSteps(
            stage,
            self.engine,
            device=context.device,
            first_step=self.progress.step,
            total_steps=self.batches.total_steps,
        )

    def run(self) -> None:
        """Steps until a limit is reached, with evaluations and checkpoints where they are due."""
        with (
            Heartbeat(self.stage.name) as heartbeat,
            MetricsLog(
                self.context.run_dir,
                self.stage.name,
                first_step=self.progress.step,
                total_steps=self.batches.total_steps,
                logged=self.context.checkpoints.logged,
            ) as metrics,
        ):
            if self.progress.evaluation_due:
                self._evaluate(metrics, heartbeat)
            while self.limits.ended_by(self.progress) is None:
                self._stop_if_asked()
                self.step(metrics)
                heartbeat.beat(f"step {self.progress.step}")
                self._keep_milestone()
                if self._due_evaluation():
                    self._evaluate(metrics, heartbeat)
                if self._due_checkpoint():
                    self.checkpoint()
                    heartbeat.beat(f"the checkpoint of step {self.progress.step}")
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
            **self.stage.metered(tokens_per_s),
            "step_s": self.profiled.seconds(progress.step),
            "kept": kept,
            "averaged": None if ema is None else ema.decay,
            "best_dev_ce": progress.best_dev_ce,
            "best_step": progress.best_step,
            "final_dev_ce": progress.last_dev_ce,
            "runs": progress.runs,
            **self._milestones(),
        }

    def close(self) -> None:
        """Free the engine, and leave the model as it was: without hooks, not compiled."""
        self.ahead.close()
        self.engine.destroy()
        self.objective.release()
        if self.stage.compiled:
            forget_compiled()

    def _milestones(self) -> dict[str, Any]:
        """The models kept on the way, by name."""
        if self.context.milestones is None:
            return {}
        reached = self.context.milestones.reached(self.progress.step)
        return {"milestones": {one.name: {"words": one.seen, "steps": one.step} for one in reached}}

    # -- one step ---------------------------------------------------------------------------------

    def step(self, metrics: MetricsLog) -> None:
        """The next optimizer step, logged where it is due."""
        step = self.progress.step
        rate = learning_rate(self.stage.training, step, self.batches.total_steps)
        with self.clock, self.profiled.timer(step) as timed:
            with timed("data"):
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
                watch=self.step_log.watches(step + 1),
                timed=timed,
            )
        if self.engine.overflowed:
            raise self.not_finite.in_batch("a gradient", batch, step=step + 1)
        self.progress = replace(
            self.progress,
            step=step + 1,
            tokens=self.progress.tokens + batch.num_valid,
            seconds=self.limits.seconds(self.clock.seconds),
            runs=self.runs,
        )
        if self.step_log.due(step + 1):
            self.step_log.write(self.progress, batch, sums, rate, metrics)
        self.profiled.log(step + 1, metrics)
        metrics.advance()

    # -- between steps ----------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        reason = self.context.stop.agreed()
        if reason is None:
            return
        if self.progress.step > 0:
            self.checkpoint()
        raise stopped(reason, at=f"{self.stage.name}, step {self.progress.step}")

    def _keep_milestone(self) -> None:
        """Keep the milestone that is due, before the evaluation and the checkpoint: a training that
        is killed after these goes on beyond it."""
        milestones = self.context.milestones
        if milestones is not None and milestones.due(self.progress.step):
            with self.engine.averaged():
                milestones.keep(self.stage.model, self.progress)

    def _evaluate(self, metrics: MetricsLog, heartbeat: Heartbeat) -> None:
        step = self.progress.step

        def on_batch(done: int, batches: int) -> None:
            heartbeat.beat(f"batch {done} of {batches} of the evaluation at step {step}")
            self.context.stop.check()

        with self.engine.averaged():
            try:
                dev_ce = self.dev_ce(on_batch)
            except Stopped as asked:  # of all ranks, after the same batch
                self.progress = replace(self.progress, evaluation_due=True)
                self.checkpoint()
                where = f"{self.stage.name}, the evaluation at step {step}"
                raise stopped(asked.reason, at=where) from None
            self.progress = replace(self.progress, last_dev_ce=dev_ce, evaluation_due=False)
            if self.progress.best_dev_ce is None or dev_ce < self.progress.best_dev_ce:
                self.progress = replace(self.progress, best_dev_ce=dev_ce, best_step=step)
                self.best.take(self.objective)
        self.progress = self.limits.after_evaluation(self.progress, dev_ce)
        metrics.write(step, {"tokens": self.progress.tokens, "dev_ce": dev_ce})
        log.info("%s  step %d  dev cross-entropy %.4f", self.stage.name, step, dev_ce)

    def dev_ce(self, on_batch: OnBatch | None = None) -> float:
        """The development cross-entropy in nats per token, of the weights that the module holds."""
        try:
            return evaluate_cross_entropy(
                self.stage.model,
                self.dev.windows_of,
                self.dev.num_windows,
                device=self.context.device,
                batch_windows=self.dev.batch_windows,
                vocab_size=self.stage.vocab_size,
                begins_of=self.dev.begins_of,
                on_batch=on_batch,
            ).cross_entropy
        except ModelError as error:
            raise self.not_finite.in_evaluation(step=self.progress.step) from error

    def checkpoint(self) -> None:
        """Write a checkpoint of where the training stands. A collective."""
        self.context.checkpoints.save(
            self.engine,
            self.progress,
            self.best,
            lambda: logged_of(self.context.run_dir, self.stage.name),
        )

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
