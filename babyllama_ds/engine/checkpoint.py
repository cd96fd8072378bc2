"""Checkpoints: an engine and its progress enter; a folder that any rank count reads leaves.

    <checkpoints>/step-00000123/
        state.safetensors     master weights and moments in fp32, by parameter name
        progress.json         where training stands: step, tokens, seconds, best so far
        best.safetensors      the best weights so far, in the dtype of the model
        metrics.jsonl         what was logged of the steps so far
        manifest.json         SHA-256 of all these

A folder appears whole or not at all; the newest two are kept. No pickle is written or read.
Rank 0 writes it and hands what it reads to the others. Where every node has a storage of its own,
a second node keeps a copy, so that no checkpoint is lost with a node.

A teacher's lie in the store, under the lock of the teacher to come (`pipeline.stages`): another run
may go on with them, or another node. So all that the training has told is in them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from babyllama_ds import files, ranks
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.errors import RunError
from babyllama_ds.rundir import METRICS_NAME
from babyllama_ds.storages import Storages

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept: the newest, and one to go back to if its disk damaged it."""


@dataclass(frozen=True)
class Progress:
    """Where a training stands. `step` updates are done, `tokens` seen in `seconds`."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_dev_ce: float | None = None
    best_step: int | None = None
    last_dev_ce: float | None = None
    lowest_counted_ce: float | None = None
    """What early stopping compares with: the lowest dev cross-entropy that counted."""
    evaluations_waited: int = 0
    """Evaluations since then."""
    evaluation_due: bool = False
    """Whether the evaluation after `step` was cut short by a request to stop: it is yet to come."""
    runs: list[str] = field(default_factory=list)
    """The runs that made these steps, by name, in the order of their first ones."""


COPIES_TO = (1,)
"""The storages, where there are several, that get a copy of what rank 0 writes to the first."""


class CheckpointFolder:
    """The checkpoints of one stage."""

    def __init__(
        self, directory: Path, *, fingerprint: str, storages: Storages | None = None
    ) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.storages = storages or Storages()

    # -- writing (collective) ---------------------------------------------------------------------

    def save(
        self,
        engine: TrainingEngine,
        progress: Progress,
        best: BestWeights,
        logged: Callable[[], str] = lambda: "",
    ) -> None:
        """Write a checkpoint after `progress.step`; every rank calls this at the same step.

        `logged` is asked on rank 0 for the lines of metrics up to here.
        """
        state: dict[str, Tensor] = {}
        for key, tensor in engine.named_state():
            if ranks.rank() == 0:
                state[key] = tensor.contiguous()
        ranks.on_rank_zero(lambda: self._write(state, progress, best, logged))
        self._copy(self._path(progress.step))
        self.storages.on_each(self._prune)

    def _copy(self, checkpoint: Path) -> None:
        if self.storages.several:
            there = self.storages.on_each(checkpoint.exists)
            lacking = [storage for storage in COPIES_TO if not there[storage]]
            self.storages.copy(checkpoint, source=0, to=lacking)

    def _write(
        self,
        state: dict[str, Tensor],
        progress: Progress,
        best: BestWeights,
        logged: Callable[[], str],
    ) -> None:
        final = self._path(progress.step)
        if final.exists():
            return
        temporary = self.directory / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            save_file(state, temporary / "state.safetensors")
            best.write(temporary / "best.safetensors")
            files.write_json(temporary / "progress.json", asdict(progress))
            (temporary / METRICS_NAME).write_text(logged(), encoding="utf-8")
            files.write_manifest(temporary, fingerprint=self.fingerprint)
            temporary.rename(final)
            files.fsync_directory(self.directory)
        except (OSError, SafetensorError) as error:  # the latter: what safetensors makes of it
            raise RunError.of(
                self.directory,
                got=f"{getattr(error, 'strerror', None) or error} while writing a checkpoint",
                expected=f"room for {_num_bytes(state) / 2**20:.0f} MiB",
                hint="free some space and start again: training goes on from the last checkpoint",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well

    def _prune(self) -> None:
        for old in self._whole()[:-KEPT]:
            shutil.rmtree(old)

    # -- reading (collective) ---------------------------------------------------------------------

    def resume(self, engine: TrainingEngine, best: BestWeights) -> Progress:
        """Load the newest checkpoint, if there is one, and say where training goes on.

        Raises:
            RunError: a damaged checkpoint, named, or one of another training.
        """
        self._fetch()
        newest = ranks.on_rank_zero(self._newest)
        if newest is None:
            return Progress()
        progress = ranks.on_rank_zero(lambda: Progress(**files.read_json(newest / "progress.json")))
        engine.load_named_state(_reader(newest / "state.safetensors"), step=progress.step)
        ranks.on_rank_zero(lambda: best.read(newest / "best.safetensors"))
        log.info("going on from %s", newest)
        return progress

    def _fetch(self) -> None:
        """Bring the newest checkpoint of any storage to rank 0's, which may be a new node's."""
        if not self.storages.several:
            return
        steps = self.storages.on_each(lambda: [path.name for path in self._whole()])
        newest = max((names[-1] for names in steps if names), default=None)
        if newest is None or newest in steps[0]:
            return
        source = next(storage for storage, names in enumerate(steps) if newest in names)
        self.storages.copy(self.directory / newest, source=source, to=[0])

    def logged(self) -> str | None:
        """What was logged up to the newest checkpoint, "" without one; none: it does not tell, as
        it is of an earlier version.

        On rank 0, after `resume`, which has checked it.
        """
        whole = self._whole()
        if not whole:
            return ""
        path = whole[-1] / METRICS_NAME
        return path.read_text(encoding="utf-8") if path.exists() else None

    def newest_name(self) -> str:
        """The last good checkpoint's path, for messages."""
        whole = self._whole()
        return str(whole[-1]) if whole else "none yet"

    def _newest(self) -> Path | None:
        whole = self._whole()
        if not whole:
            return None
        manifest = files.verify_manifest(whole[-1])
        if manifest.fingerprint != self.fingerprint:
            raise RunError.of(
                whole[-1],
                got="a checkpoint of another training",
                expected=f"fingerprint {self.fingerprint[:12]}, got {manifest.fingerprint[:12]}",
                hint="give the job another name, or remove the run directory",
            )
        return whole[-1]

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _whole(self) -> list[Path]:
        return sorted(self.directory.glob("step-*")) if self.directory.is_dir() else []

    def remove(self) -> None:
        """Remove all checkpoints of the stage: it is done."""
        shutil.rmtree(self.directory, ignore_errors=True)


