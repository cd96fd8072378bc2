"""Shards hold every window once, in files that prove themselves whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from babyllama_ds.errors import RunError
from babyllama_ds.teachers.cache import layout as layout_module
from babyllama_ds.teachers.cache.layout import (
    Layout,
    examine_shard,
    padded_bytes,
    shard_path,
    write_shard,
)

LAYOUT = Layout(num_windows=10, record_bytes=16, forward_windows=2, shard_windows=4)


def records(shard: int) -> torch.Tensor:
    """Record of window w: the bytes w, w + 1, …"""
    return torch.tensor(
        [[w + i for i in range(16)] for w in LAYOUT.windows(shard).tolist()], dtype=torch.uint8
    )


@pytest.mark.parametrize("num_windows", [1, 7, 100, 4096, 4097, 20_000])
@pytest.mark.parametrize("forward_windows", [1, 6, 32])
@pytest.mark.parametrize("record_bytes", [8, 2**18, 2**27])
def test_every_window_is_in_one_shard_of_whole_forward_passes(
    num_windows: int, forward_windows: int, record_bytes: int
) -> None:
    layout = Layout.choose(
        num_windows=num_windows, record_bytes=record_bytes, forward_windows=forward_windows
    )
    together = np.concatenate([layout.windows(shard) for shard in range(layout.num_shards)])
    assert np.array_equal(together, np.arange(num_windows))
    assert all(len(layout.windows(shard)) for shard in range(layout.num_shards))
    assert layout.shard_windows % forward_windows == 0
    sizes = [layout.shard_bytes(shard) for shard in range(layout.num_shards)]
    assert sum(sizes) == layout.total_bytes == num_windows * record_bytes
    one_pass = forward_windows * record_bytes
    assert max(sizes) <= max(layout_module.SHARD_BYTES, one_pass)
    if num_windows >= 16 * forward_windows:  # enough for several ranks to share
        assert layout.num_shards >= 16


def test_padding_makes_whole_words() -> None:
    assert [padded_bytes(n) for n in (1, 7, 8, 9, 16)] == [8, 8, 8, 16, 16]


def test_a_layout_is_kept(tmp_path: Path) -> None:
    assert Layout.read(tmp_path) is None
    LAYOUT.write(tmp_path)
    assert Layout.read(tmp_path) == LAYOUT


def test_a_layout_of_another_shape_is_told(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text('{"num_windows": 3}')
    with pytest.raises(RunError, match="expected the layout of a teacher cache"):
        Layout.read(tmp_path)


@pytest.mark.parametrize("shard", [0, 2])
def test_a_shards_file_is_its_records_and_their_digest(tmp_path: Path, shard: int) -> None:
    facts = write_shard(tmp_path, shard, records(shard))
    content = shard_path(tmp_path, shard).read_bytes()
    expected = bytes(records(shard).flatten().tolist())
    assert content == expected + hashlib.sha256(expected).digest()
    assert facts.sha256 == hashlib.sha256(content).hexdigest()
    assert facts.bytes == len(content)
    assert examine_shard(tmp_path, LAYOUT, shard) == facts
    assert [path.name for path in tmp_path.iterdir()] == [f"shard-0000{shard}.bin"]


def test_a_missing_shard_is_not_damaged(tmp_path: Path) -> None:
    assert examine_shard(tmp_path, LAYOUT, 0) is None


@pytest.mark.parametrize("byte", [0, 31, 63, 64, 95])
def test_any_flipped_byte_is_found(tmp_path: Path, byte: int) -> None:
    write_shard(tmp_path, 0, records(0))
    path = shard_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    assert len(content) == 96
    content[byte] ^= 1
    path.write_bytes(content)
    assert examine_shard(tmp_path, LAYOUT, 0) == "its checksum does not hold"


@pytest.mark.parametrize(("size", "what"), [(0, "0 bytes"), (40, "40 bytes"), (97, "97 bytes")])
def test_a_shard_of_another_size_is_found(tmp_path: Path, size: int, what: str) -> None:
    write_shard(tmp_path, 0, records(0))
    path = shard_path(tmp_path, 0)
    path.write_bytes((path.read_bytes() + b"x")[:size])
    assert examine_shard(tmp_path, LAYOUT, 0) == f"{what} instead of 96"


def test_a_shard_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.bin").symlink_to("shard-00000.bin")
    found = examine_shard(tmp_path, LAYOUT, 0)
    assert isinstance(found, str)
    assert "symbolic links" in found
