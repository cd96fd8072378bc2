"""Contenders in processes of their own: descriptions enter, answers to requests leave.

One that fails, runs out of memory or does not answer costs its own row and no other. All wait for
nothing beyond the race's own limit of time.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scenario import Sizes
from turns import Side, environment, free_port
from workloads import Contender

CONTENDER = Path(__file__).resolve().parent / "contender.py"
ANSWER_S = 300.0
"""The longest that an answer may take; compiling is the longest work."""
WARM_STEPS = 2

_NUMBERS = itertools.count()
_PORTS: set[int] = set()
"""Given to contenders, which may meet at them much later."""


class FailedError(Exception):
    """A contender that did not do what it was asked for, and why."""


class NoMemoryError(FailedError):
    """For want of memory: it may do with less."""


class OutOfTimeError(Exception):
    """The race's time is over."""


class Deadline:
    """When everything ends."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds. Raises OutOfTimeError: none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        return left


@dataclass(frozen=True)
class Variant:
    """What a side may choose for itself."""

    micro: int
    """Windows of a forward pass."""
    attention: str | None = None
    """None: as the side has it."""

    def __str__(self) -> str:
        return " ".join(
            [f"micro-batch {self.micro}", *([self.attention] if self.attention else [])]
        )


class Running:
    """A contender's process."""

    def __init__(self, contender: Contender, logs: Path, deadline: Deadline) -> None:
        self.contender = contender
        self._deadline = deadline
        self._log = logs / f"{os.getpid()}-{next(_NUMBERS)}-{contender.kind}.log"
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._is_here = False
        kind: Any = contender.kind
        side = Side(kind, Sizes(), contender.device, ranks=1, threads=contender.threads)
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(CONTENDER), json.dumps(asdict(contender))],
                env=environment(side, 0, _another_port()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_until_here(self) -> None:
        """Until everything is imported. Raises FailedError, OutOfTimeError."""
        if not self._is_here:
            self._next_answer()
            self._is_here = True

    def say(self, what: str, **named: Any) -> None:
        """Ask for something, to be heard later. Raises FailedError, OutOfTimeError."""
        self.wait_until_here()
        assert self._process.stdin is not None, "it was asked for"
        try:
            self._process.stdin.write(json.dumps({"do": what, **named}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise FailedError(self._last_words()) from error

    def hear(self) -> dict[str, Any]:
        """The answer. Raises FailedError, OutOfTimeError."""
        answer = self._next_answer()
        if "error" in answer:
            raise (NoMemoryError if answer["memory"] else FailedError)(answer["error"])
        found: dict[str, Any] = answer["found"]
        return found

    def ask(self, what: str, **named: Any) -> dict[str, Any]:
        """Ask, and wait for the answer. Raises FailedError, OutOfTimeError."""
        self.say(what, **named)
        return self.hear()

    def steps(self, variant: Variant, *, turns: int, turn_s: float) -> dict[str, Any]:
        """Steps in as many turns, after a few; of no turns, those of a trial."""
        return self.ask("turns", **asdict(variant), warm=WARM_STEPS, turns=turns, turn_s=turn_s)

    def end(self) -> None:
        """At once: nothing of it is wanted any more."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None, "it was asked for"
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _next_answer(self) -> dict[str, Any]:
        limit = min(ANSWER_S, self._deadline.left())
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self._deadline.left()
            raise FailedError(f"no answer within {ANSWER_S:.0f} s") from None
        if line is None:
            raise FailedError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"it ended: {lines[-1] if lines else 'without a word'}"


def _another_port() -> int:
    port = next(port for port in iter(free_port, None) if port not in _PORTS)
    _PORTS.add(port)
    return port


def tuned(
    running: Running, attentions: Sequence[str | None], micros: Sequence[int]
) -> tuple[Variant, list[dict[str, Any]]]:
    """The fastest variant, and all that were tried.

    Attention first, with the first micro-batch that has room; then the others in order, as long
    as each is faster than the one before. Where there is nothing to choose, nothing is tried.
    Raises FailedError: none runs.
    """
    if len(attentions) == len(micros) == 1:
        return Variant(micros[0], attentions[0]), []
    tried: list[dict[str, Any]] = []
    best: tuple[float, Variant] | None = None
    why = ""
    for micro in micros:
        kernels = attentions if best is None else [best[1].attention]
        before = best
        for attention in kernels:
            variant = Variant(micro, attention)
            try:
                step_s = running.steps(variant, turns=0, turn_s=0.0)["step_s"][0]
            except NoMemoryError as error:
                tried.append({**asdict(variant), "error": str(error)})
                why = str(error)
                continue
            tried.append({**asdict(variant), "step_s": step_s})
            if best is None or step_s < best[0]:
                best = step_s, variant
        if before is not None and best is before:
            break
    if best is None:
        raise NoMemoryError(why)
    return best[1], tried
