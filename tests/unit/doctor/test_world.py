"""Worlds of ranks: what is started, and that a rank that dies or hangs is told and ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from babyllama_ds.doctor import world as module
from babyllama_ds.doctor.world import Started, World, worlds

PAIR = World(device="cpu", num_ranks=2)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        (1, [World(device="cuda", num_ranks=1), PAIR]),
        (4, [World(device="cuda", num_ranks=4)]),
    ],
)
def test_worlds_of_a_machine_with_cards(
    cards: int, expected: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert worlds("cuda") == expected
    assert worlds("cpu") == [PAIR]


def test_names() -> None:
    assert (str(PAIR), PAIR.backend) == ("2 CPU ranks", "gloo")
    card = World(device="cuda", num_ranks=1)
    assert (str(card), card.backend) == ("1 GPU", "nccl")


def test_what_a_rank_runs() -> None:
    words = module.rank_command(Path("there"), PAIR, compiled=True)
    assert words[1:] == ["-m", "babyllama_ds.doctor.rank", "there", "cpu", "--compile"]
    assert "--compile" not in module.rank_command(Path("there"), PAIR, compiled=False)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Started]:
    """A world whose ranks run a line of Python."""

    def begin(line: str) -> Started:
        script = f"import os, sys, time; rank = int(os.environ['RANK']); {line}"
        monkeypatch.setattr(module, "rank_command", lambda *_, **__: [sys.executable, "-c", script])
        return Started(PAIR, compiled=False)

    return begin


def test_ranks_meet_at_one_port_and_all_is_removed(start: Callable[[str], Started]) -> None:
    words = "'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT', 'DS_ACCELERATOR', 'OMP_NUM_THREADS'"
    with start(f"print(*(os.environ[word] for word in ({words})))") as started:
        assert started.wait() is None
        told = [(started.folder / f"rank{rank}.log").read_text().split() for rank in (0, 1)]
    assert [each[:2] for each in told] == [["2", "0"], ["2", "1"]]
    assert told[0][2:] == told[1][2:] == [told[0][2], "cpu", "1"]
    assert not started.folder.exists()


def test_a_dead_rank_is_told_with_its_last_lines_and_ends_the_others(
    start: Callable[[str], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    line = "rank or time.sleep(300); print(*range(9), sep='\\n'); sys.exit('no such port')"
    with start(line) as started:
        assert started.wait() == "rank 1 ended with status 1: 6 | 7 | 8 | no such port"
        assert all(process.poll() is not None for process in started._processes)


def test_a_killed_rank_is_told(start: Callable[[str], Started]) -> None:
    with start("os.kill(os.getpid(), 9)") as started:
        assert started.wait() == "rank 0 ended with status -9, without a word"


def test_a_rank_that_hangs_is_told_and_ended(
    start: Callable[[str], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT_S", 1.0)
    with start("time.sleep(300 * rank)") as started:
        assert (started.wait() or "").startswith("rank 1 did not end in 1 s")
        assert all(process.poll() is not None for process in started._processes)


def test_ranks_are_ended_when_the_doctor_fails(start: Callable[[str], Started]) -> None:
    with pytest.raises(KeyboardInterrupt), start("time.sleep(300)") as started:
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in started._processes)
