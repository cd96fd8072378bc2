"""Sides that take turns: their descriptions enter, times of steps leave.

A side is a process (or one a rank) of this process's tree, built once, kept to the end, and asleep
unless it is its turn.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from scenario import Sizes

SIDE = Path(__file__).resolve().parent / "side.py"
TURN_S = 3.0
"""About how long a side's turn is."""
TRIAL_STEPS = 2
"""Steps by which variants are compared; as many before them warm up."""

T = TypeVar("T")
Kind = Literal["ours", "plain", "textbook"]

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    kind: Kind
    sizes: Sizes
    device: str
    ranks: int
    threads: int
    """Of each rank; of no account on CUDA."""
    precision: str = "bf16"
    attention: str = "auto"
    cache: bool = False
    compiled: Literal["none", "student", "all"] = "none"
    """As `deepspeed.compile` has it."""

    @property
    def variant(self) -> str:
        """Ranks, threads, and what else sets it apart from the others of its row."""
        words = [f"{self.ranks} × {self.threads}"]
        if self.attention != "auto":
            words.append(self.attention)
        if self.compiled != "none":
            words.append(f"compiled: {self.compiled}")
        return ", ".join(words)

    @property
    def flops_per_step(self) -> float:
        """Of the matrix products that the work takes, however it is done."""
        return self.sizes.flops_per_token(cached=self.cache) * self.sizes.tokens


class Running:
    """The processes of a side."""

    def __init__(self, side: Side, logs: Path, *, turn_s: float = TURN_S) -> None:
        self.side = side
        self._turn_s = turn_s
        self._log = logs / f"{os.getpid()}-{next(_NUMBERS)}-{side.kind}.log"
        port = free_port()
        self._processes = [self._start(rank, port) for rank in range(side.ranks)]
        self.first_loss = math.nan
        """Of the same batch with the same weights on every side."""
        self.step_s: list[float] = []
        """Seconds of a step in each round."""
        self._steps_a_turn = 1

    def warm_up(self) -> float:
        """Seconds of a step, once it is built, by a few of them; they settle a turn's length."""
        self.first_loss = self._hear()[0]["first_loss"]
        self._steps(TRIAL_STEPS)
        step_s = self._steps(TRIAL_STEPS)
        self._steps_a_turn = max(1, round(self._turn_s / step_s))
        return step_s

    def take_turn(self) -> None:
        """A round's steps."""
        self.step_s.append(self._steps(self._steps_a_turn))

    def _steps(self, number: int) -> float:
        self._say({"steps": number})
        slowest_s: float = max(reply["seconds"] for reply in self._hear())
        return slowest_s / number

    def ask(self, question: str) -> Any:
        """Rank 0's answer; all ranks are asked."""
        self._say({"ask": question})
        return self._hear()[0]

    def end(self) -> None:
        """End the processes, which the end of their input does."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, str(SIDE), json.dumps(asdict(self.side))],
                env=environment(self.side, rank, port),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _say(self, what: dict[str, Any]) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()

    def _hear(self) -> list[Any]:
        return [self._hear_one(process) for process in self._processes]

    def _hear_one(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{self.side.kind} ended:\n{tail}")
        return json.loads(line)


def fastest(variants: Iterable[Running]) -> Running:
    """The fastest of a row's variants, warm; the others are ended."""
    best: tuple[float, Running] | None = None
    for running in variants:
        step_s = running.warm_up()
        side = running.side
        print(f"{side.kind}, {side.precision}, {side.variant}: {step_s:.3f} s a step", flush=True)
        if best is None:
            best = step_s, running
        elif step_s < best[0]:
            best[1].end()
            best = step_s, running
        else:
            running.end()
    assert best is not None, "a row without variants"
    return best[1]


def take_turns(sides: Sequence[Running], rounds: int, *, after_each: Callable[[], T]) -> list[T]:
    """Every side once a round, in turned order every other time; `after_each`'s answers."""
    answers = []
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            side.take_turn()
        answers.append(after_each())
    return answers


def environment(side: Side, rank: int, port: int) -> dict[str, str]:
    """Of the process of a rank: its world, its threads, and one card for one that has no world."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {"TOKENIZERS_PARALLELISM": "false"}
    if side.device == "cpu":
        env |= {"OMP_NUM_THREADS": str(side.threads), "DS_ACCELERATOR": "cpu"}
    if side.ranks > 1 or side.kind == "ours":
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": side.ranks}
        world |= {"LOCAL_SIZE": side.ranks, "LOCAL_WORLD_SIZE": side.ranks, "MASTER_PORT": port}
        env |= {key: str(value) for key, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
    elif side.device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return env


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
