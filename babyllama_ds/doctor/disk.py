"""The directory of runs: is there room, is it fast, do locks hold there?"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from babyllama_ds.doctor.findings import Finding, failure, ok, warning
from babyllama_ds.locks import try_lock

PROBE_BYTES = 64 * 2**20
LEAST_FREE_BYTES = 2**30
LOW_FREE_BYTES = 10 * 2**30
SLOW_MB_PER_S = 50.0

_PREFIX = ".doctor-"
_ABANDONED_AFTER_S = 3600.0
"""No examination of a disk takes so long. A lock would tell sooner, where there are locks."""

_ELSEWHERE = "choose another directory: --runs DIR"


def disk(runs: Path, *, quick: bool = False) -> list[Finding]:
    """Free space, write speed and locks of the directory of runs, which need not be there yet.

    `quick`: without the speed, which takes time from those who are writing there.
    """
    try:
        with _folder_in(runs) as folder:
            speed = [] if quick else [_speed(folder)]
            return [_free(runs, folder), *speed, _locks(folder)]
    except OSError as error:
        found = f"{runs}: {error.strerror or error}"
        return [failure("disk", found, remedy=_ELSEWHERE)]


def _free(runs: Path, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:,.1f} GiB free in {runs.resolve()}"
    remedy = f"free some space, or {_ELSEWHERE}"
    if free < LEAST_FREE_BYTES:
        return failure("disk", found, remedy=remedy)
    return warning("disk", found, remedy=remedy) if free < LOW_FREE_BYTES else ok("disk", found)


def _speed(folder: Path) -> Finding:
    seconds = _write_seconds(folder / "probe")
    size = PROBE_BYTES // 2**20
    speed = PROBE_BYTES / 1e6 / seconds
    found = f"{size} MiB written and synced at {speed:,.0f} MB/s"
    if speed < SLOW_MB_PER_S:
        return warning(
            "write speed",
            found,
            remedy="checkpoints will be slow: choose a local disk (--runs DIR), or a larger "
            "checkpoint_every_steps",
        )
    return ok("write speed", found)


def _write_seconds(path: Path) -> float:
    """Random bytes, which no file system can compress away; made before the clock starts."""
    content = os.urandom(PROBE_BYTES)
    start_s = time.perf_counter()
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return time.perf_counter() - start_s


def _locks(folder: Path) -> Finding:
    """A held lock must keep a second holder out, and be free again afterwards."""
    path = folder / "lock"
    try:
        held = FileLock(path)
        if try_lock(held) and _can_lock(path):
            return _no_locks("a lock that is held was given a second time")
        held.release()
        if not _can_lock(path):
            return _no_locks("a lock that was let go could not be taken again")
    except OSError as error:
        return _no_locks(f"the file system refuses locks ({error})")
    return ok("locks", "a held lock keeps others out")


def _can_lock(path: Path) -> bool:
    lock = FileLock(path)
    try:
        return try_lock(lock)
    finally:
        lock.release()


def _no_locks(found: str) -> Finding:
    return failure(
        "locks",
        found,
        remedy="two runs could write to one directory: choose a file system with flock "
        "(--runs DIR), or mount this one with it",
    )


@contextmanager
def _folder_in(runs: Path) -> Iterator[Path]:
    """A folder of our own in `runs`; afterwards everything is as it was, but for what examinations
    that were killed had left."""
    made = [each for each in (runs, *runs.parents) if not each.exists()]
    try:
        runs.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(runs)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=runs) as folder:
            yield Path(folder)
    finally:
        for each in made:
            # Another process may have written there meanwhile, or removed it.
            with suppress(OSError):
                each.rmdir()


def _remove_abandoned(runs: Path) -> None:
    for folder in runs.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # gone meanwhile
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
