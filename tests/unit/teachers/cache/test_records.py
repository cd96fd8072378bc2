"""What was put under a number comes back under it, from whichever memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from babyllama_ds.teachers.cache.layout import Layout, shard_path, write_shard
from babyllama_ds.teachers.cache.records import FileRecords, MemoryRecords, Records

# A record of 5,000 bytes does not end on a page of 4,096.
LAYOUT = Layout(num_windows=11, record_bytes=5000, forward_windows=2, shard_windows=4)
CPU = torch.device("cpu")
CONTENT = torch.randint(
    0, 256, (11, 5000), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def in_memory(_: Path) -> Records:
    memory = MemoryRecords(LAYOUT, place=CPU, device=CPU)
    for shard in (2, 0, 1):
        windows = LAYOUT.windows(shard)
        memory.put(int(windows[0]), CONTENT[windows])
    return memory


def in_files(directory: Path) -> Records:
    for shard in range(LAYOUT.num_shards):
        write_shard(directory, shard, CONTENT[LAYOUT.windows(shard)])
    return FileRecords(directory, LAYOUT, device=CPU)


@pytest.mark.parametrize("make", [in_memory, in_files])
@pytest.mark.parametrize("numbers", [[0], [10], [3, 4, 7, 8], [9, 2, 2, 0, 10], list(range(11))])
def test_records_come_back_by_number(
    make: Callable[[Path], Records], numbers: list[int], tmp_path: Path
) -> None:
    records = make(tmp_path)
    windows_B = np.array(numbers, np.int64)
    records.expect(windows_B)
    found = records.read(windows_B)
    assert found.dtype == torch.uint8
    assert torch.equal(found, CONTENT[numbers])
    records.expect(np.empty(0, np.int64))
    found.zero_()  # a copy: what is kept stays
    assert torch.equal(records.read(windows_B), CONTENT[numbers])
    records.close()


def test_places_beyond_32_bits(tmp_path: Path) -> None:
    """In a shard of more than 4 GiB: a file with a hole, which takes no room on the disk."""
    last = 2**29 + 5
    layout = Layout(num_windows=last + 1, record_bytes=8, forward_windows=1, shard_windows=last + 1)
    with shard_path(tmp_path, 0).open("wb") as stream:
        stream.seek(8 * last)
        stream.write(b"the last")
    records = FileRecords(tmp_path, layout, device=CPU)
    windows_B = np.array([last, 5, last], np.int64)
    records.expect(windows_B)
    assert bytes(records.read(windows_B).flatten().tolist()) == b"the last" + bytes(8) + b"the last"


def test_closing_gives_the_cards_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a card, of which torch would keep what the control's first tensors do not take."""
    records = in_memory(tmp_path)
    assert isinstance(records, MemoryRecords)
    words, given_back = weakref.ref(records._words_MW), list[bool]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(words() is None))
    records.place = torch.device("cuda")
    records.close()
    assert given_back == [True]


def test_closing_unmaps_the_files(tmp_path: Path) -> None:
    records = in_files(tmp_path)
    records.read(np.arange(11))
    assert "shard-00002.bin" in Path("/proc/self/maps").read_text()
    records.close()
    assert "shard-00002.bin" not in Path("/proc/self/maps").read_text()
