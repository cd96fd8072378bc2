"""Rank 0 and others, each with its watch, in this process: what ends them, and with which words.

That a host which is silent is noticed needs a host: tests/nodes.
"""

from __future__ import annotations

import errno
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from babyllama_ds.engine import watching
from babyllama_ds.engine.joining import Joined, Member, World
from babyllama_ds.engine.watching import NodeWatch, keep_alive
from babyllama_ds.errors import LOST_EXIT_CODE

HOSTS = ("a", "a", "b", "b")


class Watched:
    """One rank: its watch, and how it was ended (stubbed: this process goes on)."""

    def __init__(self, joined: Joined) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.codes: list[int] = []
        self.watch = NodeWatch(joined, timeout_s=30)
        self.watch.tell = lambda text, facts: self.told.append((text, facts))
        self.watch.end = self.codes.append
        self.watch.start()

    def die(self) -> None:
        """As the kernel does for a process that was killed."""
        for link in self.watch._links.values():
            link.shutdown(socket.SHUT_RDWR)

    def wait(self) -> int | None:
        self.watch._thread.join(10)
        assert not self.watch._thread.is_alive()
        return self.codes[0] if self.codes else None


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watched]]:
    monkeypatch.setattr(watching, "GATHER_S", 0.3)
    monkeypatch.setattr(watching, "VERDICT_S", 3.0)
    members = tuple(
        Member(rank=rank, host=host, node=host, pid=100 + rank) for rank, host in enumerate(HOSTS)
    )
    ends: dict[int, socket.socket] = {}
    others = {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        for rank in range(1, len(HOSTS)):
            others[rank] = socket.create_connection(server.getsockname())
            ends[rank] = server.accept()[0]

    def joined(rank: int) -> Joined:
        world = World(rank=rank, size=len(HOSTS), address="127.0.0.1", port=1)
        links = ends if rank == 0 else {0: others[rank]}
        return Joined(world=world, members=members, store=None, links=links)

    watched = [Watched(joined(rank)) for rank in range(len(HOSTS))]
    yield watched
    for one in watched:
        one.watch.leave()


class Broken:
    """A connection on which the kernel reports an error; nobody may say anything on it any more."""

    def __init__(self, error: OSError, link: socket.socket) -> None:
        self.error = error
        self.fileno = link.fileno  # the watch may ask for it yet
        self.said = b""

    def recv(self, _size: int) -> bytes:
        raise self.error

    def sendall(self, line: bytes) -> None:
        self.said += line

    def close(self) -> None:
        pass


def test_all_leave_in_any_order(ranks: list[Watched]) -> None:
    for rank in (2, 0, 1, 3):
        ranks[rank].watch.leave()
    assert [one.codes for one in ranks] == [[], [], [], []]


def test_a_host_whose_ranks_die_is_named_once_to_all(
    ranks: list[Watched], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks[3].die()
    ranks[2].die()
    assert (ranks[0].wait(), ranks[1].wait()) == (LOST_EXIT_CODE, LOST_EXIT_CODE)
    ((text, facts),) = ranks[0].told
    assert text.startswith("host b (ranks 2, 3): got the connection broke off")
    assert [lost["rank"] for lost in facts["lost"]] == [2, 3]
    # Rank 0 speaks for its host; rank 1 beside it is silent.
    assert capfd.readouterr().err.count("error: host b (ranks 2, 3)") == 1


@pytest.mark.parametrize(
    ("number", "got"),
    [
        (errno.ETIMEDOUT, "no answer for 30 s: it is down, or cut off from host a"),
        (errno.EHOSTUNREACH, "no answer for 30 s: it is down, or cut off from host a"),
        (errno.ECONNRESET, "the connection broke off: its processes were killed"),
    ],
)
def test_a_silent_host_is_told_from_processes_that_were_killed(
    number: int, got: str, ranks: list[Watched]
) -> None:
    """And nothing is said to it: that would wait for a host that takes nothing."""
    real = ranks[0].watch._links[3]
    link: Any = Broken(OSError(number, "of the kernel"), real)
    ranks[0].watch._links[3] = link
    ranks[3].die()
    assert ranks[0].wait() == LOST_EXIT_CODE
    assert ranks[0].told[0][0].startswith(f"host b (rank 3): got {got}")
    assert link.said == b""
    real.close()


def test_one_rank_that_dies_ends_the_others_of_its_host(ranks: list[Watched]) -> None:
    ranks[3].die()
    assert ranks[2].wait() == LOST_EXIT_CODE
    assert ranks[2].told[0][0].startswith("host b (rank 3): got")


def test_without_rank_0_every_rank_ends(
    ranks: list[Watched], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks[0].die()
    assert [one.wait() for one in ranks[1:]] == [LOST_EXIT_CODE] * 3
    assert capfd.readouterr().err.count("error: host a (rank 0)") >= 2  # once a host


def test_a_failure_is_told_and_is_no_loss(ranks: list[Watched]) -> None:
    """Its own rank goes on, to show the trace; a start again would fail again."""
    start_s = time.monotonic()
    ranks[2].watch.failed(ValueError("no such thing\nand more"))
    assert time.monotonic() - start_s < 2
    ranks[2].die()
    assert (ranks[0].wait(), ranks[1].wait(), ranks[3].wait()) == (1, 1, 1)
    assert ranks[2].codes == []
    text = "host b (rank 2) failed with ValueError: no such thing; its own output tells"
    assert ranks[0].told[0][0].startswith(text)


def test_a_failure_of_rank_0_is_told(ranks: list[Watched]) -> None:
    ranks[0].watch.failed(KeyError("x"))
    assert [one.wait() for one in ranks[1:]] == [1, 1, 1]
    assert ranks[0].codes == []
    assert "host a (rank 0) failed with KeyError" in ranks[3].told[0][0]


def test_an_error_that_comes_of_a_loss_is_a_loss(ranks: list[Watched]) -> None:
    """The network's error of a survivor arrives before the host's end is known."""
    ranks[3].die()
    ranks[1].watch.failed(RuntimeError("Connection closed by peer"))
    assert (ranks[0].wait(), ranks[1].wait(), ranks[2].wait()) == (LOST_EXIT_CODE,) * 3
    assert ranks[1].told[0][0].startswith("host b (rank 3)")


def test_the_end_comes_even_where_the_state_cannot_be_written(ranks: list[Watched]) -> None:
    def no_space(_text: str, _facts: dict[str, Any]) -> None:
        raise OSError("no space left")

    ranks[0].watch.tell = no_space
    ranks[2].die()
    assert ranks[0].wait() == LOST_EXIT_CODE


@pytest.mark.parametrize("timeout_s", [0.5, 6, 100, 300])
def test_the_kernel_finds_out_in_time(timeout_s: float) -> None:
    with socket.socket() as link:
        keep_alive(link, timeout_s)
        of = lambda name: link.getsockopt(socket.IPPROTO_TCP, name)  # noqa: E731
        idle, between = of(socket.TCP_KEEPIDLE), of(socket.TCP_KEEPINTVL)
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert of(socket.TCP_USER_TIMEOUT) == timeout_s * 1000
        # It sees that the time is up when it asks anew, so it must ask about then.
        asked_s = idle + math.ceil(max(0, timeout_s - idle) / between) * between
        assert asked_s <= timeout_s + max(1, timeout_s / 6)