class BestWeights:
    """The weights of lowest development cross-entropy so far, in host memory on rank 0.

    They are small beside an optimizer's state (2 bytes a parameter against 12), and a copy in
    memory costs no file at every improvement.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def take(self, module: nn.Module) -> None:
        """Remember the module's weights as they are now."""
        if ranks.rank() == 0:
            self._weights = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in module.named_parameters()
            }

    @torch.no_grad()
    def put(self, module: nn.Module) -> None:
        """Write the remembered weights into rank 0's module."""
        for name, parameter in module.named_parameters():
            if name in self._weights:
                parameter.copy_(self._weights[name])

    def write(self, path: Path) -> None:
        """Save to a safetensors file, if there is anything."""
        if self._weights:
            save_file(self._weights, path)

    def read(self, path: Path) -> None:
        """Load what `write` saved, if it did."""
        if path.exists():
            with safe_open(path, framework="pt") as tensors:
                self._weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _reader(path: Path) -> Callable[[str, torch.Size], Tensor]:
    """Rank 0 reads a tensor and hands it to the others, so that only its disk is needed."""
    source: Any = safe_open(path, framework="pt") if ranks.rank() == 0 else None

    def read(key: str, shape: torch.Size) -> Tensor:
        tensor: Tensor = source.get_tensor(key) if source else torch.empty(shape)
        return ranks.broadcast_tensor(tensor)

    return read


def _num_bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())
