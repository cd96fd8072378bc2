"""Joining the other ranks: the launcher's environment and this rank's facts enter; a store that all
ranks share, who they are, and a connection to rank 0 leave, or an error that tells what is missing.

Rank 0 listens on the launcher's port, and every other rank says there who it is. When all have
come, or the time is up, rank 0 compares what they brought and answers all of them alike. That is
done on plain sockets, before torch's own meeting: torch waits half an hour for a rank that does
not come and for ever on a port that something else holds, and tells neither in a user's words.
The connections stay open for `watching`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from babyllama_ds import ranks
from babyllama_ds.errors import MeetingError, Problem

log = logging.getLogger(__name__)

TELL_EVERY_S = 30.0
RETRY_S = 0.2
ANSWER_S = 15.0
"""How long after its own time is up rank 0 may take to answer."""
HELLO_S = 5.0
"""How long whoever connects may take to say who it is: meanwhile nobody else is let in."""
LOOK_EVERY_S = 1.0
"""How often a rank that waits for an answer looks whether it was asked to stop."""
LARGEST_BYTES = 4_000_000
"""Size of one rank's facts, or of all ranks' names: more is not one of ours."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a rank brings to be compared, by name."""

    same: Mapping[str, Any] = field(default_factory=dict)
    """Must be the same on every node: versions, code, the job."""
    alike: Mapping[str, Any] = field(default_factory=dict)
    """Should be: other hardware computes other last bits."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A rank, and where it is. `node` tells nodes apart that have the same name."""

    rank: int
    host: str
    node: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a rank says to rank 0 when it comes."""

    member: Member
    size: int
    """The ranks of its launch."""
    facts: Facts


_HELLO = TypeAdapter(Hello)


@dataclass(frozen=True, kw_only=True)
class World:
    """What the launcher tells a rank of all."""

    rank: int
    size: int
    address: str
    port: int

    @classmethod
    def told(cls) -> World:
        """By the environment.

        Raises:
            MeetingError: the launcher left something out.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise MeetingError.of(
                "the launcher",
                got=f"no {', '.join(missing)} in the environment",
                expected=f"all of {', '.join(names)}",
                hint="start with `deepspeed launcher/run.py`, or set them (docs/clusters.md)",
            )
        rank, size, _, port = (os.environ[name] for name in names)
        return cls(
            rank=int(rank), size=int(size), address=os.environ["MASTER_ADDR"], port=int(port)
        )


@dataclass(frozen=True, kw_only=True)
class Joined:
    """All ranks, and this one's connections: rank 0's to all others, another's to rank 0."""

    world: World
    members: tuple[Member, ...]
    store: dist.Store  # type: ignore[name-defined]  # not in its stubs
    links: dict[int, socket.socket]

    @property
    def num_nodes(self) -> int:
        """Machines, as the launcher counts them."""
        return len({member.node for member in self.members})


def join(
    facts: Facts,
    *,
    timeout_s: float,
    store_timeout: timedelta,
    while_waiting: Callable[[], None] = lambda: None,
) -> Joined:
    """Meet all ranks of the launcher's world; called by each. `store_timeout` is the store's;
    `while_waiting` is called every second or more often, and what it raises ends the wait.

    Raises:
        MeetingError: a rank did not come within `timeout_s`, came twice or brought other facts; or
            the port is taken. Every rank that is there raises.
    """
    world = World.told()
    me = Member(rank=world.rank, host=socket.gethostname(), node=_node(), pid=os.getpid())
    work = _gather if world.rank == 0 else _report
    return work(
        world,
        me,
        facts,
        timeout_s=timeout_s,
        store_timeout=store_timeout,
        while_waiting=while_waiting,
    )


def named(members: Sequence[Member]) -> str:
    """`host a (ranks 0, 1), host b (rank 2)`."""
    hosts: dict[str, list[int]] = {}
    for member in members:
        hosts.setdefault(member.host, []).append(member.rank)
    return ", ".join(
        f"host {host} (rank{'s' if len(those) > 1 else ''} {', '.join(map(str, those))})"
        for host, those in hosts.items()
    )


# -- rank 0 ---------------------------------------------------------------------------------------


