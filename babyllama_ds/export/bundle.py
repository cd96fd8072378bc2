"""A whole run enters, with what it links to; one directory or `.tar` leaves that needs no store.

Everything of the run goes in but its lock and what is unfinished; links into the store become
copies. Every file is hashed on its way, and held to the manifest of the part that it belongs to.
`SHA256SUMS` lists them all, as `sha256sum --check SHA256SUMS` reads it.

The same run gives the same `.tar`, byte for byte: names sorted, one time, one owner, one mode.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.export.finished import FinishedRun, check_outside

SUMS_NAME = "SHA256SUMS"
LEFT_OUT = (".lock", ".lock.json", "checkpoints", SUMS_NAME)
"""At the top of a run: what belongs to a process, or to an older bundle."""

AND_ANEW = " and start the run again: it is made anew"

MTIME = 315_532_800
"""1980-01-01: older times make some programs complain."""

Write = Callable[[str, BinaryIO, int], None]
"""Takes a file's name, its content and its bytes."""


def bundle_run(run: FinishedRun, target: Path) -> dict[str, str]:
    """Copy `run` to `target`, a directory, or a file if its name ends in `.tar`.

    Returns:
        The SHA-256 of each file, by name.

    Raises:
        RunError: a part is missing or damaged, `target` exists, or the disk refuses.
    """
    check_kind(target)
    check_outside(run.path, target)
    run.check(run.parts)
    members = dict(sorted(_members(run)))
    with files.appearing(target) as place:
        if target.suffix == ".tar":
            with place.open("xb") as stream:
                root = run.path.resolve().name
                with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    sums = _copy(run, members, lambda *file: _into_tar(tar, root, *file))
                stream.flush()
                os.fsync(stream.fileno())
        else:
            place.mkdir(parents=True)
            sums = _copy(run, members, lambda *file: _into_directory(place, *file))
    return sums


def check_kind(target: Path) -> None:
    """A directory or a `.tar`: nothing packs a bundle. Raises `RunError`."""
    if target.suffix in (".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip"):
        raise RunError.of(
            "--bundle",
            got=str(target),
            expected="a directory, or a file that ends in .tar",
            hint="weights and tokens hardly compress",
        )


# -- what goes in ---------------------------------------------------------------------------------


def _members(run: FinishedRun) -> Iterator[tuple[str, Path]]:
    """Name and path of every file, those behind the run's links included."""
    for path in run.path.iterdir():
        if path.name not in LEFT_OUT:
            yield from _files(run, path, path.name)


def _files(run: FinishedRun, path: Path, name: str) -> Iterator[tuple[str, Path]]:
    if path.name.startswith(files.TEMPORARY_PREFIX):
        return
    if path.is_symlink() and name not in run.parts:
        raise RunError.of(
            path,
            got=f"a link to {path.readlink()}",
            expected=f"files, or the run's own links: {', '.join(run.parts)}",
            hint="remove it, or put what it leads to in its place",
        )
    if path.is_dir():
        for child in path.iterdir():
            yield from _files(run, child, f"{name}/{child.name}")
    elif path.is_file():
        yield name, path
    else:
        raise RunError.of(path, got="neither a file nor a folder", expected="one of them")


# -- copying --------------------------------------------------------------------------------------


def _copy(run: FinishedRun, members: Mapping[str, Path], write: Write) -> dict[str, str]:
    """Write every member, then the sums. Returns the sums."""
    sums = {}
    for name, path in members.items():
        with path.open("rb") as stream:
            hashed = _Hashed(stream)
            write(name, cast(BinaryIO, hashed), os.fstat(stream.fileno()).st_size)
            sums[name] = hashed.digest.hexdigest()
    _check_parts(run, sums)
    content = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    write(SUMS_NAME, io.BytesIO(content), len(content))
    return sums


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self.digest.update(block)
        return block


def _check_parts(run: FinishedRun, sums: Mapping[str, str]) -> None:
    """What was copied is what the manifests of the run's parts vouch for."""
    for part in (*run.parts, *run.kept):
        for name, facts in files.manifest_of(run.path / part).files.items():
            got = sums.get(f"{part}/{name}")
            if got != facts.sha256:
                raise RunError.of(
                    run.path / part / name,
                    got=f"SHA-256 {got}" if got else "no such file",
                    expected=facts.sha256,
                    hint=f"delete the folder {(run.path / part).resolve()}"
                    + (", which the run can do without" if part in run.kept else AND_ANEW),
                )


def _into_directory(place: Path, name: str, content: BinaryIO, size: int) -> None:
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        shutil.copyfileobj(content, stream, 1 << 20)
        stream.flush()
        os.fsync(stream.fileno())
    if path.stat().st_size != size:
        raise OSError(f"{name} changed while it was copied")


def _into_tar(tar: tarfile.TarFile, root: str, name: str, content: BinaryIO, size: int) -> None:
    entry = tarfile.TarInfo(f"{root}/{name}")
    entry.size, entry.mtime, entry.mode = size, MTIME, 0o644
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    tar.addfile(entry, content)
