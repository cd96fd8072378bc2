"""The jobs and DeepSpeed configurations that come with the package.

In the repository they stand at the top, in `launcher/jobs` and `ds_configs`, where people look;
`babyllama_ds/jobs` and `babyllama_ds/ds_configs` are links to them, so that a checkout, an
editable install and a wheel (which holds copies) are all read the same way.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Literal

from babyllama_ds.errors import JobError
from babyllama_ds.spec.explain import did_you_mean

Room = Literal["ds_configs", "jobs"]
SUFFIX: dict[Room, str] = {"ds_configs": ".json", "jobs": ".yaml"}


def shipped_names(room: Room) -> list[str]:
    """Names of the shipped files, without suffix, sorted."""
    return sorted(path.stem for path in _folder(room).glob(f"*{SUFFIX[room]}"))


def shipped_path(room: Room, name: str) -> Path:
    """The shipped file of that name (`nursery` or `nursery.yaml`). Raises `JobError`."""
    path = _folder(room) / f"{name.removesuffix(SUFFIX[room])}{SUFFIX[room]}"
    if path.parent != _folder(room) or not path.is_file():
        hint = did_you_mean(name.removesuffix(SUFFIX[room]), shipped_names(room))
        kind = "job" if room == "jobs" else "DeepSpeed configuration"
        got = "a directory" if name.strip(".") and Path(name).is_dir() else "no such file"
        raise JobError.of(name, got=got, expected=f"a file's path or a shipped {kind}", hint=hint)
    return path


def find_file(room: Room, text: str) -> Path:
    """The file at the path `text`, or the shipped one of that name. Raises `JobError`."""
    path = Path(text)
    if len(path.parts) < 2:
        with suppress(OSError):  # a name that is too long, say
            if not path.is_file():
                return shipped_path(room, text)
    return path  # reading it says what is wrong, if anything is


def find_job(text: str) -> Path:
    """The job file that a user means: a path, or the bare name of a shipped job."""
    return find_file("jobs", text)


def _folder(room: Room) -> Path:
    return Path(str(files("babyllama_ds"))) / room
