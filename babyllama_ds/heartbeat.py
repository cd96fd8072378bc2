"""Work that hangs: heartbeats enter; a warning leaves where there was none for long.

A rank that hangs (a process that was stopped, a driver, a disk that does not answer) leaves the
others waiting in a collective, some of which have no time-out to speak of. Nobody can tell from
outside that it is not at work, so nothing is ended; but every rank that waits says so.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

log = logging.getLogger(__name__)

FIRST_S = 600.0
"""Seconds without a heartbeat until the first warning; each later one takes twice as long."""


class Heartbeat:
    """Watches work on this rank: `with Heartbeat(name) as heartbeat: … heartbeat.beat("…")`."""

    def __init__(self, name: str, *, first_s: float = FIRST_S) -> None:
        self._name, self._first_s = name, first_s
        self._last = (time.monotonic(), "it began")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def beat(self, what: str) -> None:
        """`what` has just been done."""
        self._last = (time.monotonic(), what)

    def _watch(self) -> None:
        seen, limit_s = self._last, self._first_s
        while not self._over.wait(max(0.0, seen[0] + limit_s - time.monotonic())):
            last = self._last
            if last is not seen:
                seen, limit_s = last, self._first_s
            elif time.monotonic() - seen[0] >= limit_s:
                self._warn(seen[1], limit_s)
                limit_s *= 2

    def _warn(self, what: str, silent_s: float) -> None:
        log.warning(
            "%s: nothing more in the %g minutes since %s. If what comes next never took so long, a "
            "rank hangs: one that does not say this, or all wait for a disk or driver. End the "
            "run; the same command goes on from what is saved",
            self._name,
            silent_s / 60,
            what,
        )
