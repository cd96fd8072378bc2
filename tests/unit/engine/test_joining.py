"""Ranks that meet, in threads of this process: who is missing, who differs, who is a stranger."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest

from babyllama_ds.engine import joining
from babyllama_ds.engine.joining import Facts, Joined, Member, World, named
from babyllama_ds.errors import MeetingError, Stopped

STORE_TIMEOUT = timedelta(seconds=20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def port() -> int:
    return free_port()


def member(rank: int, host: str) -> Member:
    return Member(rank=rank, host=host, node=host, pid=rank)


def meet(
    port: int,
    *members: tuple[int, str, Facts],
    size: int,
    timeout_s: float = 1.0,
    before: Callable[[], None] = lambda: None,
) -> list[Joined | MeetingError]:
    """What comes of each, in order; every rank in a thread of its own."""

    def one(rank: int, host: str, facts: Facts) -> Joined | MeetingError:
        world = World(rank=rank, size=size, address="127.0.0.1", port=port)
        work = joining._gather if rank == 0 else joining._report
        try:
            return work(
                world,
                member(rank, host),
                facts,
                timeout_s=timeout_s,
                store_timeout=STORE_TIMEOUT,
            )
        except MeetingError as error:
            return error

    before()
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(lambda each: one(*each), members))


def close(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Joined):
            for link in outcome.links.values():
                link.close()


def text(outcome: Joined | MeetingError) -> str:
    assert isinstance(outcome, MeetingError), outcome
    return str(outcome)


# -- all is well ----------------------------------------------------------------------------------


def test_all_know_all_and_share_a_store(port: int) -> None:
    facts = Facts(same={"python": "3.11"}, alike={"CPU": "AVX2"})
    found = meet(port, (2, "b", facts), (0, "a", facts), (1, "a", facts), size=3, timeout_s=20)
    joined = [one for one in found if isinstance(one, Joined)]
    assert len(joined) == 3
    for one in joined:
        assert one.members == (member(0, "a"), member(1, "a"), member(2, "b"))
        assert one.num_nodes == 2
    joined[0].store.set("key", "of rank 2")
    assert joined[2].store.get("key") == b"of rank 2"
    assert set(joined[1].links) == {1, 2}
    assert set(joined[0].links) == {0}
    close(found)


def test_nodes_of_the_same_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers often have: with one node less, none would be watched."""
    for name in ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    assert joining._node() == socket.gethostname()
    for name in ("SLURM_NODEID", "GROUP_RANK", "CROSS_RANK"):
        monkeypatch.setenv(name, f"number by {name}")
        assert joining._node() == f"number by {name}"
    members = tuple(Member(rank=rank, host="box", node=str(rank // 2), pid=1) for rank in range(4))
    world = World(rank=0, size=4, address="127.0.0.1", port=1)
    store: Any = None
    assert Joined(world=world, members=members, store=store, links={}).num_nodes == 2


def test_names_of_ranks_by_host() -> None:
    those = [member(0, "a"), member(1, "a"), member(2, "b")]
    assert named(those) == "host a (ranks 0, 1), host b (rank 2)"


# -- somebody is missing --------------------------------------------------------------------------


@pytest.mark.parametrize("waiting", [(0,), (1,), (0, 1)])
def test_asked_to_stop_they_do_not_wait_for_the_others(port: int, waiting: tuple[int, ...]) -> None:
    """Rank 0 for hellos, another for rank 0, or for its answer."""
    began_s = time.monotonic()

    def asked() -> None:
        if time.monotonic() - began_s > 1:
            raise Stopped("SIGTERM")

    def wait(rank: int) -> None:
        work = joining._gather if rank == 0 else joining._report
        with pytest.raises(Stopped):
            work(
                World(rank=rank, size=3, address="127.0.0.1", port=port),
                member(rank, "a"),
                Facts(),
                timeout_s=60,
                store_timeout=STORE_TIMEOUT,
                while_waiting=asked,
            )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(wait, waiting))
    assert time.monotonic() - began_s < 30


def test_a_request_that_comes_while_an_answer_is_awaited_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 answers when all ranks have come, which may be never."""
    monkeypatch.setattr(joining, "LOOK_EVERY_S", 0.05)
    looked = 0

    def look() -> None:
        nonlocal looked
        looked += 1
        if looked == 3:
            raise Stopped("SIGTERM")

    here, there = socket.socketpair()
    with here, there:
        began_s = time.monotonic()
        with pytest.raises(Stopped):
            joining._hear(here, began_s + 60, look)
        assert time.monotonic() - began_s < 30


def test_those_who_came_are_told_who_is_missing(port: int) -> None:
    found = meet(port, (0, "a", Facts()), (2, "b", Facts()), size=4)
    for outcome in found:
        assert (
            "got 2 of 4 ranks within 1 s: host a (rank 0), host b (rank 2); missing: ranks 1, 3"
            in text(outcome)
        )


def test_rank_0_is_not_there(port: int) -> None:
    (found,) = meet(port, (3, "b", Facts()), size=4, timeout_s=0.5)
    assert "rank 0 was not found there by host b (rank 3) within 0.5 s" in text(found)
    assert "refused" in text(found)


def test_something_else_listens_there() -> None:
    """It takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port: int = other.getsockname()[1]
        joining_s = joining.ANSWER_S
        joining.ANSWER_S = 0.2
        try:
            (found,) = meet(port, (1, "b", Facts()), size=2, timeout_s=0.3)
        finally:
            joining.ANSWER_S = joining_s
        assert "something listens there that is not rank 0 of this run" in text(found)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port: int = other.getsockname()[1]
        (found,) = meet(port, (0, "a", Facts()), size=2)
        assert f"port {port} of host" in text(found)
        assert "taken by another program" in text(found)
        assert "--master_port" in text(found)


# -- somebody is wrong ----------------------------------------------------------------------------


def test_other_versions_are_refused_on_every_rank(port: int) -> None:
    ours, theirs = (
        Facts(same={"version of torch": "2.13"}),
        Facts(same={"version of torch": "2.12"}),
    )
    found = meet(port, (0, "a", ours), (1, "a", ours), (2, "b", theirs), size=3, timeout_s=20)
    for outcome in found:
        assert (
            'version of torch: got "2.13" on host a (ranks 0, 1); "2.12" on host b (rank 2), '
            "expected the same on every node" in text(outcome)
        )


@pytest.mark.parametrize("lacking", [0, 1])
def test_what_one_side_lacks_differs(lacking: int, port: int) -> None:
    new, old = Facts(same={"the job's new_key": 1}), Facts()
    ours, theirs = (new, old) if lacking else (old, new)
    found = meet(port, (0, "a", ours), (1, "b", theirs), size=2, timeout_s=20)
    assert f"null on host {'ab'[lacking]} (rank {lacking})" in text(found[0])


def test_other_hardware_is_warned_of(port: int, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (
        Facts(alike={"CPU capability": "AVX2"}),
        Facts(alike={"CPU capability": "AVX512"}),
    )
    with caplog.at_level(logging.WARNING, logger="babyllama_ds"):
        found = meet(port, (0, "a", ours), (1, "b", theirs), size=2, timeout_s=20)
    assert all(isinstance(outcome, Joined) for outcome in found)
    (record,) = caplog.records
    assert 'CPU capability differs: "AVX2" on host a (rank 0); "AVX512" on host b (rank 1)' in (
        record.getMessage()
    )
    close(found)


def test_a_rank_that_comes_twice_is_refused_alone(port: int) -> None:
    """Two nodes were given the same number, or another run the same port."""
    found = meet(
        port, (0, "a", Facts()), (1, "b", Facts()), (1, "c", Facts()), size=2, timeout_s=1.0
    )
    joined = [outcome for outcome in found if isinstance(outcome, Joined)]
    refused = [outcome for outcome in found if isinstance(outcome, MeetingError)]
    assert len(joined) == 2
    # The second to come finds the meeting over, or the first one there.
    assert len(refused) == 1
    close(found)


def test_another_number_of_ranks_is_refused(port: int) -> None:
    world = World(rank=1, size=3, address="127.0.0.1", port=port)
    refused = joining._refused(member(1, "b"), 2, {0: member(0, "a")}, world)
    assert refused is not None
    assert "got a launch of 2 ranks, expected 3, as on host a" in str(refused)
    assert joining._refused(member(1, "b"), 3, {0: member(0, "a")}, world) is None
    assert joining._refused(member(3, "b"), 3, {0: member(0, "a")}, world) is not None
    twice = joining._refused(member(1, "b"), 3, {0: member(0, "a"), 1: member(1, "c")}, world)
    assert "another rank 1, of host c, was here before" in str(twice)


def test_a_rank_of_another_release_is_told_so_and_rank_0_waits_on(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose hello lacks what this release asks for. What it has beyond that is left alone."""
    lacking = {"member": {"rank": 1, "host": "b"}, "size": 2, "facts": {}}
    beyond = asdict(joining.Hello(member=member(1, "b"), size=2, facts=Facts()))
    beyond["member"]["cards"] = 8
    answers: list[dict[str, Any] | None] = []

    def others() -> None:
        for hello in (lacking, beyond):
            with connected(port) as link:
                joining._say(link, hello)
                answers.append(joining._hear(link, time.monotonic() + 60))

    coming = threading.Thread(target=others)
    with caplog.at_level(logging.WARNING):
        found = meet(port, (0, "a", Facts()), size=2, timeout_s=60, before=coming.start)
    coming.join()
    refused, let_in = answers
    assert refused is not None
    assert let_in is not None
    (problem,) = refused["problems"]
    assert problem["where"] == "a rank at 127.0.0.1"
    assert problem["expected"] == "the same release of babyllama_ds on every node"
    assert "a rank at 127.0.0.1: got a hello that rank 0" in caplog.text
    assert [one["rank"] for one in let_in["members"]] == [0, 1]
    close([*found])


def connected(port: int) -> socket.socket:
    """A connection to rank 0, which may not listen yet."""
    until_s = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            assert time.monotonic() < until_s
            time.sleep(0.02)


@pytest.mark.parametrize(
    "says",
    [b"GET / HTTP/1.1\r\n\r\n", b'{"jsonrpc": "2.0"}\n', b"[]\n", b"\xff\n", b""],
    ids=["a browser", "another's JSON", "a list", "no text", "nothing"],
)
def test_strangers_at_the_port_change_nothing(
    says: bytes, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that says nothing stays; the ranks behind it are let in all the same."""
    monkeypatch.setattr(joining, "HELLO_S", 0.3)
    held: list[socket.socket] = []

    def stranger() -> None:
        for _ in range(500):
            try:
                held.append(socket.create_connection(("127.0.0.1", port), timeout=1))
                held[0].sendall(says)
                return
            except OSError:
                time.sleep(0.02)

    def first() -> None:
        """The stranger waits for rank 0 to listen, and the other rank for the stranger."""
        threading.Thread(target=stranger).start()
        monkeypatch.setattr(joining, "_report", after_the_stranger)

    def after_the_stranger(*args: Any, **named: Any) -> Joined:
        while not held:
            time.sleep(0.02)
        return report(*args, **named)

    report = joining._report
    began_s = time.monotonic()
    found = meet(port, (0, "a", Facts()), (1, "b", Facts()), size=2, timeout_s=60, before=first)
    assert all(isinstance(outcome, Joined) for outcome in found), found
    assert time.monotonic() - began_s < 30
    close([*found])
    held[0].close()


def test_who_never_ends_a_line_is_not_listened_to_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "LARGEST_BYTES", 1000)
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"x" * 2000)
        began_s = time.monotonic()
        assert joining._hear(here, began_s + 60) is None
        assert time.monotonic() - began_s < 30


def test_a_launcher_that_says_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(MeetingError, match="no MASTER_ADDR, MASTER_PORT in the environment"):
        World.told()
