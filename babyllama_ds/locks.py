"""Who may write: locks, and what their holders say of themselves.

Enters: a run's directory. Leaves: it is held by one process (`RunLock`), which whoever comes
second can name. The store's entries are locked with the same parts, and so are folders of a process
of its own (`scratch_folder`).

Locks are the kernel's (flock): they are free the moment their holder dies, however it dies. A file
system without them is refused.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from filelock import FileLock, SoftFileLock, Timeout

from babyllama_ds.errors import RunError, UserError
from babyllama_ds.files import cannot_write, read_json, remove_temporaries, write_json

_log = logging.getLogger(__name__)

POLL_S = 0.2
"""Between two looks whether a lock is free."""
_HELD_NAME = ".held"
"""The lock of a folder for one process alone, in it."""


class RunLock:
    """Holds a run's directory: `with RunLock(run_dir): ...`, on rank 0.

    Entering makes the directory. Raises `RunError` when another live process holds it (named) or
    it cannot be written. A dead holder's lock is taken over. When the holder lives but its
    launcher is gone, the holder is about to notice and stop: entering waits for it, up to
    `orphan_wait_s` seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        orphan_wait_s: float = 60.0,
        launcher_pid: int | None = None,
    ) -> None:
        """`launcher_pid`: the process whose end stops this run; none: the parent."""
        self.run_dir = run_dir
        self.orphan_wait_s = orphan_wait_s
        self.launcher_pid = launcher_pid
        self._holder_path = run_dir / ".lock.json"
        self._lock: FileLock | None = None

    def __enter__(self) -> RunLock:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.run_dir / ".lock")
            self._acquire(lock)
        except OSError as error:
            raise cannot_write(self.run_dir, error) from error
        try:
            write_json(self._holder_path, asdict(Holder.here(self.launcher_pid)))
            self._remove_temporaries()
        except BaseException:
            release(lock, self._holder_path)
            raise
        self._lock = lock
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._lock is not None, "never entered"
        release(self._lock, self._holder_path)
        self._lock = None

    def _remove_temporaries(self) -> None:
        """Of all folders of the run's own, however deep: those of checkpoints and milestones are
        as large as a model. What links lead to is locked by itself."""
        for folder, _, _ in os.walk(self.run_dir):  # follows no link
            remove_temporaries(Path(folder))

    def _acquire(self, lock: FileLock) -> None:
        deadline_s = time.monotonic() + self.orphan_wait_s
        waiting = False
        while not try_lock(lock):
            # Read anew each time: what we saw may be a dead holder's, about to be overwritten.
            holder = _read_holder(self._holder_path)
            if holder is None or not holder.orphaned or time.monotonic() >= deadline_s:
                raise self._in_use(holder)
            if not waiting:
                _log.warning(
                    "%s is in use by %s, whose launcher is gone: waiting up to %g s for it to stop",
                    self.run_dir,
                    holder,
                    self.orphan_wait_s,
                )
                waiting = True
            time.sleep(POLL_S)

    def _in_use(self, holder: Holder | None) -> UserError:
        hint = "wait for it or stop it, or give this run another name"
        if holder is not None and holder.orphaned:
            hint = f"its launcher is gone but it did not stop: end it with `kill {holder.pid}`"
        return RunError.of(
            self.run_dir,
            got=f"in use by {holder or 'another process'}",
            expected="a free run directory",
            hint=hint,
        )


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder in `parent` for this process alone, which is removed at the end.

    Those of the same prefix that killed processes left go first. Raises `RunError` when the disk
    refuses.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, prefix)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            lock = FileLock(folder / _HELD_NAME)
            if try_lock(lock):
                break
            # Another process saw the lock before it was taken, and removes the folder as abandoned.
    except OSError as error:
        raise cannot_write(parent, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        # Whoever uses a folder holds its lock. One without is being made, or empty.
        lock = FileLock(folder / _HELD_NAME)
        if (folder / _HELD_NAME).exists() and try_lock(lock):
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


# -- what locks are made of -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock, as written beside it."""

    host: str
    pid: int
    started: str
    launcher_pid: int

    @classmethod
    def here(cls, launcher_pid: int | None = None) -> Holder:
        """This process; `launcher_pid` as that of `RunLock`."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            launcher_pid=os.getppid() if launcher_pid is None else launcher_pid,
        )

    @property
    def orphaned(self) -> bool:
        """Whether its launcher is known to be gone (another host's processes are unknown)."""
        return self.host == socket.gethostname() and not _alive(self.launcher_pid)

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.started}"


def try_lock(lock: FileLock) -> bool:
    """Take it where it is free; whether it was.

    Raises `OSError` where the file system has no flock. `filelock` makes do there with a file that
    is the lock by being there: one that a killed holder leaves behind is held for ever.
    """
    taken = True
    try:
        lock.acquire(blocking=False)
    except Timeout:
        taken = False
    except NotImplementedError as error:  # older versions of filelock
        raise _no_flock() from error
    if isinstance(lock, SoftFileLock):
        lock.release()
        raise _no_flock()
    return taken


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of this name, which is tried for a moment.

    One that may not be tried counts as held.
    """
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        if not try_lock(lock):
            return True
    except OSError:
        return True
    lock.release()
    return False


def _no_flock() -> OSError:
    return OSError(errno.ENOSYS, "the file system has no locks (flock)")


def release(lock: FileLock, holder_path: Path) -> None:
    """Let go of it, and remove what its holder wrote of itself."""
    # The JSON goes first, while it is surely ours. The lock file stays: removing it would let two
    # processes hold locks on two files of one name.
    with contextlib.suppress(OSError):
        holder_path.unlink(missing_ok=True)
    lock.release()


def _read_holder(path: Path) -> Holder | None:
    """The holder, or none: it is written just after the lock is taken, so it may be missing."""
    try:
        value = read_json(path)
        return Holder(
            host=str(value["host"]),
            pid=int(value["pid"]),
            started=str(value["started"]),
            launcher_pid=int(value["launcher_pid"]),
        )
    except (UserError, KeyError, TypeError, ValueError):
        return None


def holder_text(path: Path) -> str:
    """The holder that wrote `path`, for people."""
    return str(_read_holder(path) or "another process")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # someone else's process
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Dead but not yet collected by its parent (containers often have no one who does)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False  # no /proc on this system, or just gone
    return stat.rpartition(")")[2].split()[0] == "Z"
