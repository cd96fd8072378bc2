"""Files that are whole or absent: atomic writes, JSON, hashes, manifests.

Enters: bytes, values, directories. Leaves: files that appear complete under their name or not at
all, and a `manifest.json` per directory that says what was made (its fingerprint) and proves that
it is undamaged (SHA-256 and size of every file). `store` builds its entries with it, and the
pipeline its stages.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from babyllama_ds.errors import DataError, RunError, UserError

MANIFEST_NAME = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
"""What every unfinished file or folder is called; a leftover is rubbish of a dead process."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What a manifest says of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a directory holds. `files` is keyed by posix path relative to the directory."""

    fingerprint: str
    files: dict[str, FileFacts]
    facts: dict[str, Any]


# -- writing and reading ------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that `path` holds all of it or what it held before.

    The folder is made when it is missing. Raises `RunError` when the disk refuses.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # only there when something above failed


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. Raises `ValueError` on NaN or infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `RunError` when it is missing, unreadable or garbled."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError.of(path, got="no such file", expected="a JSON file") from error
    except OSError as error:
        raise RunError.of(path, got=_reason(error), expected="a readable JSON file") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise RunError.of(
            path,
            got=f"text that is not JSON ({error})",
            expected="a JSON file",
            hint="delete it and start again: it was damaged after it was written",
        ) from error


