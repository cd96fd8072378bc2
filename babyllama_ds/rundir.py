"""A run's directory: the job enters; its text, its state and its stages' fingerprints stay.

One directory belongs to one experiment. What does not change a result may change between starts
(ranks, micro-batch, device, logging, evaluation); anything else is refused, never mixed. A job that
failed before it trained anything holds nothing to be mixed with: its corrected form may follow it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from babyllama_ds import files
from babyllama_ds.errors import Problem, RunError
from babyllama_ds.spec.document import show
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.resolved import dump_job, read_values
from babyllama_ds.storages import Storages
from babyllama_ds.store import STORE_LOST, Store, lost_target

log = logging.getLogger(__name__)

# Keys that change no model: how it runs, where inputs lie (their content is compared by each
# stage's fingerprint instead), and what is measured afterwards.
FREE_KEYS = re.compile(
    r"evaluation(\..*)?"
    r"|deepspeed\.(device|config|compile|storage|join_timeout_minutes|node_timeout_minutes)"
    r"|distillation\.(chunk_tokens|cache_tier|cache_kept)"
    r"|.*\.(micro_batch|gradient_checkpointing|log_every_steps|profile_steps)"
    r"|.*\.(checkpoint_every_steps|model\.attention|tensor_parallel)"
    r"|corpus\.(sources\[\d+\]\.corpus\.)?(train|split\.dev|path|column)(\[\d+\])?"
    r"|(tokenizer|.*\.model)\.(path|revision)"
)

JOB_NAME = "job.yaml"
"""The resolved job."""
STATE_NAME = "state.json"
METRICS_NAME = "metrics.jsonl"
"""An object for each logged step; written by rank 0."""
BOARDS_NAME = "tensorboard"
"""TensorBoard's files, a folder for each stage; written by rank 0."""
MILESTONES_NAME = "milestones"
"""Models kept on the way of a training."""

WORK = (METRICS_NAME, "checkpoints", "teachers", "student", "control", "evaluation")
"""What a run holds from its first training on; a tokenizer and tokens are links into the store."""


