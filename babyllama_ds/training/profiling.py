"""The steps whose parts are timed, where the job asks for it: seconds of each part leave.

`breakdown` measures; here it is decided which steps, and told what came of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from babyllama_ds import ranks
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.training.breakdown import PARTS, Breakdown, PartTimer, untimed
from babyllama_ds.training.metrics import MetricsLog
from babyllama_ds.training.stage import Stage

log = logging.getLogger(__name__)


class ProfiledSteps:
    """The steps that are timed: as many as the job says, not this start's first, which warms up."""

    def __init__(
        self,
        stage: Stage,
        engine: TrainingEngine,
        *,
        device: torch.device,
        first_step: int,
        total_steps: int,
    ) -> None:
        self._stage, self._engine = stage, engine
        asked, first = stage.training.profile_steps or 0, first_step + 1
        self._steps = range(first, min(first + asked, total_steps)) if asked else range(0)
        self._breakdown = Breakdown(device)

    @contextmanager
    def timer(self, step: int) -> Iterator[PartTimer]:
        """Within, what times the parts of this step: nothing, unless it was asked for."""
        if step not in self._steps:
            yield untimed
            return
        backbone: nn.Module = self._stage.model.base_model  # type: ignore[assignment]
        with (
            self._breakdown.of_module(backbone, "student forward"),
            self._engine.communicating(lambda: self._breakdown.part("communication")),
        ):
            yield self._breakdown.part

    def seconds(self, done: int) -> dict[str, float] | None:
        """Seconds of a step's parts, a mean over ranks and profiled steps. A collective.

        None where there are no such steps, or `done` steps are not all of them.
        """
        if not self._steps or done < self._steps.stop:
            return None
        times = ranks.world_size() * len(self._steps)
        sums = ranks.sum_floats(*self._breakdown.seconds.values())
        return {part: total / times for part, total in zip(PARTS, sums, strict=True)}

    def log(self, done: int, metrics: MetricsLog) -> None:
        """Log their seconds, after the last of them. A collective."""
        if done != self._steps.stop or (seconds := self.seconds(done)) is None:
            return
        metrics.write(done, {f"step_s/{part}": s for part, s in seconds.items()})
        whole = sum(seconds.values())
        shares = (f"{part} {1e3 * s:.1f} ms ({s / whole:.0%})" for part, s in seconds.items())
        log.info("%s  a step of %.1f ms: %s", self._stage.name, 1e3 * whole, ", ".join(shares))
