"""Watching the other nodes: the connections of `joining` enter; this process's end leaves, with the
reason, when a node is gone.

A collective waits for a host that is switched off or cut off as long as its time-out, here weeks.
So every rank keeps its connection to rank 0 open, and a thread that sleeps on it. The kernels of
both sides assure each other that they are there (TCP keepalive): nothing is sent by Python, so a
rank that computes for hours, or holds Python's lock, is not taken for a dead one; and no step of a
training waits for anything. A connection that breaks off is a process that died, one that falls
silent for `timeout_s` a host. A rank that leaves as agreed says so; one that fails says why.

The main thread may wait in a collective that never ends, so the watching thread itself writes the
run's state (rank 0) and ends the process. Rank 0 learns of every loss, waits a moment for those
that belong to it, and tells the others.

A host whose kernel answers but whose ranks do nothing is not noticed here (`heartbeat`).
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal

from babyllama_ds.engine.joining import Joined, Member, named
from babyllama_ds.errors import LOST_EXIT_CODE, Problem

GATHER_S = 2.0
"""From the first loss to the verdict: what belongs to the same end is known by then."""
VERDICT_S = 15.0
"""How long a failing rank waits to hear whether it fails because another is gone."""

Ending = Literal["left", "failed", "broke off", "fell silent"]


def keep_alive(link: socket.socket, timeout_s: float) -> None:
    """Let the kernel find out after `timeout_s` that the other side's host does not answer.

    It looks at the time when it asks anew: up to a sixth of it later, or a second.
    """
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(timeout_s / 3)))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(timeout_s / 6)))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


class NodeWatch:
    """This rank's part. `tell` is called with the reason before the process ends."""

    def __init__(self, joined: Joined, *, timeout_s: float) -> None:
        self.tell: Callable[[str, dict[str, Any]], None] = lambda _text, _facts: None
        self.end: Callable[[int], None] = os._exit
        self._members = {member.rank: member for member in joined.members}
        self._rank = joined.world.rank
        self._timeout_s = timeout_s
        self._links = dict(joined.links)
        self._heard: dict[int, bytes] = dict.fromkeys(self._links, b"")
        self._endings: dict[int, tuple[Ending, str]] = {}
        self._leaving = False
        self._over = False
        self._own_verdict = threading.Event()
        self._waker, self._woken = socket.socketpair()
        self._lock = threading.Lock()  # of `_links`, which both threads send on
        for link in self._links.values():
            link.settimeout(None)
            keep_alive(link, timeout_s)
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)

    def start(self) -> None:
        """From here on until `leave`."""
        self._thread.start()

    def leave(self) -> None:
        """As all ranks do: it is no loss. A second time does nothing."""
        if self._leaving:
            return
        self._leaving = True
        self._say_all({"left": self._rank})
        self._waker.send(b".")
        self._thread.join()
        with self._lock:
            for link in (*self._links.values(), self._waker, self._woken):
                link.close()
            self._links.clear()

    def failed(self, error: BaseException) -> None:
        """This rank is about to end with an error of its own, and the others are told.

        Does not return where another rank is gone, of which this error comes.
        """
        text = f"{type(error).__qualname__}: {error}".splitlines()[0]
        if self._rank == 0:
            self._endings.setdefault(0, ("failed", text))
            self._waker.send(b".")
        else:
            self._say_all({"failed": text})
        self._own_verdict.wait(VERDICT_S)

    # -- the thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            verdict_s: float | None = None
            while not (self._leaving or self._over):
                wait_s = None if verdict_s is None else max(0.0, verdict_s - time.monotonic())
                for key, _ in selector.select(wait_s):
                    if key.data is None:
                        self._woken.recv(64)
                    elif self._listen(key.data):
                        selector.unregister(key.fileobj)
                if verdict_s is None and self._endings:
                    verdict_s = time.monotonic() + (GATHER_S if self._rank == 0 else 0)
                if verdict_s is not None and time.monotonic() >= verdict_s and not self._leaving:
                    self._judge()
                    return

    def _listen(self, rank: int) -> bool:
        """Hear what comes from a rank; whether it was the last."""
        ending: tuple[Ending, str] | None = None
        try:
            more = self._links[rank].recv(65536)
        except OSError as error:
            killed = isinstance(error, ConnectionError)
            ending, more = ("broke off" if killed else "fell silent", ""), b""
        *lines, self._heard[rank] = (self._heard[rank] + more).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "verdict" in said:  # rank 0's
                self._over = True
                self._finish(said["verdict"])
                return True
            if "failed" in said:
                self._endings.setdefault(rank, ("failed", said["failed"]))
            if "left" in said:
                return True
        if not more:
            self._endings.setdefault(rank, ending or ("broke off", ""))
        return not more

    def _judge(self) -> None:
        """Say what happened, to the others too, and end."""
        lost = {r: how for r, (how, _) in self._endings.items() if how != "failed"}
        # A rank that told of its failure and then ended is not lost but failed.
        verdict = self._loss(lost) if lost else self._failure()
        self._say_all({"verdict": verdict})
        self._finish(verdict)

    def _loss(self, lost: Mapping[int, Ending]) -> dict[str, Any]:
        members = [self._members[rank] for rank in sorted(lost)]
        here = self._members[self._rank].host
        got = (
            f"no answer for {self._timeout_s:g} s: it is down, or cut off from host {here}"
            if "fell silent" in lost.values()
            else "the connection broke off: its processes were killed, or ran out of memory"
        )
        problem = Problem(
            where=named(members),
            got=got,
            expected="every node, until the run ends",
            hint="the same command goes on from the last checkpoint when all nodes are there",
        )
        return {
            "text": str(problem),
            "code": LOST_EXIT_CODE,
            "lost": [asdict(member) for member in members],
        }

    def _failure(self) -> dict[str, Any]:
        rank, (_, text) = next(iter(self._endings.items()))
        member: Member = self._members[rank]
        return {
            "text": f"{named([member])} failed with {text}; its own output tells the whole story",
            "code": 1,
            "failed": rank,
        }

    def _finish(self, verdict: Mapping[str, Any]) -> None:
        if verdict.get("failed") == self._rank:
            self._own_verdict.set()  # the main thread tells it, with its trace
            return
        text = str(verdict["text"])
        facts = {"lost": verdict["lost"]} if "lost" in verdict else {}
        with suppress(Exception):  # whatever is wrong with the disk, this process must end
            self.tell(text, facts)
        gone = {member["rank"] for member in verdict.get("lost", ())}
        node = self._members[self._rank].node
        first_here = min(
            member.rank
            for member in self._members.values()
            if member.node == node and member.rank not in gone
        )
        if first_here == self._rank:
            print(f"error: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the process ends
        self.end(int(verdict["code"]))

    def _say_all(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value).encode() + b"\n"
        with self._lock:
            for rank, link in self._links.items():
                if self._endings.get(rank, ("", ""))[0] not in ("broke off", "fell silent"):
                    with suppress(OSError):
                        link.sendall(line)
