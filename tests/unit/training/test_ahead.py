"""The batch after the one asked for is read meanwhile, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from babyllama_ds.training.ahead import BatchesAhead

PATIENCE_S = 30


@pytest.fixture
def reading() -> Iterator[Callable[..., BatchesAhead]]:
    made: list[BatchesAhead] = []

    def make(read: Callable[[int], Any], total_steps: int = 6) -> BatchesAhead:
        made.append(BatchesAhead(read, total_steps=total_steps, device=torch.device("cpu")))
        return made[-1]

    yield make
    for ahead in made:
        ahead.close()


def test_each_batch_is_read_once_in_the_order_of_steps(
    reading: Callable[..., BatchesAhead],
) -> None:
    read: list[int] = []

    def batch(step: int) -> str:
        read.append(step)
        return f"batch {step}"

    ahead = reading(batch)
    # From where a resumed training begins.
    assert [ahead.batch(step) for step in range(2, 6)] == [f"batch {n}" for n in range(2, 6)]
    ahead._reader.submit(int).result()  # what was asked of it before is done
    assert read == [2, 3, 4, 5], "none is read twice, none beyond the last"


def test_the_next_batch_is_read_while_nobody_asks(reading: Callable[..., BatchesAhead]) -> None:
    was_read = [threading.Event() for _ in range(3)]
    ahead = reading(lambda step: was_read[step].set(), total_steps=3)
    ahead.batch(0)
    assert was_read[1].wait(PATIENCE_S)
    assert not was_read[2].is_set(), "one step ahead, not more"


def test_an_error_of_reading_is_raised_at_its_step(reading: Callable[..., BatchesAhead]) -> None:
    def batch(step: int) -> int:
        if step == 1:
            raise OSError("shard is gone")
        return step

    ahead = reading(batch)
    assert ahead.batch(0) == 0
    with pytest.raises(OSError, match="gone"):
        ahead.batch(1)
