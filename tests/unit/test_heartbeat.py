"""Ranks that wait for long say so, and what they waited for; those that go on say nothing."""

from __future__ import annotations

import time

import pytest

from babyllama_ds.heartbeat import Heartbeat

LIMIT_S = 30


def told(caplog: pytest.LogCaptureFixture, since: str, number: int) -> list[str]:
    """The first so many warnings of a silence since then, when they have come."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        texts = [record.getMessage().partition(". If")[0] for record in caplog.records]
        if len(found := [text for text in texts if text.endswith(since)]) >= number:
            return found[:number]
        time.sleep(0.02)
    pytest.fail(f"not told {number} times: {texts}")


def test_a_silence_is_told_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    with Heartbeat("student", first_s=0.3) as heartbeat:
        heartbeat.beat("step 12")
        assert told(caplog, "since step 12", 2) == [
            "student: nothing more in the 0.005 minutes since step 12",
            "student: nothing more in the 0.01 minutes since step 12",
        ]
        heartbeat.beat("step 13")
        assert told(caplog, "since step 13", 1) == [
            "student: nothing more in the 0.005 minutes since step 13"
        ]


def test_a_training_that_goes_on_is_not_disturbed(caplog: pytest.LogCaptureFixture) -> None:
    with Heartbeat("student", first_s=1.0) as heartbeat:
        for step in range(30):
            time.sleep(0.05)
            heartbeat.beat(f"step {step}")
    assert caplog.records == []


def test_its_end_does_not_wait() -> None:
    began_s = time.monotonic()
    with pytest.raises(ZeroDivisionError), Heartbeat("student"):
        raise ZeroDivisionError
    assert time.monotonic() - began_s < LIMIT_S
