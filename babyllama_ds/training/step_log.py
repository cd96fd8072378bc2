"""The log of a training's steps: the sums of a step enter; its line of metrics and warnings leave.

A logged step waits for the device once more, for its sums. What it finds that is not finite ends
the training.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

from babyllama_ds import ranks
from babyllama_ds.engine.checkpoint import Progress
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.teachers.ensemble import Ensemble
from babyllama_ds.teachers.watch import measures, warnings_of
from babyllama_ds.training.batches import Batch, BatchPlan
from babyllama_ds.training.clock import Clock
from babyllama_ds.training.metrics import MetricsLog
from babyllama_ds.training.not_finite import NotFinite
from babyllama_ds.training.objective import Objective
from babyllama_ds.training.stage import Stage
from babyllama_ds.training.step import StepSums

log = logging.getLogger(__name__)

SHOWN_EVERY_S = 10.0
"""Seconds between what people are shown, in the log or on the bar."""


class StepLog:
    """The log of one training's steps."""

    def __init__(
        self,
        stage: Stage,
        *,
        engine: TrainingEngine,
        objective: Objective,
        ensemble: Ensemble | None,
        batches: BatchPlan,
        clock: Clock,
        not_finite: NotFinite,
    ) -> None:
        self._stage, self._engine, self._objective = stage, engine, objective
        self._batches, self._clock, self._not_finite = batches, clock, not_finite
        # None of them where only their mixture is remembered (`cache: topk`): it is not watched.
        self._teachers = [member.name for member in ensemble.members] if ensemble else []
        self._warned: set[str] = set()
        self._shown_at = -math.inf

    def due(self, step: int) -> bool:
        """Whether this step, counted from 1, is logged."""
        every = self._stage.training.log_every_steps
        return step % every == 0 or step in (1, self._batches.total_steps)

    def watches(self, step: int) -> bool:
        """Whether in this step, counted from 1, it is measured how teachers and student agree."""
        return bool(self._teachers) and self.due(step)

    def write(
        self, progress: Progress, batch: Batch, sums: StepSums, rate: float, metrics: MetricsLog
    ) -> None:
        """Log the step that led to `progress`, at the learning rate `rate`. A collective.

        Raises `TrainingError` when its loss, its gradient or a logit is not finite.
        """
        with self._clock:  # .item() waits for the device: that time belongs to the steps
            totals = sums.over_all_ranks()
            watched = self._watched(sums, batch)
        loss = self._objective.value(totals, sums.counts)
        grad_norm = self._engine.grad_norm
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            what = f"a loss of {loss}, gradient norm {grad_norm}"
            raise self._not_finite.in_batch(what, batch, step=progress.step)
        if not all(map(math.isfinite, watched.values())):
            raise self._not_finite.in_batch("a logit of the student", batch, step=progress.step)
        self._warn(watched)
        shown = {"loss": loss, **self._objective.measures(totals, sums.counts)}
        tokens_per_s = self._clock.rate(progress.tokens)
        metered = self._stage.metered(tokens_per_s)
        metrics.write(
            progress.step,
            {
                "epoch": progress.step / self._batches.steps_per_epoch,
                "tokens": progress.tokens,
                **shown,
                **watched,
                "lr": rate,
                "grad_norm": grad_norm,
                "tokens_per_s": tokens_per_s,
                **metered,
            },
        )
        left = self._batches.total_steps - progress.step
        if left == 0 or time.monotonic() - self._shown_at >= SHOWN_EVERY_S:
            self._shown_at = time.monotonic()
            metrics.show(
                progress.step,
                shown,
                tokens_per_s=tokens_per_s,
                mfu=metered.get("mfu"),
                seconds_left=left * self._clock.seconds_a_step(progress.step),
            )

    def _watched(self, sums: StepSums, batch: Batch) -> dict[str, float]:
        """How the teachers, their ensemble and the student agree (`teachers.watch`)."""
        if sums.agreement is None:
            return {}
        return measures(
            sums.agreement,
            self._teachers,
            num_labelled=batch.num_labelled,
            num_valid=batch.num_valid,
        )

    def _warn(self, watched: Mapping[str, float]) -> None:
        """Each warning once; the report finds the same in the metrics."""
        for warning in warnings_of(watched, self._teachers, vocab_size=self._stage.vocab_size):
            if warning not in self._warned and ranks.rank() == 0:
                log.warning("warning: %s", warning)
            self._warned.add(warning)
