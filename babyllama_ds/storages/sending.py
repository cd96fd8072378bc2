"""A finished directory on its way from one rank to others, each file checked on arrival.

Enters: the directory and its manifest, on the rank that has it. Leaves: the same on those that
lack it, whole or not at all. Sender and receivers call their parts at the same time; an error of
the one ends the others' waiting.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from babyllama_ds import files, ranks
from babyllama_ds.errors import RunError

_BLOCK_BYTES = 8 << 20
"""Sent at a time, and so the memory that sending takes."""


def send_directory(directory: Path, manifest: files.Manifest, targets: Sequence[int]) -> None:
    """The sender's part: blocks of each file, an empty one at its end.

    Raises `RunError` when it cannot be read.
    """
    try:
        for name in manifest.files:
            with (directory / name).open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    ranks.send_bytes(block, targets)
            ranks.send_bytes(b"", targets)
    except BaseException as error:  # whatever it is, the receivers must not wait for it
        ranks.send_bytes(None, targets)
        if not isinstance(error, OSError):
            raise
        raise RunError.of(
            error.filename or directory,
            got=error.strerror or str(error),
            expected="a file that the folder's manifest names",
            hint=f"delete the folder {directory} and start again: it is made anew",
        ) from error


def receive_directory(
    directory: Path, manifest: files.Manifest, source: int, *, sender: str
) -> None:
    """A receiver's part: the directory appears when all of its files have come.

    Raises `RunError` when a file is not what the manifest names, or the disk refuses.
    """
    stem = f"{directory.name}@"
    place = directory.parent / f"{files.TEMPORARY_PREFIX}{stem}{os.getpid()}"
    arrival = _Arrival(place, source)
    for name, facts in manifest.files.items():
        arrival.take(name)
        if arrival.broken_off:  # the sender tells why
            shutil.rmtree(place, ignore_errors=True)
            return
        if arrival.error is None and arrival.digest != facts.sha256:
            arrival.error = RunError.of(
                directory / name,
                got=f"SHA-256 {arrival.digest} from {sender}",
                expected=f"{facts.sha256}, which its manifest names",
                hint=f"delete the folder {directory} on {sender} and start again: it is made anew",
            )
    try:
        if arrival.error is not None:
            raise arrival.error
        files.remove_temporaries(directory.parent, f"{stem}old")
        files.write_manifest(
            place, fingerprint=manifest.fingerprint, known=manifest.files, **manifest.facts
        )
        if directory.exists():
            doomed = directory.parent / f"{files.TEMPORARY_PREFIX}{stem}old"
            directory.rename(doomed)
            shutil.rmtree(doomed)
        place.rename(directory)
        files.fsync_directory(directory.parent)
    except OSError as error:
        raise files.cannot_write(directory, error) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)  # gone already when all went well


class _Arrival:
    """Files that come one after another. After an error they are heard to the end, unwritten."""

    def __init__(self, place: Path, source: int) -> None:
        self.place, self.source = place, source
        self.error: Exception | None = None
        self.broken_off = False
        self.digest = ""

    def take(self, name: str) -> None:
        """The next file."""
        digest = hashlib.sha256()
        path = self.place / name
        with ExitStack() as stack:
            stack.enter_context(suppress(OSError))  # of closing what could not be written
            stream: Any = None
            while block := ranks.receive_bytes(self.source):
                digest.update(block)
                if self.error is None:
                    try:
                        stream = stream or stack.enter_context(_opened(path))
                        stream.write(block)
                    except Exception as error:
                        self.error = error
            self.broken_off = block is None
            try:
                if self.error is None and not self.broken_off:
                    stream = stream or stack.enter_context(_opened(path))  # an empty file
                    stream.flush()
                    os.fsync(stream.fileno())
            except Exception as error:
                self.error = error
        self.digest = digest.hexdigest()


def _opened(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")
