"""Worlds of ranks: a device and a number enter; processes are started, watched and ended.

A rank that dies or hangs ends its world, with its last lines; nothing here waits for ever.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from babyllama_ds.engine.distributed import Device

LIMIT_S = 180.0
"""Time for a world that does not compile; it needs a tenth of that when nobody else computes."""
COMPILING_LIMIT_S = 420.0
GRACE_S = 5.0
"""What the other ranks have to say something after one has died."""
LAST_LINES = 4


@dataclass(frozen=True, kw_only=True)
class World:
    """Ranks of one kind on this machine."""

    device: Device
    num_ranks: int

    def __str__(self) -> str:
        kind = "GPU" if self.device == "cuda" else "CPU rank"
        return f"{self.num_ranks} {kind}{'s' if self.num_ranks > 1 else ''}"

    @property
    def backend(self) -> str:
        """What carries their collectives."""
        return "nccl" if self.device == "cuda" else "gloo"


def worlds(device: Device) -> list[World]:
    """A rank for every GPU; beside a single one, or none, two CPU ranks, so that ZeRO-2 shards."""
    pair = World(device="cpu", num_ranks=2)
    if device == "cpu":
        return [pair]
    cards = World(device="cuda", num_ranks=torch.cuda.device_count())
    return [cards] if cards.num_ranks > 1 else [cards, pair]


class Started:
    """A started world. Used in a `with`: at its end no process and no file of it is left."""

    def __init__(self, world: World, *, compiled: bool) -> None:
        self.world = world
        self._limit_s = COMPILING_LIMIT_S if compiled else LIMIT_S
        self._deadline_s = time.monotonic() + self._limit_s
        self.folder = Path(tempfile.mkdtemp(prefix="babyllama-doctor-"))
        words = rank_command(self.folder, world, compiled=compiled)
        self._processes = [self._start(words, env) for env in _environments(world)]

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self) -> str | None:
        """Until all ranks have ended; none when all went well, else which did not, and its end."""
        while any(process.poll() is None for process in self._processes):
            if self._dead_rank() is not None:
                self._give_grace()
                break
            if time.monotonic() > self._deadline_s:
                late = [r for r, each in enumerate(self._processes) if each.poll() is None]
                self._kill()
                return f"rank {late[0]} did not end in {self._limit_s:.0f} s{self._last(late[0])}"
            time.sleep(0.05)
        dead = self._dead_rank()
        self._kill()
        if dead is None:
            return None
        return f"rank {dead} ended with status {self._processes[dead].returncode}{self._last(dead)}"

    def _start(self, words: Sequence[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        # A compiler that is killed leaves half a library in torch's cache: not in the user's.
        env = {**env, "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor")}
        with self._log(int(env["RANK"])).open("wb") as log:
            return subprocess.Popen(
                words,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what it starts (compilers) is ended with it
            )

    def _dead_rank(self) -> int | None:
        codes = enumerate(process.poll() for process in self._processes)
        return next((rank for rank, code in codes if code), None)

    def _give_grace(self) -> None:
        until_s = time.monotonic() + GRACE_S
        while time.monotonic() < until_s and any(p.poll() is None for p in self._processes):
            time.sleep(0.05)

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def _last(self, rank: int) -> str:
        text = self._log(rank).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return ": " + " | ".join(lines[-LAST_LINES:]) if lines else ", without a word"


def rank_command(folder: Path, world: World, *, compiled: bool) -> list[str]:
    """What every rank runs."""
    words = [sys.executable, "-m", "babyllama_ds.doctor.rank", str(folder), world.device]
    return [*words, "--compile"] if compiled else words


def _environments(world: World) -> list[dict[str, str]]:
    """What a launcher would tell each rank. CPU ranks compute on one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world.num_ranks),
        "LOCAL_SIZE": str(world.num_ranks),
        "LOCAL_WORLD_SIZE": str(world.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": world.device,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # a rank's last words stand where it said them
    }
    return [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world.num_ranks)]
