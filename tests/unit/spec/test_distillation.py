"""What changes in the course of a training, worked out by hand."""

from __future__ import annotations

import math

import pytest

from babyllama_ds.spec.distillation import DistillationSpec, scheduled


def alpha(**changes: object) -> object:
    return DistillationSpec.model_validate({"alpha": {"start": 0.9, "end": 0.1, **changes}}).alpha


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({}, {0: 0.9, 0.25: 0.7, 0.5: 0.5, 1: 0.1}),
        ({"over": 0.5}, {0: 0.9, 0.25: 0.5, 0.5: 0.1, 0.75: 0.1, 1: 0.1}),
        ({"shape": "cosine"}, {0: 0.9, 0.25: 0.5 + 0.4 * math.sqrt(0.5), 0.5: 0.5, 1: 0.1}),
        ({"shape": "cosine", "over": 0.5}, {0: 0.9, 0.25: 0.5, 0.5: 0.1, 0.9: 0.1}),
    ],
)
def test_the_way_of_a_schedule(changes: dict[str, object], values: dict[float, float]) -> None:
    for done, value in values.items():
        assert scheduled(alpha(**changes), done) == pytest.approx(value, abs=1e-15)


def test_temperatures_go_up_too_and_numbers_stay() -> None:
    spec = DistillationSpec.model_validate({"temperature": {"start": 1, "end": 3}})
    assert [scheduled(spec.temperature, done) for done in (0, 0.5, 1)] == [1.0, 2.0, 3.0]
    assert [scheduled(spec.alpha, done) for done in (0, 0.5, 1)] == [0.5] * 3
    assert spec.is_scheduled
    assert not DistillationSpec().is_scheduled


def test_a_schedule_begins_and_ends_to_the_bit() -> None:
    spec = alpha(over=1 / 3)
    assert scheduled(spec, 0.0) == 0.9
    assert scheduled(spec, 1.0) == scheduled(spec, 0.34) == 0.1
