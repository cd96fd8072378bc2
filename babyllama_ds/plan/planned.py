"""What a plan is asked and what it answers, for `text` and `remedies` to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from babyllama_ds.plan.corpus import PlannedCorpus
from babyllama_ds.plan.disk import DiskItem
from babyllama_ds.plan.machines import Machine
from babyllama_ds.plan.measured import MeasuredTime
from babyllama_ds.plan.memory import RankMemory
from babyllama_ds.plan.rates import Rate
from babyllama_ds.plan.stages import PlannedStages
from babyllama_ds.spec.deepspeed import Precision
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.teachers.cache.tiers import Tier
from babyllama_ds.training.pace import JobPace


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned for."""

    ranks: Sequence[int] = (1, 2, 4, 8)
    gpu: str | None = None
    """A card's name, `here` for this machine, or none in particular."""
    rate: Rate | None = None
    """What one rank was measured to do; none: the card's peak times an assumed share."""
    pace: JobPace | None = None
    """What was measured of the whole job on one rank of this machine; none: `rate`, or the card's
    peak."""
    tokens: int | None = None
    """Tokens of the training text; none: counted or estimated."""
    runs: Path = Path("runs")


@dataclass(frozen=True, kw_only=True)
class RankCount:
    """The whole job on so many ranks."""

    ranks: int
    impossible: str | None
    """Why the job cannot be cut for so many ranks; none: it can."""
    memory: dict[str, RankMemory]
    """By stage."""
    micro_batches: dict[str, int]
    """Windows in one forward pass of one rank, by stage; where the job says `auto`, the most that
    fit by this plan, one where nothing does, the rank's whole share where no machine was named."""
    estimated: Sequence[str]
    """Stages whose activations are no more than an estimate (`activations.is_estimated`)."""
    cached: Mapping[Tier, int]
    """Bytes of the teacher cache that one rank reads from each tier; empty: no cache."""
    seconds: dict[str, float] | None
    """By stage; none: no speed is known."""

    @property
    def hungriest(self) -> str:
        """The stage with the highest peak."""
        return max(self.memory, key=lambda stage: self.memory[stage].peak_bytes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will cost."""

    job: JobSpec
    question: Question
    machine: Machine
    precision: Precision
    corpus: PlannedCorpus
    work: PlannedStages
    counts: Sequence[RankCount]
    disk: Sequence[DiskItem]
    measured: MeasuredTime | None
    """Time by what was measured; none: it was not."""
    assumptions: Sequence[str]

    def usable_bytes(self, ranks: int) -> int | None:
        """What a rank may use; none: no machine was named."""
        return self.machine.usable_bytes(ranks)

    def too_large(self, count: RankCount) -> list[str]:
        """The stages that do not fit on so many ranks."""
        usable = self.usable_bytes(count.ranks)
        if usable is None:
            return []
        return [name for name, memory in count.memory.items() if memory.peak_bytes > usable]

    def fits(self, count: RankCount) -> bool:
        """Whether every stage can run on so many ranks, as far as is known."""
        return count.impossible is None and not self.too_large(count)
