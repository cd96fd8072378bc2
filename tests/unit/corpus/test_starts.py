"""Where documents start in windows: as a walk over the stream finds it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.starts import ON_DISK, DocumentStarts
from babyllama_ds.corpus.windows import DevWindows, TrainWindows
from babyllama_ds.spec.corpus import Phases

NUM_TOKENS = 401


def split_up(starts: list[int], bounds: list[int]) -> list[np.ndarray]:
    """The starts of each shard, counted from its first token."""
    return [
        np.array([at - low for at in starts if low <= at < high], ON_DISK)
        for low, high in pairwise(bounds)
    ]


def walked(starts: list[int], first: int, length: int) -> list[bool]:
    return [place == first or place in starts for place in range(first, first + length)]


def some_starts(seed: int) -> list[int]:
    draw = np.random.default_rng(seed)
    many = draw.choice(NUM_TOKENS, [0, 1, 12, 130][seed % 4], replace=False)
    return sorted({0, *many.tolist()} if seed % 3 else set(many.tolist()))


BOUNDS = ([0, NUM_TOKENS], [0, 1, 40, 40, 170, 171, NUM_TOKENS])  # a shard may be empty


@pytest.mark.parametrize("bounds", BOUNDS, ids=["one shard", "several"])
@pytest.mark.parametrize("seed", range(12))
def test_against_a_walk_over_the_stream(seed: int, bounds: list[int]) -> None:
    starts = some_starts(seed)
    kept = DocumentStarts(split_up(starts, bounds), np.array(bounds))
    assert kept.num_documents == len(starts)
    for length in (1, 2, 7, 64):
        firsts = np.random.default_rng(seed).integers(0, NUM_TOKENS - length + 1, 40)
        firsts[:3] = [0, NUM_TOKENS - length, min(starts, default=0) % (NUM_TOKENS - length)]
        got = kept.begins(firsts, length)
        assert got.dtype == np.bool_
        assert got.tolist() == [walked(starts, first, length) for first in firsts.tolist()]


def test_no_window_has_no_piece() -> None:
    kept = DocumentStarts(split_up([3], [0, NUM_TOKENS]), np.array([0, NUM_TOKENS]))
    assert kept.begins(np.empty(0, np.int64), 5).shape == (0, 5)


# -- asked by windows ------------------------------------------------------------------------------

LENGTH = 10


def shards(split: str) -> TokenShards:
    bounds = BOUNDS[1]
    index: dict[str, Any] = {"vocab_size": NUM_TOKENS, "splits": {split: {}}}
    stream = np.arange(NUM_TOKENS, dtype="<u4")  # each token's id is its place
    parts = [stream[low:high] for low, high in pairwise(bounds)]
    return TokenShards(index, {split: parts}, {split: split_up(some_starts(3), bounds)})


@pytest.mark.parametrize("offsets", ["fixed", "random", Phases(phases=3)])
def test_boundaries_are_those_of_the_very_tokens(offsets: Any) -> None:
    windows = TrainWindows(
        shards("train"), length=LENGTH, offsets=offsets, seed=5, within_documents=True
    )
    starts = some_starts(3)
    for epoch in range(4):
        ids = windows.order(epoch)[:17]
        begins_NL = windows.begins(epoch, ids)
        assert begins_NL is not None
        expected = [walked(starts, row[0], LENGTH) for row in windows.windows(epoch, ids).tolist()]
        assert begins_NL.tolist() == expected
        if windows.num_phases is not None:
            numbered = windows.numbered_begins(windows.numbers(epoch, ids))
            assert numbered is not None
            assert numbered.tolist() == expected


def test_development_windows_have_theirs() -> None:
    windows = DevWindows(shards("dev"), LENGTH, limit=13, within_documents=True)
    ids = np.array([0, 12, 5])
    begins_NL = windows.begins(ids)
    assert begins_NL is not None
    starts = some_starts(3)
    assert begins_NL.tolist() == [
        walked(starts, row[0], LENGTH) for row in windows.windows(ids).tolist()
    ]


def test_whole_windows_have_none() -> None:
    train = TrainWindows(shards("train"), length=LENGTH, offsets="fixed", seed=1)
    assert not train.within_documents
    assert train.begins(0, np.arange(3)) is None
    assert train.numbered_begins(np.arange(3)) is None
    assert DevWindows(shards("dev"), LENGTH).begins(np.arange(3)) is None
