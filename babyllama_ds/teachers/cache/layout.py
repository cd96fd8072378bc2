"""How the records of all windows lie in shards, and a shard's file with its checksum.

A record is what the cache keeps of one window: a fixed number of bytes, whatever they mean. A
shard is the records of consecutive windows; its file is those bytes, then their SHA-256.

Enters: how many windows and how large a record is; records. Leaves: files that prove themselves
whole. `build` fills a directory with them, `records` reads them.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.files import FileFacts

LAYOUT_NAME = "layout.json"
SHARD_BYTES = 64 * 2**20
"""Size of a shard, about: what a kill in the middle costs, what is damaged by one wrong byte."""
LEAST_SHARDS = 16
"""Shards of a small cache, about, so that ranks share its building."""

_DIGEST_BYTES = 32
_BLOCK_BYTES = 2**20
_WORD_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shards of `num_windows` records; kept beside them, for whoever goes on to do it alike."""

    num_windows: int
    record_bytes: int
    """A multiple of 8."""
    forward_windows: int
    """Windows in one forward pass: rounding in bf16 depends on the shape of a batch."""
    shard_windows: int
    """A multiple of `forward_windows`; the last shard may be shorter."""

    @classmethod
    def choose(cls, *, num_windows: int, record_bytes: int, forward_windows: int) -> Layout:
        """Shards of about `SHARD_BYTES`, of whole forward passes."""
        most_passes = SHARD_BYTES // (record_bytes * forward_windows)
        passes = max(1, min(most_passes, num_windows // (LEAST_SHARDS * forward_windows)))
        return cls(
            num_windows=num_windows,
            record_bytes=record_bytes,
            forward_windows=forward_windows,
            shard_windows=passes * forward_windows,
        )

    @classmethod
    def read(cls, directory: Path) -> Layout | None:
        """The layout of a directory; none where nothing was begun."""
        path = directory / LAYOUT_NAME
        if not path.exists():
            return None
        try:
            return cls(**files.read_json(path))
        except TypeError as error:
            raise RunError.of(
                path,
                got="JSON of another shape",
                expected="the layout of a teacher cache",
                hint=f"delete the folder {directory} and start again: it is made anew",
            ) from error

    def write(self, directory: Path) -> None:
        """Keep it in `directory`."""
        files.write_json(directory / LAYOUT_NAME, asdict(self))

    @property
    def num_shards(self) -> int:
        """Files of the whole cache."""
        return -(-self.num_windows // self.shard_windows)

    @property
    def total_bytes(self) -> int:
        """Records of all windows."""
        return self.num_windows * self.record_bytes

    def windows(self, shard: int) -> NDArray[np.int64]:
        """The numbers of a shard's windows."""
        start = shard * self.shard_windows
        return np.arange(start, min(start + self.shard_windows, self.num_windows))

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard's records."""
        return len(self.windows(shard)) * self.record_bytes


def padded_bytes(content_bytes: int) -> int:
    """The size of a record with so much in it: whole words, so that records can be viewed."""
    return -(-content_bytes // _WORD_BYTES) * _WORD_BYTES


def shard_path(directory: Path, shard: int) -> Path:
    """Where a shard lies."""
    return directory / f"shard-{shard:05d}.bin"


def write_shard(directory: Path, shard: int, records: Tensor) -> FileFacts:
    """Write the records [n, record_bytes] (uint8, CPU) of a shard, whole or not at all.

    Raises:
        RunError: the disk refuses; its cause is the `OSError`.
    """
    content = records.numpy().tobytes()
    content += hashlib.sha256(content).digest()
    files.write_atomic(shard_path(directory, shard), content)
    return FileFacts(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def examine_shard(directory: Path, layout: Layout, shard: int) -> FileFacts | str | None:
    """What a manifest says of a whole shard; what is wrong with it; or none if it is not there.

    Reads every byte: a shard is used only if its checksum holds.
    """
    path = shard_path(directory, shard)
    expected = layout.shard_bytes(shard) + _DIGEST_BYTES
    try:
        size = path.stat().st_size
        if size != expected:
            return f"{size} bytes instead of {expected}"
        return _checked(path, expected)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)


def _checked(path: Path, size: int) -> FileFacts | str:
    digest, left = hashlib.sha256(), size - _DIGEST_BYTES
    with path.open("rb") as stream:
        while left and (block := stream.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
        found, kept = digest.digest(), stream.read()
    if left or found != kept:
        return "its checksum does not hold"
    digest.update(kept)
    return FileFacts(sha256=digest.hexdigest(), bytes=size)
