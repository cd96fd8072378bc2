"""Stopping at a safe point: a signal, or the launcher's death, becomes a reason that ranks share.

Enters: SIGTERM, SIGINT, the end of the parent process. Leaves: a reason, asked for where stopping
is safe. The `deepspeed` launcher signals its ranks one after another, and when it is killed it
signals none; so a handler only sets a flag, and the training loop asks `agreed()` at each step
boundary: every rank gets the same answer, and they write their checkpoint together. Within an
evaluation each rank asks `check()`, and what it raises reaches the others at the batch's end.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from babyllama_ds import ranks
from babyllama_ds.errors import Stopped

LAUNCHER_GONE = "launcher gone"

# What ranks agree on is the largest code of any rank: a signal by its number, so a signal anywhere
# outweighs a launcher that is gone (SIGHUP's number, which has no handler here).
_NO_REASON, _LAUNCHER_GONE_CODE = 0, 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this run was asked to stop, and why: "SIGTERM", "SIGINT" or "launcher gone"."""

    def __init__(self, *, watch_parent: bool = False) -> None:
        """`watch_parent`: the end of the parent process (the launcher) is a reason too.

        The `deepspeed` command starts `launch.py`, which starts the ranks; a signal to the
        command ends it alone. So where the parent is that script, its parent is watched too.
        """
        self._watched = launcher_pids() if watch_parent else ()
        self._too_late = bool(self._watched) and _command_gone(self._watched)
        # A handler runs between any two instructions, so what it writes nothing else may write: a
        # signal that arrives during the all-reduce would be overwritten by the outcome, and lost.
        self._signalled = _NO_REASON
        self._learnt = _NO_REASON
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over SIGTERM and SIGINT (from the main thread): they only set a flag.

        After the first SIGINT a second one kills, for whoever presses Ctrl-C twice.
        """
        for number in _SIGNALS:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Give the signals back to whoever had them before `install`."""
        for number, previous in self._previous.items():
            # None: installed by something other than Python, which cannot be restored from here
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def requested(self) -> str | None:
        """The reason as this rank knows it, or none; no communication."""
        if self._code() == _NO_REASON and self._parent_gone():
            self._learnt = _LAUNCHER_GONE_CODE
        return _reason(self._code())

    def agreed(self) -> str | None:
        """The reason that any rank knows, the same on every rank, or none; one small all-reduce."""
        self.requested()
        self._learnt = common = ranks.max_int(self._code())
        return _reason(common)  # not what has come since: the other ranks do not know it

    def check(self) -> None:
        """Raise `Stopped` if asked to stop, as this rank knows it; for long work on one rank."""
        if (reason := self.requested()) is not None:
            raise stopped(reason)

    @property
    def launcher_pid(self) -> int | None:
        """The watched process furthest up: the command that a person started."""
        return self._watched[-1] if self._watched else None

    def _code(self) -> int:
        return max(self._signalled, self._learnt)

    def _parent_gone(self) -> bool:
        if not self._watched:
            return False
        parent, *above = self._watched
        gone = os.getppid() != parent or [_parent_of(parent)] * len(above) != above
        return self._too_late or gone

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signalled = max(self._signalled, number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def started_by_launcher() -> bool:
    """Whether this process is a rank of the `deepspeed` launcher, not a person's own command."""
    return b"deepspeed.launcher.launch" in _command_line(os.getppid())


def launcher_pids() -> tuple[int, ...]:
    """The parent, and above DeepSpeed's `launch.py` the command that started it."""
    parent = os.getppid()
    above = _parent_of(parent) if started_by_launcher() else None
    return (parent,) if above is None else (parent, above)


def stopped(reason: str, at: str | None = None) -> Stopped:
    """The `Stopped` for a reason, exit code as a shell has it: 128 + signal (no launcher: 143)."""
    number = signal.SIGTERM if reason == LAUNCHER_GONE else signal.Signals[reason]
    return Stopped(reason, exit_code=128 + number, at=at)


def _reason(code: int) -> str | None:
    if code == _NO_REASON:
        return None
    return LAUNCHER_GONE if code == _LAUNCHER_GONE_CODE else signal.Signals(code).name


def _command_gone(watched: tuple[int, ...]) -> bool:
    """Whether the command ended before it could be watched, while ranks were importing.

    The system's first process then has `launch.py`, which on several nodes ssh may have started.
    """
    _, *above = watched
    alone = os.environ.get("CROSS_SIZE") == "1"  # nodes, as `launch.py` tells
    words = _command_line(1).decode(errors="replace").split("\0")
    its_own = any(Path(word).name in ("deepspeed", "deepspeed.launcher.runner") for word in words)
    return alone and above == [1] and not its_own


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None  # just gone, or no /proc on this system
    return int(stat.rpartition(")")[2].split()[1])


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
