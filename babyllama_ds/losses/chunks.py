"""Logits of one chunk of positions after another, so that no [N, V] ever exists.

Final hidden states and heads enter; slices of positions, each with room for its logits, and the
logits written into that room leave, for the losses.

Shapes: N positions (batch and time, flattened), C positions of a chunk, R of a tile (R ≤ C),
D hidden size (each model its own), V vocabulary, P rows of a head (P ≥ V, padded).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from babyllama_ds.losses.heads import Head
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
class TeacherStates:
    """A teacher's final hidden states on the student's positions, and the weight of its vote."""

    hidden_ND: Tensor
    head: Head
    weight: float = 1.0
    layers_ND: Mapping[int, Tensor] = field(default_factory=dict)
    """States of other layers, by number (`models.layers`), for their own term of the loss."""


@dataclass(frozen=True)
class Voter:
    """Teachers whose logits are only ever wanted summed, as one: one product makes the sum.

    Their states side by side, times their heads side by side. Of one teacher: the teacher.
    """

    teachers: tuple[TeacherStates, ...]
    head: Head

    @classmethod
    def of(cls, teachers: Sequence[TeacherStates], vocab_size: int) -> Voter:
        """The sum of these teachers; their heads are copied, in the vocabulary's rows."""
        if len(teachers) == 1:
            return cls(tuple(teachers), teachers[0].head)
        rows = [teacher.head.rows(vocab_size) for teacher in teachers]
        biases_V = [bias_V for _, bias_V in rows if bias_V is not None]
        return cls(
            tuple(teachers),
            Head(
                torch.cat([weight_VD for weight_VD, _ in rows], dim=1),
                torch.stack(biases_V).sum(0) if biases_V else None,
            ),
        )

    @property
    def hidden_ND(self) -> Tensor:  # noqa: N802 - named by its shape
        """The first teacher's states: the dtype and the device of all."""
        return self.teachers[0].hidden_ND

    def logits_into(
        self, buffer_CV: Tensor, rows: slice, unused_C1: Tensor | None = None
    ) -> Tensor:
        """Logits of these positions, written into the buffer; unused ones as of states of 0."""
        states_CD = torch.cat([teacher.hidden_ND[rows] for teacher in self.teachers], dim=1)
        if unused_C1 is not None:
            states_CD.masked_fill_(unused_C1, 0)
        return logits_into(buffer_CV, states_CD, self.head)


def votes_are_summed(mean_of: str, weights: Sequence[float]) -> bool:
    """Whether teachers of such votes are taken as one `Voter`, if their heads are plain.

    Equal votes only: others would have to be rounded into the states.
    """
    return mean_of == "logits" and len(weights) > 1 and len(set(weights)) == 1


def can_be_summed(teachers: Sequence[TeacherStates]) -> bool:
    """Whether one product makes the sum of their logits."""
    return len({teacher.hidden_ND.dtype for teacher in teachers}) == 1 and not any(
        teacher.head.states_are_logits for teacher in teachers
    )


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


def logits_into(buffer_CV: Tensor, hidden_CD: Tensor, head: Head) -> Tensor:
    """Logits of the vocabulary's rows of the head, written into the buffer."""
    vocab_size = buffer_CV.shape[1]
    weight_VD, bias_V = head.rows(vocab_size)
    if head.states_are_logits:
        return buffer_CV.copy_(hidden_CD[:, :vocab_size])
    if bias_V is None:
        return torch.mm(hidden_CD, weight_VD.T, out=buffer_CV)
    return torch.addmm(bias_V, hidden_CD, weight_VD.T, out=buffer_CV)