def _gather(
    world: World,
    me: Member,
    facts: Facts,
    *,
    timeout_s: float,
    store_timeout: timedelta,
    while_waiting: Callable[[], None] = lambda: None,
) -> Joined:
    members, brought = {0: me}, {0: facts}
    links: dict[int, socket.socket] = {}
    deadline_s = time.monotonic() + timeout_s
    next_s = time.monotonic() + TELL_EVERY_S
    with _listening(world) as listener:
        while len(members) < world.size and time.monotonic() < deadline_s:
            while_waiting()
            if time.monotonic() > next_s:
                log.info("%d of %d ranks have come", len(members), world.size)
                next_s += TELL_EVERY_S
            for link, hello in _arrivals(listener):
                member = hello.member
                refused = _refused(member, hello.size, members, world)
                if refused is not None:
                    _say(link, {"problems": [asdict(refused)]})
                    link.close()
                    continue
                members[member.rank], links[member.rank] = member, link
                brought[member.rank] = hello.facts
    ordered = tuple(member for _, member in sorted(members.items()))
    problems = _missing(world, ordered, timeout_s) or _differing(ordered, brought)
    if problems:
        for link in links.values():
            _say(link, {"problems": [asdict(problem) for problem in problems]})
            link.close()
        raise MeetingError(*problems)
    _warn_of_differences(ordered, brought)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        world.address,
        0,
        world.size,
        is_master=True,
        timeout=store_timeout,
        wait_for_workers=False,
    )
    answer = {"store_port": store.port, "members": [asdict(member) for member in ordered]}
    for link in links.values():
        _say(link, answer)
    return Joined(world=world, members=ordered, store=store, links=links)


def _listening(world: World) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", world.port),
                family=socket.AF_INET6,
                dualstack_ipv6=True,
                backlog=world.size,
            )
        return socket.create_server(("", world.port), backlog=world.size)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        got = "it is taken by another program" if taken else str(error)
        raise MeetingError.of(
            f"port {world.port} of host {socket.gethostname()}",
            got=got,
            expected="a free port for the ranks to meet at",
            hint="another run may use it: start with `deepspeed --master_port N`, N a free port",
        ) from None


def _arrivals(listener: socket.socket) -> Iterator[tuple[socket.socket, Hello]]:
    """Who comes within a moment, and what they say; strangers are not let in, nor a rank that says
    it in another release's way."""
    listener.settimeout(RETRY_S)
    try:
        link, address = listener.accept()
    except OSError:  # nobody, or gone again
        return
    said = _hear(link, time.monotonic() + HELLO_S)
    if said is None or not {"member", "size", "facts"} <= said.keys():
        link.close()
        return
    try:
        hello = _HELLO.validate_python(said)
    except ValidationError:
        problem = _of_another_release(address[0].removeprefix("::ffff:"))
        log.warning("%s", problem)
        _say(link, {"problems": [asdict(problem)]})
        link.close()
        return
    yield link, hello


def _of_another_release(address: str) -> Problem:
    return Problem(
        where=f"a rank at {address}",
        got=f"a hello that rank 0 on host {socket.gethostname()} cannot read",
        expected="the same release of babyllama_ds on every node",
        hint="install the same environment and code everywhere",
    )


def _refused(
    member: Member, size: int, members: Mapping[int, Member], world: World
) -> Problem | None:
    if size != world.size or not 0 < member.rank < world.size:
        return Problem(
            where=f"rank {member.rank} of host {member.host}",
            got=f"a launch of {size} ranks",
            expected=f"{world.size}, as on host {members[0].host}",
            hint="launch every node with the same hostfile, and each run with its own port",
        )
    first = members.get(member.rank)
    if first is None:
        return None
    return Problem(
        where=f"rank {member.rank} of host {member.host}",
        got=f"another rank {member.rank}, of host {first.host}, was here before",
        expected="every rank once",
        hint="each node needs its own --node_rank, and each run its own --master_port",
    )


