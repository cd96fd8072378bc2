"""What runs share: the content-addressed store.

Enters: a kind (`tokenizers`, `tokens`, `teachers`, ...), the key of its content (a hash), and the
work that makes it. Leaves: the entry's directory `<root>/<kind>/<key>/`, complete with its
manifest; it appears whole or not at all, and is made once however many runs ask for it. A run's
own folders link into it (`link_entry`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from babyllama_ds.errors import RunError
from babyllama_ds.files import (
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
    FileFacts,
    cannot_write,
    fsync_directory,
    read_manifest,
    remove_temporaries,
    temporary_beside,
    verify_manifest,
    write_json,
    write_manifest,
)
from babyllama_ds.locks import POLL_S, Holder, holder_text, is_held, release, try_lock

STORE_LOST = "bring the store along that the run was made in: `store`, beside the run"
"""How a link that leads nowhere is mended."""

_log = logging.getLogger(__name__)
_BUILDING_PREFIX = ".building-"
_PATH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # no "@": it ends the key in temporary names
_OF_AN_ENTRY = re.compile(r"(?:\.building-|\.tmp-)?([0-9a-f]{64})(?:@.*)?")
"""An entry, or what is unfinished of it."""


class Store:
    """Finished work by its content, shared by all runs under one root."""

    def __init__(self, root: Path, *, while_waiting: Callable[[], None] = lambda: None) -> None:
        """`while_waiting` is called several times a second during a wait for another process;
        what it raises (`StopRequest.check`) ends the wait."""
        self.root = root
        self.while_waiting = while_waiting

    def find(self, kind: str, key: str) -> Path | None:
        """The complete entry, or none. Raises `RunError` when its manifest is garbled."""
        entry = self._path(kind, key)
        manifest = read_manifest(entry)
        return entry if manifest is not None and manifest.fingerprint == key else None

    def find_whole(self, kind: str, key: str) -> Path | None:
        """The complete entry, every byte read and as it was made, or none.

        Raises `RunError` naming the file that is damaged, or a manifest that is garbled.
        """
        if (entry := self.find(kind, key)) is not None:
            verify_manifest(entry)
        return entry

    def holds(self, target: Path) -> bool:
        """Whether the entry that a link of a run once led to (`link_entry`) stands here."""
        return (self.root / target.parent.name / target.name / MANIFEST_NAME).is_file()

    def build(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], None],
        *,
        resumable: bool = False,
    ) -> Path:
        """The entry, made by `make(directory)` unless it stands already; one process makes it.

        One that stands is read once, to be as it was made. Whatever `make` raises goes on and
        leaves nothing behind; if it is `resumable`, it finds what it left in its `building_place`
        the next time. A full disk is a `RunError`.
        """
        if (entry := self.find_whole(kind, key)) is not None:
            return entry
        with self.lock(kind, key):
            if (entry := self.find(kind, key)) is not None:  # made while we waited
                return entry
            place = self.building_place if resumable else self.new_directory
            directory = place(kind, key)
            try:
                make(directory)
                return self.publish(kind, key, directory)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise cannot_write(directory, error) from error
                raise
            finally:
                if not resumable:
                    shutil.rmtree(directory, ignore_errors=True)  # gone already when published

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, *, to_remove: bool = False) -> Iterator[None]:
        """Hold the entry's lock, waiting for another holder (named once in the log).

        For work longer than one function: `find` again inside, work in `new_directory`, then
        `publish`. Entering removes what a dead holder left.

        `to_remove`: another holder is a `RunError`, and nothing is written: the disk may be full.
        """
        lock = FileLock(self._lock_paths(kind, key)[0])
        for _ in self._taken(lock, kind, key, waits=not to_remove):
            pass
        with self._held(lock, kind, key, to_remove=to_remove):
            yield

    def lock_in_steps(
        self, kind: str, key: str
    ) -> Generator[None, None, contextlib.AbstractContextManager[None]]:
        """As `lock`, for work whose steps other ranks wait for: one for each look whether it is
        free. What is returned holds it, to be entered at once."""
        lock = FileLock(self._lock_paths(kind, key)[0])
        yield from self._taken(lock, kind, key)
        return self._held(lock, kind, key)

    def holder(self, kind: str, key: str) -> str | None:
        """The process that holds the entry's lock, for people; none: nobody does."""
        lock_path, holder_path = self._lock_paths(kind, key)
        return holder_text(holder_path) if holder_path.exists() and is_held(lock_path) else None

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
        path = self._path(kind, key).parent / f"{_BUILDING_PREFIX}{key}"
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
                self.discard(key, entry)
            directory.rename(entry)
            fsync_directory(entry.parent)
        except OSError as error:
            raise cannot_write(entry, error) from error
        return entry

    def discard(self, key: str, folder: Path) -> None:
        """Remove a folder of the entry of this key, under its lock. Raises `OSError`.

        It loses its name first: what a death half way leaves is rubbish, and never found.
        """
        doomed = folder.parent / f"{TEMPORARY_PREFIX}{key}@old"
        folder.rename(doomed)
        fsync_directory(folder.parent)
        shutil.rmtree(doomed)

    def folders(self, kind: str, key: str) -> tuple[Path | None, Path | None, list[Path]]:
        """What lies there under a key: the entry's folder, be it whole or damaged; the place where
        it is being built; and what nobody goes on with."""
        entry = self._path(kind, key)
        building = entry.parent / f"{_BUILDING_PREFIX}{key}"
        return (
            entry if entry.is_dir() else None,
            building if building.is_dir() else None,
            sorted(entry.parent.glob(f"{TEMPORARY_PREFIX}{key}@*")),
        )

    def keys(self, kind: str) -> list[str]:
        """The keys of all that lies there of a kind, be it whole or not; nothing else is ours."""
        folder = self.root / kind
        if not folder.is_dir():
            return []
        found = (_OF_AN_ENTRY.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
        return sorted({match[1] for match in found if match})

    def _taken(self, lock: FileLock, kind: str, key: str, *, waits: bool = True) -> Generator[None]:
        """Take the lock; a step for each look at which another process had it."""
        folder, (_, holder_path) = self._path(kind, key).parent, self._lock_paths(kind, key)
        waiting = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not try_lock(lock):
                holder = holder_text(holder_path)
                if not waits:
                    raise in_use(folder / key, holder)
                if not waiting:
                    _log.info("waiting for %s/%s: it is being made by %s", kind, key, holder)
                    waiting = True
                self.while_waiting()
                time.sleep(POLL_S)
                yield
        except OSError as error:
            raise cannot_write(folder, error) from error

    @contextlib.contextmanager
    def _held(
        self, lock: FileLock, kind: str, key: str, *, to_remove: bool = False
    ) -> Iterator[None]:
        """A lock that is taken, until the end."""
        _, holder_path = self._lock_paths(kind, key)
        try:
            if not to_remove:
                write_json(holder_path, asdict(Holder.here()))
            remove_temporaries(holder_path.parent, f"{key}@")
            yield
        finally:
            release(lock, holder_path)

    def _lock_paths(self, kind: str, key: str) -> tuple[Path, Path]:
        """The lock, and what its holder says of itself."""
        folder = self._path(kind, key).parent
        return folder / f".{key}.lock", folder / f".{key}.lock.json"

    def _path(self, kind: str, key: str) -> Path:
        for name in (kind, key):
            assert _PATH_NAME.fullmatch(name), f"not a plain name: {name!r}"
        return self.root / kind / key


def in_use(where: object, holder: str) -> RunError:
    """The error of a removal that a process is in the way of."""
    return RunError.of(
        where,
        got=f"in use by {holder}",
        expected="one that no process holds",
        hint="wait for it, or stop it",
    )


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


def lost_target(link: Path) -> Path | None:
    """Where a link leads, in its own words, if nothing is there; none for anything else."""
    return link.readlink() if link.is_symlink() and not link.exists() else None
