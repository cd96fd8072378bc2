"""A run from start to end: a job enters, its run directory leaves, the stages done in it.

Around the stages: the processes' start and end, requests to stop, the lock, and `state.json`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.shared_memory import check_shared_memory
from babyllama_ds.errors import Stopped, UserError, told_by_each_node
from babyllama_ds.locks import RunLock
from babyllama_ds.pipeline.pinning import pin_to_commits
from babyllama_ds.pipeline.stages import Pipeline
from babyllama_ds.rundir import RunDirectory, flat_job
from babyllama_ds.spec.deepspeed_file import read_config
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.stopping import StopRequest, started_by_launcher
from babyllama_ds.storages import Storages, find_storages
from babyllama_ds.store import Store

log = logging.getLogger(__name__)


def run_job(job: JobSpec, *, runs: Path) -> Path:
    """Run every stage of `job` that is not done yet; called by every rank.

    Returns the run directory, `<runs>/<job name>/`.

    Raises:
        UserError: anything a user can mend; the same error on every rank.
        Stopped: the run was asked to stop and can be started again.
    """
    stop = StopRequest(watch_parent=started_by_launcher())
    stop.install()
    directory = RunDirectory(runs / job.run_name)
    try:
        with told_by_each_node():
            kind = distributed.resolve_device(job.deepspeed.device)
            machinery = read_config(job.deepspeed, kind)
            # NCCL's communicator is made when the ranks meet; it would end them without a word of
            # what is missing.
            check_shared_memory(kind, ranks.local_world_size())
        device = distributed.start(
            kind,
            same={f"the job's {key}": value for key, value in flat_job(job).items()}
            | {f"{key} of deepspeed.config": value for key, value in machinery.items()},
            join_timeout_s=60 * job.deepspeed.join_timeout_minutes,
            node_timeout_s=60 * job.deepspeed.node_timeout_minutes,
            while_waiting=stop.check,
        )
        storages = find_storages(job.deepspeed.storage, runs)
        lock = RunLock(directory.path, launcher_pid=stop.launcher_pid)
        with distributed.failures_told(), storages.held(lock):
            storages.on_each(lambda: directory.open(job))
            directory.bring_together(storages)
            store = Store(runs / "store", while_waiting=stop.check)
            trained = [spec.name for spec in job.teachers if spec.training is not None]
            directory.check_store(trained, store, storages)
            with _state_kept(directory, storages):
                pinned = pin_to_commits(job, directory, storages)
                Pipeline(pinned, directory, store, storages, device, stop).run()
    finally:
        stop.uninstall()
        distributed.stop()
    return directory.path


@contextmanager
def _state_kept(directory: RunDirectory, storages: Storages) -> Iterator[None]:
    """`state.json` tells how the run stands and how it ended, on every storage."""
    lead = storages.led_here
    storages.on_each(lambda: directory.set_state("running", pid=os.getpid(), since=time.time()))
    if lead:
        distributed.when_a_node_is_lost(
            lambda text, facts: directory.set_state("failed", error=text, **facts)
        )
    try:
        yield
    except BaseException as error:
        if lead or not ranks.raised_by_all(error):
            _tell_the_end(directory, error)
        raise
    storages.on_each(lambda: directory.set_state("done"))


def _tell_the_end(directory: RunDirectory, error: BaseException) -> None:
    """The state of a run that ends with `error`, which a full disk must not take the place of.

    The first failure stays: what others see of it, a connection that breaks off or the launcher's
    SIGTERM, says less.
    """
    try:
        if directory.status() == "failed":
            return
        if isinstance(error, Stopped):
            directory.set_state("stopped", reason=error.reason, at=error.at)
            return
        directory.set_state("failed", **_failure(error))
    except UserError as refused:
        log.warning("%s", refused)


def _failure(error: BaseException) -> dict[str, Any]:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if ranks.another_ended(error):
        return {"error": f"another rank ended: it was killed, or ran out of memory ({text})"}
    return {"error": text} | ({} if ranks.raised_by_all(error) else {"rank": ranks.rank()})
