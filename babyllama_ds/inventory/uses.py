"""Which runs use what: a runs folder enters; the users of every item leave.

    tokenizers, tokens, teachers    a run that links to it, or has claimed it in `stages.json`
    evaluations                     a run that has the same measurement
    text, teacher_cache, classifiers, and whatever a run prepares before it claims anything
                                    a run that is not done *may* use it: which of them it comes for
                                    is known only when it does, so it counts as a user of all

A run that is done has no use for the last: it has its models and its measurements.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.evaluation.stored import CLASSIFIERS, KIND, store_key
from babyllama_ds.inventory.entries import Item
from babyllama_ds.locks import is_held
from babyllama_ds.rundir import JOB_NAME, RunDirectory
from babyllama_ds.spec.base import NAME_PATTERN

OF_STAGE = {"tokenizer": "tokenizers", "tokens": "tokens"}
"""The kinds of what a run links to; its teachers are called by their names."""
PREPARED = ("text", "tokenizers", "tokens")

Place = tuple[str, str]
"""Kind and key."""


@dataclass(frozen=True)
class Uses:
    """Who uses what of a store."""

    users: Mapping[Place, Mapping[str, str]]
    """What is known: runs, and what it is there (`teachers/gpt2`)."""
    possible: Mapping[str, list[str]]
    """Those that may come for anything of a kind."""

    def known(self, item: Item) -> list[str]:
        """The runs that use it."""
        return list(self.users.get((item.kind, item.key), {})) if item.wanted else []

    def perhaps(self, item: Item) -> list[str]:
        """The runs that may use it."""
        possible = self.possible.get(item.kind, []) if item.wanted else []
        return [run for run in possible if run not in self.known(item)]

    def unused(self, item: Item) -> bool:
        """Whether no run uses it, none may, and no process is at it."""
        return not (self.known(item) or self.perhaps(item) or item.holder)

    def called(self, item: Item) -> str:
        """What it is: as its manifest says, else as the runs call it that use it."""
        names = self.users.get((item.kind, item.key), {}).values()
        return item.stage or ", ".join(dict.fromkeys(names))


def read_uses(runs: Path) -> Uses:
    """The users of `runs/store`. Raises `RunError` where a run's files cannot be read."""
    root = (runs / "store").resolve()
    # The store's own folder is another one where `runs/store` is a link to it.
    folders = sorted({runs.resolve(), root.parent})
    users: dict[Place, dict[str, str]] = defaultdict(dict)
    possible: dict[str, list[str]] = defaultdict(list)
    for run in _runs(folders):
        name = run.path.name if run.path.parent == runs.resolve() else str(run.path)
        with _told_of_another_shape(run):
            job = run.written_job()
            for place, stage in (*_claimed(run), *_linked(run, root), *_measured(run, job)):
                users[place].setdefault(name, stage)
            for kind in _possible(run, job):
                possible[kind].append(name)
    if any(is_held(held) for folder in folders for held in folder.glob(".trial-*/.held")):
        for kind in PREPARED:
            possible[kind].append("plan --measure")
    return Uses(users, possible)


def _runs(folders: Sequence[Path]) -> Iterator[RunDirectory]:
    """The runs of these folders."""
    for folder in folders:
        try:
            named = (one for one in folder.iterdir() if re.fullmatch(NAME_PATTERN, one.name))
            found = sorted(one for one in named if (one / JOB_NAME).is_file())
        except OSError as error:
            raise RunError.of(
                error.filename or folder,
                got=error.strerror or str(error),
                expected="runs that can be read: what they use must be known",
                hint="do this as a user who can read them",
            ) from error
        yield from map(RunDirectory, found)


@contextmanager
def _told_of_another_shape(run: RunDirectory) -> Iterator[None]:
    """JSON or YAML that is whole and still not what a run writes."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError.of(
            run.path,
            got=f"a job.yaml, stages.json or state.json of another shape ({error!r})",
            expected="a run that can be read: what it uses must be known",
            hint="mend the file, or move the folder away",
        ) from error


def _claimed(run: RunDirectory) -> Iterator[tuple[Place, str]]:
    for stage, key in run.claimed().items():
        kind = OF_STAGE.get(stage) or ("teachers" if stage.startswith("teachers/") else None)
        place = run.path / stage
        bundled = place.is_dir() and not place.is_symlink()
        if kind is not None and not bundled:
            yield (kind, key), stage


def _linked(run: RunDirectory, root: Path) -> Iterator[tuple[Place, str]]:
    for link in (*map(run.path.joinpath, OF_STAGE), *run.path.glob("teachers/*")):
        target = link.resolve()
        if link.is_symlink() and target.parent.parent == root:
            yield (target.parent.name, target.name), str(link.relative_to(run.path))


def _measured(run: RunDirectory, job: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    split = {spec["name"]: spec.get("tensor_parallel", 1) for spec in job.get("teachers", [])}
    folder = run.path / "evaluation"
    for path in sorted(folder.rglob("*.json")):
        name = str(path.relative_to(folder).with_suffix(""))
        found = files.read_json(path)
        if isinstance(found, dict) and {"fingerprint", "device", "attention"} <= found.keys():
            key = store_key(
                found["fingerprint"],
                device=found["device"],
                attention=found["attention"],
                tensor_parallel=split.get(name, 1),
            )
            yield (KIND, key), name


def _possible(run: RunDirectory, job: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of which a run may come for anything."""
    status = run.status()
    if status in (None, "done"):  # none: it has not begun
        return
    if "tokens" not in run.claimed():  # it prepares them, or failed to
        yield from PREPARED
    elif _value(job, "corpus", "kind") == "nursery":
        yield "text"
    cached = _value(job, "distillation", "cache") not in (None, "none")
    if cached and not (run.path / "student" / files.MANIFEST_NAME).exists():
        yield "teacher_cache"
    if _value(job, "evaluation", "fine_tuning"):
        yield CLASSIFIERS


def _value(job: Mapping[str, Any], section: str, key: str) -> Any:
    return job.get(section, {}).get(key)
