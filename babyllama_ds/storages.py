"""Where runs lie on several nodes: on one storage that all of them see, or on one of each node.

Enters: how the job says that its runs are stored. Leaves: `Storages`, which knows the storages
there are, the rank that works on each (its lead) and how to send finished work from one to the
others. With one storage, which is every run on one node, work on each is work on rank 0 and
nothing is sent.

What a job promises is checked before anything else (`find_storages`): a storage that is shared is
seen by every node and can be written from it, and one of a node's own is no other node's.

Every function that communicates is collective: all ranks call it, in the same order. Paths are
those of every node: `--runs` is the same words everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

from babyllama_ds import files, ranks
from babyllama_ds.errors import MachineError, RunError, UserError
from babyllama_ds.files import FileFacts

T = TypeVar("T")

log = logging.getLogger(__name__)

SEEN_WITHIN_S = 10.0
"""How long a file may take to appear on another node: a network file system remembers folders."""
_POLL_S = 0.1
_BLOCK_BYTES = 8 << 20
"""Sent at a time, and so the memory that sending takes."""
_NODE_NUMBERS = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")
"""How DeepSpeed's launcher, torchrun and Slurm number a rank's node."""


@dataclass(frozen=True, kw_only=True)
class Storages:
    """The storages that hold a run, in the order of their leads; the first one's is rank 0."""

    leads: tuple[int, ...] = (0,)
    """The rank that works on each."""
    hosts: tuple[str, ...] = ("",)
    """The leads' hosts."""
    mine: int = 0
    """The one that this rank reads and writes."""
    readers: tuple[int, ...] | None = None
    """The ranks of this rank's storage, in order; none: all."""

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.leads) > 1

    @property
    def led_here(self) -> bool:
        """Whether this rank is its storage's lead."""
        return ranks.rank() == self.leads[self.mine]

    def share_of(self, count: int) -> range:
        """This rank's part of `count` things that all ranks of its storage look at together."""
        if self.readers is None:
            return range(ranks.rank(), count, ranks.world_size())
        return range(self.readers.index(ranks.rank()), count, len(self.readers))

    def name(self, storage: int) -> str:
        """A storage, for people."""
        return f"node {storage}, host {self.hosts[storage]}"

    # -- work on each (collective) ----------------------------------------------------------------

    def on_each(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on the lead of every storage, at the same time; all results, on every rank.

        An error anywhere is raised everywhere, as by `ranks.on_every_rank`; of several storages a
        `UserError` names the node.
        """
        if not self.several:
            return [ranks.on_rank_zero(work)]

        def told() -> bytes:  # pickled where failing to is told like the rest
            return pickle.dumps(work()) if self.led_here else b""

        of_ranks = ranks.gather_objects(self.together(told))
        return [pickle.loads(of_ranks[lead]) for lead in self.leads]

    def together(self, work: Callable[[], T]) -> T:
        """`ranks.on_every_rank`; of several storages a `UserError` names the node."""
        if not self.several:
            return ranks.on_every_rank(work)

        def named() -> T:
            try:
                return work()
            except UserError as error:
                where = self.name(self.mine)
                problems = [
                    replace(problem, where=f"{where}: {problem.where}")
                    for problem in error.problems
                ]
                raise type(error)(*problems) from error

        return ranks.on_every_rank(named)

    @contextmanager
    def held(self, manager: AbstractContextManager[Any]) -> Iterator[None]:
        """A context that every storage's lead holds for the ranks of its storage.

        Entered host by host, in the order of their names: two jobs on the same nodes then never
        wait for each other, each with half of the locks.
        """
        if not self.several:
            with ranks.held_by_rank_zero(manager):
                yield
            return
        with ExitStack() as stack:
            for _, lead in sorted(zip(self.hosts, self.leads, strict=True)):

                def enter(lead: int = lead) -> None:
                    if ranks.rank() == lead:
                        stack.enter_context(manager)

                self.together(enter)
            yield

    # -- sending (collective) ---------------------------------------------------------------------

    def everywhere(self, find: Callable[[], Path | None]) -> Path | None:
        """The finished directory that `find` knows on any storage; none: on no one.

        Where it is lacking it is sent from the first that has it, whole or not at all.

        Raises:
            RunError: two storages hold it with other content, or it is damaged where it is.
        """
        if not self.several:
            return ranks.on_rank_zero(find)

        def look() -> tuple[Path, dict[str, FileFacts]] | None:
            found = find()
            return None if found is None else (found, _facts_of(found))

        of_each = self.on_each(look)
        holders = [(storage, found) for storage, found in enumerate(of_each) if found is not None]
        if not holders:
            return None
        source, (directory, _) = holders[0]
        self.check_same(directory, [None if found is None else found[1] for found in of_each])
        lacking = [storage for storage, found in enumerate(of_each) if found is None]
        self.copy(directory, source=source, to=lacking)
        return directory

    def copy(self, directory: Path, *, source: int, to: Sequence[int]) -> None:
        """Send a directory with a manifest to storages that lack it, each file checked on arrival.

        What else stood there under its name is replaced. The caller holds the lock under which it
        is made.

        Raises:
            RunError: it is damaged where it comes from, or a disk refuses.
        """
        if not to:
            return
        lead = self.leads[source]
        manifest: files.Manifest = ranks.broadcast_object(
            self.together(lambda: _manifest_of(directory) if ranks.rank() == lead else None),
            lead,
        )
        log.info("%s: sent to %s", directory, ", ".join(self.name(storage) for storage in to))
        targets = [self.leads[storage] for storage in to]

        def take_part() -> None:
            if ranks.rank() == lead:
                _send(directory, manifest, targets)
            elif ranks.rank() in targets:
                _receive(directory, manifest, lead, sender=self.name(source))

        self.together(take_part)

    def copy_file(self, path: Path, *, source: int = 0, to: Sequence[int] | None = None) -> None:
        """Send a small file from one storage, where it may be missing, to others (none: all)."""
        if not self.several:
            return
        storages = range(len(self.leads)) if to is None else to
        targets = [self.leads[storage] for storage in storages if storage != source]

        def take_part() -> None:
            if ranks.rank() == self.leads[source]:
                ranks.send_made(lambda: path.read_bytes() if path.exists() else None, targets)
            elif ranks.rank() in targets:
                content = ranks.receive_bytes(self.leads[source])
                if content is not None:
                    files.write_atomic(path, content)

        self.together(take_part)

    def check_same(
        self, directory: Path, of_each: Sequence[Mapping[str, FileFacts] | None]
    ) -> None:
        """Whether the storages that have a directory (not none) have the same in it.

        Raises:
            RunError: they do not; the first file that differs is named, and both nodes.
        """
        first = next(storage for storage, held in enumerate(of_each) if held is not None)
        ours = of_each[first] or {}
        for storage, theirs in enumerate(of_each):
            if theirs is None or theirs == ours:
                continue
            name = min(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
            raise RunError.of(
                f"{self.name(storage)}: {directory / name}",
                got=_shown(theirs.get(name)),
                expected=f"{_shown(ours.get(name))}, as on {self.name(first)}",
                hint=f"delete the folder {directory} on one of the two and start again: it is "
                "made or sent anew",
            )


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


def storages_of_nodes() -> Storages:
    """A storage for every node, led by the first of its ranks. A collective.

    Raises:
        MachineError: the local ranks of a node are not 0, 1, 2, …
    """
    number = next((os.environ[key] for key in _NODE_NUMBERS if os.environ.get(key)), None)
    found = ranks.gather_objects((number, ranks.local_rank(), socket.gethostname()))
    nodes = _nodes([number for number, _, _ in found], [local for _, local, _ in found])
    for members in nodes:
        local_ranks = sorted(found[rank][1] for rank in members)
        if local_ranks != list(range(len(members))):
            raise MachineError.of(
                "LOCAL_RANK",
                got=f"{local_ranks} for ranks {members} on host {found[members[0]][2]}",
                expected="0, 1, 2, … on every node",
                hint="start ranks with the deepspeed launcher, or tell each the number of its "
                "node in CROSS_RANK",
            )
    mine = next(node for node, members in enumerate(nodes) if ranks.rank() in members)
    return Storages(
        leads=tuple(members[0] for members in nodes),
        hosts=tuple(found[members[0]][2] for members in nodes),
        mine=mine,
        readers=tuple(nodes[mine]),
    )


def _nodes(numbers: Sequence[str | None], local_ranks: Sequence[int]) -> list[list[int]]:
    """The ranks of each node, in order: by its number, or else a local rank 0 begins the next."""
    begun = accumulate(int(local == 0) for local in local_ranks)
    keys: Iterable[object] = begun if None in numbers else numbers
    members: dict[object, list[int]] = {}
    for rank, key in enumerate(keys):
        members.setdefault(key, []).append(rank)
    return list(members.values())


# -- is it what was promised? ---------------------------------------------------------------------


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


# -- files on their way ---------------------------------------------------------------------------


def _facts_of(directory: Path) -> dict[str, FileFacts]:
    return _manifest_of(directory).files


def _manifest_of(directory: Path) -> files.Manifest:
    manifest = files.read_manifest(directory)
    assert manifest is not None, "what is finished has a manifest"
    return manifest


def _send(directory: Path, manifest: files.Manifest, targets: Sequence[int]) -> None:
    """The sender's part of `copy`: blocks of each file, an empty one at its end."""

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


def _receive(directory: Path, manifest: files.Manifest, source: int, *, sender: str) -> None:
    """A receiver's part of `copy`: the directory appears when all of its files have come."""
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


def _shown(facts: FileFacts | None) -> str:
    return "no such file" if facts is None else f"{facts.bytes} bytes, SHA-256 {facts.sha256[:16]}"
