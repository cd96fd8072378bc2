"""The lines of one text file, packed or not, streamed by `datasets` in bounded memory.

Enters: a path. Leaves: its lines as `rows` and `sources` read them.

A line ends at a line feed, a carriage return or both (Python's universal newlines, as in the
published code) and at nothing else; a byte order mark at the start of a file is no text.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets.packaged_modules.text.text import Text

from babyllama_ds.corpus.finding import packing_of

BLOCK_BYTES = 1 << 20


def stream_lines(path: Path, *, batch_lines: int = 1024) -> Iterator[list[str]]:
    """The lines of a file in batches, each line with its line break if it has one.

    `load_dataset("text", ...)` is a wrapper of the builder used here, and loses text or time in
    four ways. It sends a request to the hub, also for local files. It takes a path for a pattern,
    so that a folder called `a[1]` gives no rows and no error. It takes `::` in a path for a chain
    of protocols. It unpacks a `.train` file that starts like an archive (`BZh…`, `Rar!…`). So the
    builder gets a link with a harmless name. Its cache folder only ever holds an empty lock.
    """
    packing = packing_of(path)
    with tempfile.TemporaryDirectory(prefix="babyllama-ds-") as folder:
        link = Path(folder, f"text.txt.{packing}" if packing else "text.txt")
        link.symlink_to(path.resolve())
        # Arrow tables: a Python dictionary per line would take ten times as long.
        for table in _stream(link).iter(batch_size=batch_lines):
            yield table["text"].to_pylist()


def _stream(link: Path) -> Any:
    """The `datasets.IterableDataset` of a text file's lines, in Arrow format."""
    builder = Utf8Lines(
        cache_dir=str(link.parent),
        data_files=[str(link)],
        encoding="utf-8-sig",  # drops a byte order mark
        chunksize=BLOCK_BYTES,
    )
    return builder.as_streaming_dataset(split="train").with_format("arrow")


class Utf8Lines(Text):  # type: ignore[misc]
    """The library's text builder, which reads packed files in the machine's own encoding."""

    def _generate_tables(
        self,
        base_files: Any,  # noqa: ARG002 - the library's signature
        files_iterables: Any,
    ) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        for shard, files in enumerate(files_iterables):
            for file in files:
                # While streaming, `open` is the library's own, which unpacks.
                with (
                    open(file, "rb") as stream,  # noqa: PTH123
                    io.TextIOWrapper(stream, encoding=self.config.encoding) as text,
                ):
                    batch = 0
                    while block := text.read(self.config.chunksize):
                        lines = io.StringIO(block + text.readline()).readlines()
                        yield (shard, batch), pa.table({"text": pa.array(lines, pa.string())})
                        batch += 1
