"""Every moment of a measured step belongs to one part; what nobody asked for is not measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from babyllama_ds.training import breakdown
from babyllama_ds.training.breakdown import PARTS, Breakdown, untimed


class Clock:
    """A clock that stands still but for `pass_`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(breakdown, "time", clock)
    return clock


def test_an_inner_part_is_taken_out_of_the_outer(clock: Clock) -> None:
    parts = Breakdown(torch.device("cpu"))
    clock.pass_(1)  # before any part: nobody's
    with parts.part("backward"):
        clock.pass_(2)
        with parts.part("communication"):
            clock.pass_(4)
        clock.pass_(8)
    clock.pass_(16)
    with parts.part("optimizer"):
        clock.pass_(32)
    expected = {"backward": 10.0, "communication": 4.0, "optimizer": 32.0}
    assert parts.seconds == dict.fromkeys(PARTS, 0.0) | expected


def test_parts_add_up_over_steps_and_errors(clock: Clock) -> None:
    parts = Breakdown(torch.device("cpu"))

    def fail() -> None:
        with parts.part("loss"), parts.part("teachers"):
            clock.pass_(1)
            raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            fail()
        with parts.part("loss"):
            clock.pass_(0.5)
    assert parts.seconds["teachers"] == 3
    assert parts.seconds["loss"] == 1.5


def test_a_modules_forward_pass_is_a_part(clock: Clock) -> None:
    class Slow(nn.Module):
        def forward(self, x: int) -> int:
            clock.pass_(x)
            return x

    slow, parts = Slow(), Breakdown(torch.device("cpu"))
    with parts.of_module(slow, "student forward"), parts.part("loss"):
        slow(3)
        clock.pass_(1)
    slow(5)  # no longer watched
    assert (parts.seconds["student forward"], parts.seconds["loss"]) == (3, 1)


def test_what_nobody_asked_for_reads_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "time", None)
    with untimed("loss"):
        pass