def read_json_if_there(path: Path) -> Any:
    """As `read_json`; none without the file, which another process may remove at any time."""
    try:
        return read_json(path)
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def check_name(path: Path) -> None:
    """A user's file whose name will stand in our JSON has one that can. Raises `DataError`."""
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise DataError.of(
            os.fsencode(path).decode(errors="backslashreplace"),
            got="a file name that is not UTF-8",
            expected="one that is: it is called by it in what is written of it",
            hint="rename it",
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest, _ = _hash_file(path)
    return digest


def hash_json(value: object) -> str:
    """SHA-256, in hex, of the canonical JSON of `value`: keys sorted, no blanks, ASCII.

    Tuples count as lists. Raises `ValueError` on NaN or infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


# -- manifests ----------------------------------------------------------------------------------


def write_manifest(
    directory: Path,
    *,
    fingerprint: str,
    known: Mapping[str, FileFacts] = {},
    **facts: object,
) -> None:
    """Write `directory/manifest.json` over every other file below `directory`; the last write.

    All files are synced to the disk first, so that a manifest vouches for data that survives a
    power cut; those in `known` were, and are not read again. `facts` are kept beside the
    fingerprint. Raises `RunError` when the disk refuses.
    """
    assert "files" not in facts, "`files` is the manifest's own key"
    try:
        files = {}
        for name, path in _files_below(directory):
            if name in known:
                files[name] = asdict(known[name])
                continue
            digest, size = _hash_file(path, sync=True)
            files[name] = {"sha256": digest, "bytes": size}
        for folder, _, _ in os.walk(directory):
            fsync_directory(Path(folder))
    except OSError as error:
        raise cannot_write(directory / MANIFEST_NAME, error) from error
    value = {"fingerprint": fingerprint, "files": files, **facts}
    write_json(directory / MANIFEST_NAME, value)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of `directory`, or none if it has none. `RunError` when it is garbled."""
    path = directory / MANIFEST_NAME
    try:
        if not path.is_file():
            return None
    except OSError as error:
        raise RunError.of(path, got=_reason(error), expected="a readable manifest") from error
    return _parse_manifest(path, read_json(path))


def manifest_of(directory: Path) -> Manifest:
    """The manifest of a finished directory, which has one. `RunError` when it is garbled."""
    manifest = read_manifest(directory)
    assert manifest is not None, f"{directory} is not finished"
    return manifest


def verify_manifest(directory: Path, *, hint: str | None = None) -> Manifest:
    """Hash every file again and return the manifest; files that it does not name are allowed.

    Raises `RunError` naming the first file (in sorted order) that is missing or damaged, with the
    `hint`; without one, that what is deleted is made anew.
    """
    hint = hint or _made_anew(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        path = directory / MANIFEST_NAME
        raise RunError.of(path, got="no such file", expected="one", hint=hint)
    for name, facts in sorted(manifest.files.items()):
        _verify_file(directory / name, facts, hint)
    return manifest


# -- for those who write in steps of their own ---------------------------------------------------


def temporary_beside(path: Path) -> Path:
    """An unused name in `path`'s folder, recognisable as temporary; nothing is created."""
    return path.parent / f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


def remove_temporaries(directory: Path, stem: str = "") -> None:
    """Remove what dead processes left directly in `directory` under temporary names.

    Only for a caller that holds the lock under which such names (starting with `stem`) are made.
    """
    for path in directory.glob(f"{TEMPORARY_PREFIX}{stem}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`, to be filled with a file or folder; at the end it is it.

    Whatever goes wrong leaves `target` as it was, and nothing of the work.

    Raises:
        RunError: `target` exists (an empty folder does not count), or the disk refuses.
    """
    temporary = temporary_beside(target)
    try:
        check_new(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.rename(target)
        fsync_directory(target.parent)
    except OSError as error:
        raise RunError.of(
            target,
            got=f"{error.strerror or error} while writing it",
            expected="a place with room for it",
            hint="free some space, or choose another place; nothing was left here",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # of a place that cannot even be looked at
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def check_new(target: Path) -> None:
    """Nothing is at `target` yet, or an empty folder; and it is in a folder. Raises `RunError`."""
    around = next((parent for parent in target.parents if parent.exists()), None)
    if around is not None and not around.is_dir():
        raise RunError.of(target, got=f"a place below {around}, a file", expected="one in a folder")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RunError.of(
            target,
            got="something that exists",
            expected="a new name",
            hint="choose another, or remove it: nothing is written over",
        )


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut (a no-op where that is unsupported)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> UserError:
    """The `RunError` for a write to `path` that the system refused.

    Some commands write elsewhere than below `--runs`, and have no such option.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or choose another directory (for runs: --runs); then start again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        hint = "choose another directory (for runs: --runs)"
    elif error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
        hint = (
            "mount it with flock (Lustre: -o flock), or choose another directory (for runs: --runs)"
        )
    else:
        hint = "look at the disk, or choose another directory (for runs: --runs)"
    return RunError.of(path, got=_reason(error), expected="a place that can be written", hint=hint)


# -- helpers -------------------------------------------------------------------------------------


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"{name} ({error.strerror or error})"


def _hash_file(path: Path, *, sync: bool = False) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(stream.fileno())
    return digest.hexdigest(), size


def _files_below(directory: Path) -> Iterator[tuple[str, Path]]:
    """Every regular file but the directory's own manifest, by posix name, sorted."""
    paths = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            paths[path.relative_to(directory).as_posix()] = path
    paths.pop(MANIFEST_NAME, None)
    yield from ((name, path) for name, path in sorted(paths.items()) if path.is_file())


def _parse_manifest(path: Path, value: Any) -> Manifest:
    try:
        facts = dict(value)
        fingerprint, files = facts.pop("fingerprint"), facts.pop("files")
        if not isinstance(fingerprint, str):
            raise TypeError("fingerprint")
        parsed = {
            str(name): FileFacts(sha256=str(entry["sha256"]), bytes=int(entry["bytes"]))
            for name, entry in files.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got, hint = "JSON of another shape", _made_anew(path.parent)
        raise RunError.of(path, got=got, expected="a manifest", hint=hint) from error
    return Manifest(fingerprint=fingerprint, files=parsed, facts=facts)


def _made_anew(directory: Path) -> str:
    return f"delete the folder {directory} and start again: it is made anew"


def _verify_file(path: Path, facts: FileFacts, hint: str) -> None:
    def damaged(*, got: str, expected: str) -> UserError:
        return RunError.of(path, got=got, expected=expected, hint=hint)

    try:
        size = path.stat().st_size
        if size != facts.bytes:  # cheap, and the usual damage
            raise damaged(got=f"{size} bytes", expected=f"{facts.bytes} bytes")
        digest = sha256_file(path)
    except FileNotFoundError as error:
        raise damaged(got="no such file", expected=f"{facts.bytes} bytes") from error
    except OSError as error:
        raise damaged(got=_reason(error), expected=f"{facts.bytes} readable bytes") from error
    if digest != facts.sha256:
        raise damaged(got=f"SHA-256 {digest}", expected=facts.sha256)
