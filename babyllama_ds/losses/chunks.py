"""Logits of one chunk of positions after another, so that no [N, V] ever exists.

The models' hidden states enter, for how many and of what type they are; slices of positions leave,
each with room for its logits and for the work on them.

Shapes: N positions (batch and time, flattened), C positions of a chunk, R of a tile (R ≤ C),
D hidden size (each model its own), V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from babyllama_ds.memory import available_host_bytes

log = logging.getLogger(__name__)

_CPU_CHUNK_BYTES = 16 * 2**20
_ACCELERATOR_CHUNK_BYTES = 64 * 2**20
"""Size of a model's [C, V] in bf16. More rows mean better matrix products, fewer passes over the
head's gradient and, on an accelerator, fewer kernel launches; fewer rows, less memory. It does not
follow the machine's caches, for the head's gradient is rounded chunk by chunk: the tiles do."""

_MEMORY_SHARE = 0.5
"""The part of the free memory that a chunk may take."""


@dataclass(frozen=True)
class Buffers:
    """Room for one chunk's logits, in the models' dtypes, and for the work on a tile of them.

    Used by every chunk: on a CPU, fresh memory of this size costs its page faults each time.
    """

    logits_CV: list[Tensor]
    work_RV: list[Tensor]

    def first(self, num_positions: int) -> Buffers:
        """The part for a chunk of so many positions."""
        return Buffers(
            [buffer[:num_positions] for buffer in self.logits_CV],
            self.work_RV,
        )


def chunks(
    models_ND: Sequence[Tensor],
    *,
    vocab_size: int,
    num_work: int,
    dtype: torch.dtype,
    chunk_tokens: int | None,
) -> Iterator[tuple[slice, Buffers]]:
    """The slices of positions, in order, each with room for logits of every model.

    `models_ND` are the models' hidden states, for their dtypes and their device; `num_work` work
    spaces of `dtype` come beside, with fewer rows where that keeps them in the cache.
    `chunk_tokens` None takes a size that suits the device; one that does not fit the memory is
    lowered, with a warning.
    """
    device = models_ND[0].device
    num_positions = models_ND[0].shape[0]
    position_bytes = vocab_size * sum(hidden_ND.element_size() for hidden_ND in models_ND)
    step = _fitting_chunk_tokens(
        chunk_tokens or default_chunk_tokens(vocab_size, device), position_bytes, device
    )
    shape = min(step, num_positions), vocab_size
    row_bytes = position_bytes + vocab_size * num_work * dtype.itemsize
    tile = min(_tile_rows(row_bytes, device) or step, step), vocab_size
    buffers = Buffers(
        [torch.empty(shape, dtype=hidden_ND.dtype, device=device) for hidden_ND in models_ND],
        [torch.empty(tile, dtype=dtype, device=device) for _ in range(num_work)],
    )
    for start in range(0, num_positions, step):
        rows = slice(start, min(start + step, num_positions))
        yield rows, buffers.first(rows.stop - rows.start)


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """As many positions as fit the chunk's size, in sixteens (matrix units work in tiles)."""
    size_bytes = _CPU_CHUNK_BYTES if device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    return max(16, size_bytes // (2 * vocab_size) // 16 * 16)


@functools.cache
def _fitting_chunk_tokens(chunk_tokens: int, position_bytes: int, device: torch.device) -> int:
    """So many positions, or as many as there is memory for; decided once, since it rounds."""
    free_bytes = _free_bytes(device)
    fitting = max(1, int(_MEMORY_SHARE * free_bytes) // position_bytes)
    if fitting < chunk_tokens:
        log.warning(
            "the loss takes chunks of %d tokens: %d would take %.1f GiB of logits, and %.1f GiB "
            "are free on %s",
            fitting,
            chunk_tokens,
            chunk_tokens * position_bytes / 2**30,
            free_bytes / 2**30,
            device,
        )
    return min(chunk_tokens, fitting)


def _free_bytes(device: torch.device) -> int:
    """What could still be allocated; without a way to know, no bound."""
    if device.type == "cuda":
        kept_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept_bytes
    try:
        return available_host_bytes()
    except OSError:
        return 2**62


def _tile_rows(row_bytes: int, device: torch.device) -> int | None:
    """Rows whose logits and work stay in the second-level caches; None where there are none.

    Elementwise operators take a quarter of the time there. Rows are independent: no number
    changes.
    """
    if device.type != "cpu":
        return None
    threads = torch.get_num_threads()
    return max(1, _second_level_cache_bytes() // row_bytes) * threads


@functools.cache
def _second_level_cache_bytes() -> int:
    """The second-level cache of one core; 1 MiB where the system does not tell."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    try:
        size = (caches / "index2" / "size").read_text().strip()
        return int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20
