"""Milestones: words to be seen enter; the steps at which they are, and the models of then, leave.

    <run>/milestones/<stage>/chck_1M/     a Hugging Face directory with a manifest, as the finished
                                          model's

Names and the `babylm` schedule are those of BabyLM's evaluation pipelines since 2025, which load
such models as branches of a hub's repository.

Words are the training text's, by whitespace, each as often as it was seen: a token seen counts as
the words that a token of the text has on average. The model is that of the first step which has
shown as many. A training that ends a little short of a milestone (ten epochs of 9.95 million words)
has it at its last step.
"""

from __future__ import annotations

import logging
import shutil
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from babyllama_ds import files, ranks
from babyllama_ds.engine.checkpoint import COPIES_TO, Progress
from babyllama_ds.errors import JobError
from babyllama_ds.rundir import MILESTONES_NAME
from babyllama_ds.spec.training import Milestones, TrainingSpec
from babyllama_ds.storages import Storages
from babyllama_ds.training.batches import tokens_after, total_steps

log = logging.getLogger(__name__)

BABYLM = (
    *range(1_000_000, 10_000_000, 1_000_000),
    *range(10_000_000, 100_000_000, 10_000_000),
    *range(100_000_000, 1_000_000_001, 100_000_000),
)
"""Words after which the challenge asks for a model."""

SHORT = 0.05
"""The share of a milestone's words that the training's last step may lack."""

Write = Callable[[nn.Module, Path, Mapping[str, Any]], None]
"""A model and its summary to a directory that is to hold them."""


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """The size of the training text, which every epoch shows once."""

    words: int
    tokens: int

    def words_in(self, tokens: int) -> int:
        """The words that so many of its tokens come to on average."""
        return tokens * self.words // self.tokens


@dataclass(frozen=True, kw_only=True)
class Milestone:
    """A model to be kept."""

    words: int
    """Words that it stands for."""
    seen: int
    """Words seen by then."""
    step: int
    """Optimizer steps by then."""

    @property
    def name(self) -> str:
        """As the challenge's pipelines call it: `chck_1M`."""
        for unit, size in (("M", 1_000_000), ("K", 1_000)):
            if self.words % size == 0:
                return f"chck_{self.words // size}{unit}"
        return f"chck_{self.words}"


def milestones_of(
    asked: Milestones,
    training: TrainingSpec,
    *,
    text: TextSize,
    num_windows: int,
    length: int,
    where: str,
) -> list[Milestone]:
    """At which steps of a training, on epochs of `num_windows` windows, they are reached.

    Raises:
        JobError: one of a list is beyond the training's end, or all of the challenge's are.
    """

    def seen(step: int) -> int:
        return text.words_in(tokens_after(step, training, num_windows, length))

    steps = range(1, total_steps(training, num_windows, length) + 1)
    last = seen(steps[-1])
    within = milestones_within(asked, last)
    _check_within(asked, len(within), last, where)
    return [
        Milestone(words=words, seen=seen(step), step=step)
        for words in within
        for step in [steps[min(bisect_left(steps, words, key=seen), len(steps) - 1)]]
    ]


def milestones_within(asked: Milestones, words: int) -> list[int]:
    """The milestones of a training that shows so many words."""
    all_of_them = BABYLM if asked == "babylm" else asked
    return [one for one in all_of_them if one * (1 - SHORT) <= words]


def _check_within(asked: Milestones, within: int, last: int, where: str) -> None:
    if asked == "babylm" and not within:
        raise JobError.of(
            where,
            got="babylm",
            expected=f"a training that shows {BABYLM[0]:,} words: this one shows {last:,}",
            hint="give a list of words instead, up to that number",
        )
    if asked != "babylm" and within < len(asked):
        raise JobError.of(
            f"{where}[{within}]",
            got=f"{asked[within]:,} words",
            expected=f"at most {last:,}, all that this training shows",
            hint="leave it out, or train for more epochs",
        )


class MilestoneFolder:
    """The milestones of one training, and where they are kept."""

    def __init__(
        self,
        directory: Path,
        milestones: Sequence[Milestone],
        write: Write,
        storages: Storages | None = None,
    ) -> None:
        self.directory = directory
        self.milestones = milestones
        self._write = write
        self._storages = storages or Storages()

    def go_on_from(self, step: int) -> None:
        """Keep what was reached by `step`, and nothing beyond: training goes there once more, on
        other ranks perhaps with other roundings. A collective."""
        names = {one.name for one in self.reached(step)}
        of_each = self._storages.on_each(lambda: self._forget_all_but(names))
        for name in sorted(set().union(*of_each)):
            self._copy(self.directory / name)

    def _forget_all_but(self, names: set[str]) -> set[str]:
        """Remove all but `names`, half-written ones too; which of these are here."""
        if not self.directory.is_dir():
            return set()
        files.remove_temporaries(self.directory)
        found = {path.name for path in self.directory.iterdir() if path.is_dir()}
        for name in found - names:
            shutil.rmtree(self.directory / name)
        return found & names

    def reached(self, step: int) -> list[Milestone]:
        """The milestones reached by so many steps."""
        return [one for one in self.milestones if one.step <= step]

    def due(self, step: int) -> bool:
        """Whether one is reached by this step and by none before."""
        return any(one.step == step for one in self.milestones)

    def keep(self, model: nn.Module, progress: Progress) -> None:
        """Write the model as it is after `progress.step`. A collective."""
        for milestone in self.milestones:
            if milestone.step == progress.step:
                ranks.on_rank_zero(partial(self._keep, milestone, model, progress))
                self._copy(self.directory / milestone.name)
                stage = self.directory.name
                log.info("%s: kept %s, %d words", stage, milestone.name, milestone.seen)

    def _keep(self, milestone: Milestone, model: nn.Module, progress: Progress) -> None:
        summary = {
            "milestone": milestone.name,
            "words": milestone.seen,
            "steps": progress.step,
            "train_tokens": progress.tokens,
            "seconds": progress.seconds,
        }
        with files.appearing(self.directory / milestone.name) as directory:
            directory.mkdir(parents=True)
            self._write(model, directory, summary)

    def _copy(self, directory: Path) -> None:
        """Copy to rank 0 and where checkpoints are copied to: no milestone is lost with a node."""
        if self._storages.several:
            there = self._storages.on_each(directory.exists)
            lacking = [storage for storage in (0, *COPIES_TO) if not there[storage]]
            self._storages.copy(directory, source=there.index(True), to=lacking)


def kept_milestones(run_dir: Path, stage: str) -> dict[str, Path]:
    """Those of a finished training that are still there, by name, in its order."""
    summary = run_dir / stage / "training.json"
    names = files.read_json(summary).get("milestones", {}) if summary.exists() else {}
    places = {name: run_dir / MILESTONES_NAME / stage / name for name in names}
    return {name: path for name, path in places.items() if files.read_manifest(path) is not None}


def share_milestones(directory: Path, storages: Storages) -> None:
    """What is kept below `directory` on any storage, on all of them. A collective."""
    if not storages.several:
        return

    def found() -> list[Path]:
        files.remove_temporaries(directory)  # one that had all but its name when a node died
        return [manifest.parent for manifest in directory.glob(f"*/{files.MANIFEST_NAME}")]

    def find(path: Path) -> Path | None:
        return path if path.is_dir() else None

    for path in sorted(set().union(*storages.on_each(found))):
        storages.everywhere(partial(find, path))
