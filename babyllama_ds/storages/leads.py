"""The storages of a run: which there are, who works on each, what goes from one to another.

Enters: which ranks share a node. Leaves: `Storages`. Who sends and who receives is decided here;
`sending` does it.
"""

from __future__ import annotations

import logging
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from babyllama_ds import files, ranks
from babyllama_ds.errors import MachineError, RunError, UserError
from babyllama_ds.files import FileFacts
from babyllama_ds.storages.sending import receive_directory, send_directory

T = TypeVar("T")

log = logging.getLogger(__name__)


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
            return None if found is None else (found, files.manifest_of(found).files)

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
            self.together(lambda: files.manifest_of(directory) if ranks.rank() == lead else None),
            lead,
        )
        log.info("%s: sent to %s", directory, ", ".join(self.name(storage) for storage in to))
        targets = [self.leads[storage] for storage in to]

        def take_part() -> None:
            if ranks.rank() == lead:
                send_directory(directory, manifest, targets)
            elif ranks.rank() in targets:
                receive_directory(directory, manifest, lead, sender=self.name(source))

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


def storages_of_nodes() -> Storages:
    """A storage for every node, led by the first of its ranks. A collective.

    Raises:
        MachineError: the local ranks of a node are not 0, 1, 2, …
    """
    found = ranks.gather_objects((ranks.node_number(), ranks.local_rank(), socket.gethostname()))
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


def _shown(facts: FileFacts | None) -> str:
    return "no such file" if facts is None else f"{facts.bytes} bytes, SHA-256 {facts.sha256[:16]}"
