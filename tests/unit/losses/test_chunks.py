"""How positions are cut into chunks, and what is done where a chunk does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from babyllama_ds.losses import chunks as module
from babyllama_ds.losses.chunks import chunks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    module._fitting_chunk_tokens.cache_clear()
    yield
    module._fitting_chunk_tokens.cache_clear()


def cut(num_positions: int, chunk_tokens: int | None, vocab_size: int = 10) -> list[slice]:
    states = [torch.empty(num_positions, 4), torch.empty(num_positions, 6, dtype=torch.bfloat16)]
    result = []
    for rows, buffers in chunks(
        states,
        vocab_size=vocab_size,
        num_work=2,
        dtype=torch.float32,
        chunk_tokens=chunk_tokens,
    ):
        shape = (rows.stop - rows.start, vocab_size)
        assert [buffer.shape for buffer in buffers.logits_CV] == [shape, shape]
        assert [buffer.dtype for buffer in buffers.logits_CV] == [torch.float32, torch.bfloat16]
        assert len(buffers.work_RV) == 2
        result.append(rows)
    return result


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8, None])
def test_slices_are_all_positions_in_order(chunk_tokens: int | None) -> None:
    slices = cut(7, chunk_tokens)
    assert [n for rows in slices for n in range(rows.start, rows.stop)] == list(range(7))
    assert max(rows.stop - rows.start for rows in slices) == min(7, chunk_tokens or 7)


def test_a_chunk_that_does_not_fit_is_lowered_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A position has 10 logits of 4 and 2 bytes; half of 600 bytes hold five."""
    monkeypatch.setattr(module, "_free_bytes", lambda device: 600)
    for _ in range(3):
        assert cut(13, 8) == [slice(0, 5), slice(5, 10), slice(10, 13)]
    (message,) = caplog.messages
    assert message.startswith("the loss takes chunks of 5 tokens: 8 would take")
    assert message.endswith("free on cpu")


def test_one_position_is_always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_bytes", lambda device: 1)
    assert len(cut(3, 8)) == 3


def test_a_chunk_that_fits_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    cut(13, 8)
    assert not caplog.messages


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not a Linux")
def test_free_memory_is_some() -> None:
    assert 2**20 < module._free_bytes(CPU) < 2**50


def test_a_tile_fits_the_second_level_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_second_level_cache_bytes", lambda: 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert module._tile_rows(300, CPU) == 6
    assert module._tile_rows(5000, CPU) == 2  # a row for each thread
    assert module._tile_rows(300, torch.device("cuda")) is None