class RunDirectory:
    """`<runs>/<job name>/`, on the lead of a storage."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, job: JobSpec) -> None:
        """Claim the directory for `job` and write `job.yaml`.

        Raises:
            RunError: it holds work of another experiment; the differing keys are named.
        """
        resolved = self.path / JOB_NAME
        if resolved.exists():
            problems = [
                Problem(
                    where=f"{self.path}: {key}",
                    got=f"{show(theirs)} in the run that is there",
                    expected=f"{show(ours)}, as this job says",
                    hint="give the job another `name`, or remove the directory",
                )
                for key, theirs, ours in differing_keys(
                    with_defaults(self.written_job()), _plain(job)
                )
            ]
            if problems and any((self.path / name).exists() for name in WORK):
                raise RunError.all_of(problems)
            if problems:
                log.info("%s: takes the place of a job that came to no training", self.path)
                for name in ("stages.json", "settled.json"):
                    (self.path / name).unlink(missing_ok=True)
        files.write_atomic(resolved, dump_job(job))

    def claim_stage(self, stage: str, fingerprint: str, *, made_from: str) -> None:
        """Remember what a stage is made from, or refuse another.

        Raises:
            RunError: the directory holds this stage made from something else.
        """
        stages = self.claimed()
        known = stages.setdefault(stage, fingerprint)
        if known != fingerprint:
            raise RunError.of(
                f"{self.path}: {stage}",
                got=f"fingerprint {known[:12]} in the run that is there",
                expected=f"{fingerprint[:12]}: {made_from} changed since",
                hint="give the job another `name`, or remove the directory",
            )
        files.write_json(self._stages_path, stages)

    def claimed(self) -> dict[str, str]:
        """What the stages that were begun are made from, by stage (`claim_stage`)."""
        claimed: dict[str, str] = {}
        if self._stages_path.exists():
            claimed = files.read_json(self._stages_path)
        return claimed

    @property
    def _stages_path(self) -> Path:
        return self.path / "stages.json"

    def check_store(self, trained: Iterable[str], store: Store, storages: Storages) -> None:
        """The store that the run was made in is here: without it, these teachers, which took
        hours, would be trained again. A collective.

        One link that leads nowhere is no such case: its entry was damaged, and deleted.

        Raises:
            RunError: none of the run's links leads anywhere; each lost teacher is named.
        """
        names = [f"teachers/{name}" for name in trained]
        of_each = storages.on_each(lambda: self._links(["tokenizer", "tokens", *names], store))
        known = {name: lost for one in reversed(of_each) for name, lost in one.items()}
        stands = any(lost is None for one in of_each for lost in one.values())
        if not stands and (teachers := [name for name in names if name in known]):
            raise RunError.all_of(
                [
                    Problem(
                        where=str(self.path / name),
                        got=f"a link to {known[name]}, which is not there",
                        expected=f"the teacher that this run trained, in {store.root}",
                        hint=f"{STORE_LOST}; or give the job another `name`, and all is trained "
                        "again",
                    )
                    for name in teachers
                ]
            )

    def _links(self, names: Iterable[str], store: Store) -> dict[str, str | None]:
        """Which of these links there are; where those lead whose entry is not there."""
        links = {name: self.path / name for name in names if (self.path / name).is_symlink()}
        lost = {name: lost_target(link) for name, link in links.items()}
        return {
            # The run may have been moved and its store not: it is linked to again.
            name: None if target is None or store.holds(target) else str(target)
            for name, target in lost.items()
        }

    def settled(self) -> dict[str, dict[str, Any]]:
        """What earlier starts found out, by stage and where it ran (`settle`)."""
        path = self.path / "settled.json"
        return files.read_json(path) if path.exists() else {}

    def settle(self, where: str, found: Mapping[str, Any]) -> None:
        """Keep what a job left to be found out (`auto`), so that later starts do the same."""
        self._write_settled(self.settled() | {where: dict(found)})

    def _write_settled(self, settled: Mapping[str, Mapping[str, Any]]) -> None:
        files.write_json(self.path / "settled.json", settled)

    def bring_together(self, storages: Storages) -> None:
        """What nodes know of earlier starts, on all of them: one may be new. A collective.

        Of what was settled, and of where models were made, the first node's word counts; of
        metrics the longest file says most, and checkpoints what is logged since.
        """
        if not storages.several:
            return
        settled: dict[str, dict[str, Any]] = {}
        for known in reversed(storages.on_each(self.settled)):
            settled |= known
        storages.on_each(lambda: self._write_settled(settled) if settled else None)
        environment, metrics = self.path / "environment.json", self.path / METRICS_NAME
        made = [size > 0 for size in storages.on_each(lambda: _num_bytes(environment))]
        if any(made) and not all(made):
            lacking = [storage for storage, there in enumerate(made) if not there]
            storages.copy_file(environment, source=made.index(True), to=lacking)
        sizes = storages.on_each(lambda: _num_bytes(metrics))
        if max(sizes) > sizes[0]:
            self.send_metrics(storages, source=sizes.index(max(sizes)), to=[0])

    def send_metrics(self, storages: Storages, *, source: int, to: Sequence[int]) -> None:
        """Send what one storage has logged to others, in place of theirs. A collective.

        TensorBoard's files there tell of the steps that were logged there: they go, and are written
        anew from the metrics where somebody is to look at them.
        """
        if not storages.several:
            return

        def forget_boards() -> None:
            if storages.mine != source and storages.mine in to:
                shutil.rmtree(self.path / BOARDS_NAME, ignore_errors=True)

        storages.on_each(forget_boards)
        storages.copy_file(self.path / METRICS_NAME, source=source, to=to)

    def set_state(self, status: str, **facts: object) -> None:
        """Write `state.json`: running, done, stopped or failed, for schedulers and people."""
        files.write_json(self.path / STATE_NAME, {"status": status, **facts})

    def status(self) -> str | None:
        """What `state.json` says; none where there is none yet."""
        path = self.path / STATE_NAME
        return str(files.read_json(path).get("status")) if path.is_file() else None

    def written_job(self) -> dict[str, Any]:
        """`job.yaml` as it stands. Raises `RunError` where it is no job."""
        return _read_yaml(self.path / JOB_NAME)


def differing_keys(
    theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Key paths whose values differ and matter, with both values."""
    left, right = _experiment(theirs), _experiment(ours)
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key) and not FREE_KEYS.fullmatch(key):
            yield key, left.get(key), right.get(key)


def with_defaults(written: dict[str, Any]) -> dict[str, Any]:
    """A job with the defaults of options that came after it was written down."""
    try:
        return _plain(JobSpec.model_validate_json(json.dumps(written, default=str)))
    except ValidationError:  # of options that are no more: named among the differing keys
        return written


def flat_job(job: JobSpec) -> dict[str, Any]:
    """Every value of a job, by key path."""
    return dict(_flat(_plain(job)))


def _num_bytes(path: Path) -> int:
    """The size of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _experiment(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job's keys; of the caches only `topk` gives other targets than the live teachers."""
    flat = dict(_flat(job))
    if flat.get("distillation.cache") != "topk":
        flat["distillation.cache"] = "none or hidden"
        flat.pop("distillation.cache_top_k", None)
    return flat


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{index}]")
    else:
        yield path, value


def _plain(job: JobSpec) -> dict[str, Any]:
    plain: dict[str, Any] = job.model_dump(mode="json")
    return plain


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = read_values(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _not_a_job(path, got=str(error).splitlines()[0]) from error
    if not isinstance(loaded, dict):
        raise _not_a_job(path, got="a file that holds no job")
    return loaded


def _not_a_job(path: Path, *, got: str) -> RunError:
    return RunError.of(path, got=got, expected="the job of the run that is there")
