"""Learning rates: a step's number enters, a rate leaves. Pure, so resuming needs no state."""

from __future__ import annotations

import math

from babyllama_ds.spec.training import TrainingSpec


def learning_rate(training: TrainingSpec, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total_steps`.

    Linear warm-up from zero, then cosine or linear decay to zero, as transformers'
    `get_cosine_schedule_with_warmup` and `get_linear_schedule_with_warmup`, which the published
    recipes use; so with a warm-up the first step's rate is zero.
    """
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, total_steps - training.warmup_steps)
    if training.schedule == "linear":
        return training.learning_rate * max(0.0, 1.0 - progress)
    return training.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
