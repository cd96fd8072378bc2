"""Ends before the planned last step: cross-entropies and seconds enter, a reason to end leaves.

    early stopping   patience evaluations in a row of which none was lower, by more than min_delta
                     nats, than the lowest that counted before them (Prechelt, "Early stopping, but
                     when?", 1998; the rule of Keras and Lightning)
    time             max_minutes of optimizer steps, by rank 0's clock

What both go by stands in the progress that checkpoints hold, so a training that was stopped in
between ends where it would have. The learning rate is no part of this: it decays over the planned
steps, whether they are reached or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from babyllama_ds import ranks
from babyllama_ds.engine.checkpoint import Progress
from babyllama_ds.spec.training import TrainingSpec

EndedBy = Literal["steps", "early_stopping", "max_minutes"]
"""`steps`: every planned step was made."""


class Limits:
    """What ends one training."""

    def __init__(self, training: TrainingSpec, *, total_steps: int) -> None:
        self._early_stopping = training.early_stopping
        self._minutes = training.max_minutes
        self._total_steps = total_steps

    def seconds(self, own_s: float) -> float:
        """What the clock says to all ranks: rank 0's, where an end depends on it. A collective."""
        if self._minutes is None:
            return own_s
        return ranks.sum_floats(own_s if ranks.rank() == 0 else 0.0)[0]

    def after_evaluation(self, progress: Progress, dev_ce: float) -> Progress:
        """The progress with an evaluation more: does it count as lower?"""
        lowest, spec = progress.lowest_counted_ce, self._early_stopping
        if spec is None:
            return progress
        if lowest is None or dev_ce < lowest - spec.min_delta:
            return replace(progress, lowest_counted_ce=dev_ce, evaluations_waited=0)
        return replace(progress, evaluations_waited=progress.evaluations_waited + 1)

    def time_is_up(self, progress: Progress) -> bool:
        """Whether the minutes are used up."""
        return self._minutes is not None and progress.seconds >= 60 * self._minutes

    def ended_by(self, progress: Progress) -> EndedBy | None:
        """What ends the training here; none: it goes on. Asked between steps."""
        if progress.step >= self._total_steps:
            return "steps"
        stopping = self._early_stopping
        if stopping is not None and progress.evaluations_waited >= stopping.patience:
            return "early_stopping"
        return "max_minutes" if self.time_is_up(progress) else None

    def told(self, progress: Progress) -> str:
        """Why and when it ends early, for people."""
        where = f"ends after step {progress.step} of {self._total_steps}"
        if self.ended_by(progress) == "max_minutes":
            return f"{where}: {progress.seconds / 60:.1f} minutes of steps, max_minutes"
        assert self._early_stopping is not None, "nothing else ends a training early"
        return (
            f"{where}: early stopping, {progress.evaluations_waited} evaluations without a dev "
            f"cross-entropy more than {self._early_stopping.min_delta:g} below "
            f"{progress.lowest_counted_ce:.4f}"
        )
