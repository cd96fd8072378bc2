"""What lies in a store: the store enters, items leave, with what can be told of them cheaply.

An item is an entry, or the unfinished work beside it: both may lie there under one key.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache.layout import Layout

KINDS = (
    "text",
    "tokenizers",
    "tokens",
    "teachers",
    "teacher_cache",
    "evaluations",
    "classifiers",
)
"""What a store holds, in the order in which runs make it. Another folder in it is not ours."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """An entry, or what is unfinished of it."""

    kind: str
    key: str
    folders: tuple[Path, ...]
    state: Literal["whole", "damaged", "unfinished"]
    """Damaged: without a manifest of its own. It is never found, and made anew."""
    wanted: bool
    """Whether a run that comes for this key would find it: nobody goes on with what is unfinished
    beside an entry, nor with what a dead process left under a name of its own."""
    stage: str
    """What its manifest says that it is; "" where it does not."""
    reached: str
    """How far unfinished work is, where that is cheap to know."""
    holder: str | None
    """The process that holds its lock."""
    bytes: int
    touched: float
    """When a file of it was last written, in seconds since 1970."""

    @property
    def name(self) -> str:
        """How it is called here."""
        return f"{self.kind} {self.key[:SHORT]}"


SHORT = 12
"""Characters of a key that are shown: more than enough to tell keys apart."""


def open_store(runs: Path) -> Store:
    """The store of a runs folder. Raises `RunError` where there is none."""
    root = runs / "store"
    if not root.is_dir():
        raise RunError.of(
            root,
            got="no such folder",
            expected="the store of a runs folder, which its first run makes",
            hint="name the folder with --runs",
        )
    return Store(root)


def find_items(store: Store) -> list[Item]:
    """All that lies in `store`, by kind, the largest first."""
    items = [
        item for kind in KINDS for key in store.keys(kind) for item in _items(store, kind, key)
    ]
    return sorted(items, key=lambda item: (KINDS.index(item.kind), -item.bytes, item.key))


def _items(store: Store, kind: str, key: str) -> Iterator[Item]:
    entry, building, left = store.folders(kind, key)
    holder = store.holder(kind, key)
    if entry is not None:
        whole, stage = _manifest(store, kind, key)
        yield _item(kind, key, [entry], "whole" if whole else "damaged", True, stage, "", holder)
    if building is not None or left:
        folders = [*([building] if building else []), *left]
        wanted = building is not None and entry is None
        reached = _reached(kind, building) if building else ""
        yield _item(kind, key, folders, "unfinished", wanted, "", reached, holder)


def _item(
    kind: str,
    key: str,
    folders: Sequence[Path],
    state: Literal["whole", "damaged", "unfinished"],
    wanted: bool,
    stage: str,
    reached: str,
    holder: str | None,
) -> Item:
    num_bytes, touched = _measured(folders)
    return Item(
        kind=kind,
        key=key,
        folders=tuple(folders),
        state=state,
        wanted=wanted,
        stage=stage,
        reached=reached,
        holder=holder,
        bytes=num_bytes,
        touched=touched,
    )


def _manifest(store: Store, kind: str, key: str) -> tuple[bool, str]:
    """Whether the entry is complete, as far as its manifest says, and what that calls it."""
    try:
        entry = store.find(kind, key)
        manifest = None if entry is None else files.read_manifest(entry)
    except RunError:  # it is garbled
        manifest = None
    return manifest is not None, str(manifest.facts.get("stage", "")) if manifest else ""


def _reached(kind: str, building: Path) -> str:
    if kind == "teachers":
        steps = sorted(path.name.partition("-")[2] for path in building.glob("step-*"))
        return f"step {int(steps[-1])}" if steps else ""
    shards = len(list(building.glob("*.bin")))
    if kind == "teacher_cache":
        with contextlib.suppress(RunError):  # a layout that is garbled
            layout = Layout.read(building)
            return f"{shards} of {layout.num_shards} shards" if layout else ""
    return f"{shards} shards" if shards else ""


def _measured(folders: Sequence[Path]) -> tuple[int, float]:
    """Bytes of all files, and when the last one was written. Some may vanish meanwhile."""
    num_bytes, touched = 0, 0.0
    for top in folders:
        for folder, _, names in os.walk(top):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    num_bytes += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
                    touched = max(touched, status.st_mtime)
    return num_bytes, touched
