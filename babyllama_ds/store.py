"""What runs share, and who may write: the content-addressed store and the locks.

Enters: a kind (`tokenizers`, `tokens`, `teachers`, ...), the key of its content (a hash), and the
work that makes it. Leaves: the entry's directory `<root>/<kind>/<key>/`, complete with its
manifest; it appears whole or not at all, and is made once however many runs ask for it. A run's
own folders link into it (`link_entry`); a run's directory is held by one process (`RunLock`).

Locks are the kernel's (flock): they are free the moment their holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from babyllama_ds.errors import RunError, UserError
from babyllama_ds.files import (
    TEMPORARY_PREFIX,
    FileFacts,
    cannot_write,
    fsync_directory,
    read_json,
    read_manifest,
    remove_temporaries,
    temporary_beside,
    write_json,
    write_manifest,
)

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_PATH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # no "@": it ends the key in temporary names


def _nothing() -> None:
    return None


class Store:
    """Finished work by its content, shared by all runs under one root."""

    def __init__(self, root: Path, *, while_waiting: Callable[[], None] = _nothing) -> None:
        """`while_waiting` is called several times a second during a wait for another process;
        what it raises (`StopRequest.check`) ends the wait."""
        self.root = root
        self.while_waiting = while_waiting

    def find(self, kind: str, key: str) -> Path | None:
        """The complete entry, or none. Raises `RunError` when its manifest is garbled."""
        entry = self._path(kind, key)
        manifest = read_manifest(entry)
        return entry if manifest is not None and manifest.fingerprint == key else None

    def build(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], None],
        facts: Mapping[str, object] = {},
        *,
        resumable: bool = False,
    ) -> Path:
        """The entry, made by `make(directory)` unless it stands already; one process makes it.

        Whatever `make` raises goes on and leaves nothing behind; if it is `resumable`, it finds
        what it left in its `building_place` the next time. A full disk is a `RunError`.
        """
        if (entry := self.find(kind, key)) is not None:
            return entry
        with self.lock(kind, key):
            if (entry := self.find(kind, key)) is not None:  # made while we waited
                return entry
            place = self.building_place if resumable else self.new_directory
            directory = place(kind, key)
            try:
                make(directory)
                return self.publish(kind, key, directory, facts)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise cannot_write(directory, error) from error
                raise
            finally:
                if not resumable:
                    shutil.rmtree(directory, ignore_errors=True)  # gone already when published

    @contextlib.contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Hold the entry's lock, waiting for another holder (named once in the log).

        For work longer than one function: `find` again inside, work in `new_directory`, then
        `publish`. Entering removes what a dead holder left.
        """
        entry = self._path(kind, key)
        holder_path = entry.parent / f".{key}.lock.json"
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(entry.parent / f".{key}.lock")
            self._acquire(lock, holder_path, f"{kind}/{key}")
        except OSError as error:
            raise cannot_write(entry.parent, error) from error
        try:
            write_json(holder_path, asdict(_Holder.here()))
            remove_temporaries(entry.parent, f"{key}@")
            yield
        finally:
            _release(lock, holder_path)

    def new_directory(self, kind: str, key: str) -> Path:
        """An empty directory beside the entry, for the holder of its lock to fill."""
        path = self._path(kind, key).parent / f"{TEMPORARY_PREFIX}{key}@{os.getpid()}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path

    def building_place(self, kind: str, key: str) -> Path:
        """A directory beside the entry that survives its holder, for work of many parts.

        Whoever holds the lock next finds there what was done, tells the whole parts from the
        others itself, goes on and publishes.
        """
        path = self._path(kind, key).parent / f".building-{key}"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        remove_temporaries(path)
        return path

    def publish(
        self,
        kind: str,
        key: str,
        directory: Path,
        facts: Mapping[str, object] = {},
        known: Mapping[str, FileFacts] = {},
    ) -> Path:
        """Turn a finished `directory` (same file system) into the entry, under its lock.

        Writes the manifest (files in `known` are not read again), then renames. What stood there
        without being a complete entry is removed. Raises `RunError` when the disk refuses.
        """
        entry = self._path(kind, key)
        write_manifest(directory, fingerprint=key, known=known, **facts)
        try:
            if entry.exists():
                doomed = entry.parent / f"{TEMPORARY_PREFIX}{key}@old"
                entry.rename(doomed)
                shutil.rmtree(doomed)
            directory.rename(entry)
            fsync_directory(entry.parent)
        except OSError as error:
            raise cannot_write(entry, error) from error
        return entry

    def _acquire(self, lock: FileLock, holder_path: Path, what: str) -> None:
        waiting = False
        while not _try_lock(lock):
            if not waiting:
                _log.info("waiting for %s: it is being made by %s", what, _holder_text(holder_path))
                waiting = True
            self.while_waiting()
            time.sleep(_POLL_S)

    def _path(self, kind: str, key: str) -> Path:
        for name in (kind, key):
            assert _PATH_NAME.fullmatch(name), f"not a plain name: {name!r}"
        return self.root / kind / key


def link_entry(entry: Path, link: Path) -> None:
    """Make `link` a relative symbolic link to `entry`, replacing an older link atomically.

    Raises `RunError` when something that is not a link stands there, or the disk refuses.
    """
    if link.exists() and not link.is_symlink():
        raise RunError.of(
            link,
            got="a file or folder of its own",
            expected=f"a link to {entry}",
            hint="move it away and start again",
        )
    temporary = temporary_beside(link)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        # Relative, so that the runs directory can be moved; resolved, because a link's target is
        # read from where the link really lies.
        target = os.path.relpath(entry.resolve(), link.parent.resolve())
        temporary.symlink_to(target, target_is_directory=True)
        temporary.replace(link)
        fsync_directory(link.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(link, error) from error


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
            write_json(self._holder_path, asdict(_Holder.here(self.launcher_pid)))
            remove_temporaries(self.run_dir)
        except BaseException:
            _release(lock, self._holder_path)
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
        _release(self._lock, self._holder_path)
        self._lock = None

    def _acquire(self, lock: FileLock) -> None:
        deadline_s = time.monotonic() + self.orphan_wait_s
        waiting = False
        while not _try_lock(lock):
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
            time.sleep(_POLL_S)

    def _in_use(self, holder: _Holder | None) -> UserError:
        hint = "wait for it or stop it, or give this run another name"
        if holder is not None and holder.orphaned:
            hint = f"its launcher is gone but it did not stop: end it with `kill {holder.pid}`"
        return RunError.of(
            self.run_dir,
            got=f"in use by {holder or 'another process'}",
            expected="a free run directory",
            hint=hint,
        )


# -- helpers -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """The process that holds a lock, as written beside it."""

    host: str
    pid: int
    started: str
    launcher_pid: int

    @classmethod
    def here(cls, launcher_pid: int | None = None) -> _Holder:
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


def _try_lock(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _release(lock: FileLock, holder_path: Path) -> None:
    # The JSON goes first, while it is surely ours. The lock file stays: removing it would let two
    # processes hold locks on two files of one name.
    with contextlib.suppress(OSError):
        holder_path.unlink(missing_ok=True)
    lock.release()


def _read_holder(path: Path) -> _Holder | None:
    """The holder, or none: it is written just after the lock is taken, so it may be missing."""
    try:
        value = read_json(path)
        return _Holder(
            host=str(value["host"]),
            pid=int(value["pid"]),
            started=str(value["started"]),
            launcher_pid=int(value["launcher_pid"]),
        )
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _holder_text(path: Path) -> str:
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