def _missing(world: World, members: Sequence[Member], timeout_s: float) -> list[Problem]:
    away = sorted(set(range(world.size)) - {member.rank for member in members})
    if not away:
        return []
    numbers = ", ".join(map(str, away))
    return [
        Problem(
            where=f"meeting at {world.address}:{world.port}",
            got=f"{len(members)} of {world.size} ranks within {timeout_s:g} s: {named(members)}; "
            f"missing: rank{'s' if len(away) > 1 else ''} {numbers}",
            expected="all of them",
            hint="was every node launched, and can it reach this address? "
            "`babyllama-ds doctor --hostfile FILE` tries; deepspeed.join_timeout_minutes waits "
            "longer",
        )
    ]


def _differing(members: Sequence[Member], brought: Mapping[int, Facts]) -> list[Problem]:
    return [
        Problem(
            where=name,
            got=values,
            expected="the same on every node",
            hint="install the same environment and code everywhere, and start the same command",
        )
        for name, values in _differences(members, {r: f.same for r, f in brought.items()})
    ]


def _warn_of_differences(members: Sequence[Member], brought: Mapping[int, Facts]) -> None:
    for name, values in _differences(members, {r: f.alike for r, f in brought.items()}):
        log.warning(
            "%s differs: %s; a run elsewhere, or a resumed one, may differ in the last bits",
            name,
            values,
        )


def _differences(
    members: Sequence[Member], brought: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Names whose values are not the same everywhere, and who has which."""
    for name in sorted({name for facts in brought.values() for name in facts}):
        having: dict[str, list[Member]] = {}
        for member in members:
            value = brought[member.rank].get(name)
            having.setdefault(json.dumps(value, sort_keys=True), []).append(member)
        if len(having) > 1:
            yield name, "; ".join(f"{value} on {named(those)}" for value, those in having.items())


# -- every other rank -----------------------------------------------------------------------------


def _report(
    world: World,
    me: Member,
    facts: Facts,
    *,
    timeout_s: float,
    store_timeout: timedelta,
    while_waiting: Callable[[], None] = lambda: None,
) -> Joined:
    hello = asdict(Hello(member=me, size=world.size, facts=facts))
    deadline_s = time.monotonic() + timeout_s
    why = "no answer"
    while time.monotonic() < deadline_s:
        while_waiting()
        try:
            link = socket.create_connection((world.address, world.port), timeout=5)
        except OSError as error:  # not there yet, or never
            why = str(error)
            time.sleep(RETRY_S)
            continue
        _say(link, hello)
        answer = _hear(link, time.monotonic() + timeout_s + ANSWER_S, while_waiting)
        if answer is not None and "problems" in answer:
            raise MeetingError(*(Problem(**problem) for problem in answer["problems"]))
        if answer is not None and "members" in answer:
            return Joined(
                world=world,
                members=tuple(Member(**member) for member in answer["members"]),
                store=dist.TCPStore(  # type: ignore[attr-defined]
                    world.address,
                    answer["store_port"],
                    world.size,
                    is_master=False,
                    timeout=store_timeout,
                ),
                links={0: link},
            )
        link.close()
        why = "something listens there that is not rank 0 of this run, or rank 0 has just ended"
        time.sleep(RETRY_S)
    raise MeetingError.of(
        f"meeting at {world.address}:{world.port}",
        got=f"rank 0 was not found there by host {me.host} (rank {me.rank}) within "
        f"{timeout_s:g} s: {why}",
        expected="rank 0, listening",
        hint="was node 0 launched, does it have this address (--master_addr), and does no "
        "firewall lie between?",
    )


# -- helpers --------------------------------------------------------------------------------------


def _node() -> str:
    """This machine's number by the launcher; else its name."""
    return ranks.node_number() or socket.gethostname()


def _say(link: socket.socket, value: Mapping[str, Any]) -> None:
    """One line of JSON; to whom has gone there is nothing to say."""
    with suppress(OSError):
        link.sendall(json.dumps(value).encode() + b"\n")


def _hear(
    link: socket.socket, deadline_s: float, while_waiting: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """One line of JSON; none if it does not come, or something else does."""
    heard = b""
    while not heard.endswith(b"\n") and len(heard) < LARGEST_BYTES:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return None
        while_waiting()
        link.settimeout(min(left_s, LOOK_EVERY_S))
        try:
            more = link.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return None
        if not more:
            return None
        heard += more
    try:
        value = json.loads(heard)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
