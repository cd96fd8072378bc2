"""The storages of a job's runs folder, tried out: are they what the job promises?

Enters: what `deepspeed.storage` says, and the folder. Leaves: `Storages`, or an error that names
the node. A storage that is shared is seen by every node and can be written from it, and one of a
node's own is no other node's: files that nobody can guess are written and looked for.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from babyllama_ds import files, ranks
from babyllama_ds.errors import RunError
from babyllama_ds.storages.leads import Storages, storages_of_nodes

log = logging.getLogger(__name__)

SEEN_WITHIN_S = 10.0
"""How long a file may take to appear on another node: a network file system remembers folders."""
_POLL_S = 0.1


def find_storages(kind: Literal["shared", "node"], runs: Path) -> Storages:
    """The storages of a job's `runs` folder, checked to be what `deepspeed.storage` says.

    On one node nothing is checked. A collective.

    Raises:
        MachineError: the launcher's environment does not tell which ranks share a node.
        RunError: a folder that is not shared where it should be, or shared where it should not,
            or that a node cannot write.
    """
    nodes = storages_of_nodes()
    if not nodes.several:
        return Storages()
    if kind == "shared":
        _check_shared(nodes, runs)
        return Storages()
    _check_apart(nodes, runs)
    log.info("runs are kept on each of %d nodes", len(nodes.leads))
    return nodes


def _check_shared(nodes: Storages, runs: Path) -> None:
    """Every node sees what rank 0 writes, and rank 0 what every node writes."""
    with _test_files(nodes, runs) as paths:
        asked = nodes.on_each(lambda: _written(paths[0]) if nodes.mine == 0 else "")[0]

        def answer() -> str:
            if nodes.mine == 0:
                return asked
            _expect(paths[0], asked, writer=nodes.name(0))
            return _written(paths[nodes.mine])

        answers = nodes.on_each(answer)

        def hear() -> None:
            if nodes.mine == 0:
                for storage, content in enumerate(answers):
                    _expect(paths[storage], content, writer=nodes.name(storage))

        nodes.on_each(hear)


def _check_apart(nodes: Storages, runs: Path) -> None:
    """No node sees what another writes: else two would work in one folder, as if it were two."""
    with _test_files(nodes, runs) as paths:
        nodes.on_each(lambda: _written(paths[nodes.mine]))

        def look() -> None:
            for other, path in enumerate(paths):
                if other != nodes.mine and path.exists():
                    raise RunError.of(
                        runs,
                        got=f"the folder of {nodes.name(other)}",
                        expected="one of this node's own, for deepspeed.storage=node",
                        hint="set deepspeed.storage=shared, or choose a --runs directory on each "
                        "node's own disk",
                    )

        nodes.on_each(look)


@contextmanager
def _test_files(nodes: Storages, runs: Path) -> Iterator[list[Path]]:
    """A file's path for each node to write, gone afterwards.

    The names are new, so that no file system remembers that there was no such file.
    """
    name = ranks.broadcast_object(f"{files.TEMPORARY_PREFIX}storage-{secrets.token_hex(8)}")
    paths = [runs / f"{name}-{storage}" for storage in range(len(nodes.leads))]
    try:
        yield paths
    finally:
        if nodes.led_here:
            with suppress(OSError):
                paths[nodes.mine].unlink()


def _written(path: Path) -> str:
    """Something that nobody can guess, written to `path`."""
    content = secrets.token_hex(16)
    files.write_atomic(path, content)
    return content


def _expect(path: Path, content: str, *, writer: str) -> None:
    """Wait until `path` holds `content`. Raises `RunError` when it does not in time."""
    deadline_s = time.monotonic() + SEEN_WITHIN_S
    while (found := _read(path)) != content:
        if time.monotonic() >= deadline_s:
            raise RunError.of(
                path,
                got="no such file" if found is None else "another content",
                expected=f"what {writer} has just written there: --runs is one folder that all "
                "nodes share",
                hint="mount it there, or keep runs on each node with deepspeed.storage=node",
            )
        time.sleep(_POLL_S)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
