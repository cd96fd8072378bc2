"""The clock of a training."""

from __future__ import annotations

import pytest

from babyllama_ds.training import clock as clock_module


def test_time_counts_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 103.0, 200.0, 201.0])
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: next(now))
    clock = clock_module.Clock(10.0, 70)
    with clock:
        pass
    assert clock.seconds == 13
    assert clock.rate(130) == 20  # since the resume
    with clock:
        pass
    assert clock.seconds == 14
    assert clock.rate(190) == 60  # since the last call
    assert clock.seconds_a_step(7) == 2
