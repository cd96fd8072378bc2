"""What is remembered: teachers that are not loaded yet, and the windows that they will see.

Enters: what the pipeline knows of them. Leaves: states of numbered windows, for `hidden` and
`topk`.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babyllama_ds import ranks
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.errors import ModelError
from babyllama_ds.models.documents import Pieces
from babyllama_ds.teachers.cache.key import hidden_key


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One teacher of the job, not loaded yet."""

    name: str
    weight: float
    model_dir: Path
    attention: str
    """The kernel that it is loaded with."""
    load: Callable[[], FrozenModel]
    tensor_parallel: int = 1
    """Ranks that it is split over: they run it together, all at once."""


@dataclass(frozen=True, kw_only=True)
class TeacherInput:
    """What all teachers see, and how."""

    windows: TrainWindows
    tokens_dir: Path
    """The entry of the store that the windows are cut from."""
    vocab_size: int
    dtype: torch.dtype
    """The teachers' dtype."""
    forward_windows: int
    """The micro-batch that the student will ask for: computed in the same shape, targets are those
    of live teachers to the bit."""

    @property
    def num_windows(self) -> int:
        """Windows that differ."""
        number = self.windows.num_distinct
        assert number is not None, "the spec refuses a cache of random windows"
        return number

    def key(self, teacher: Teacher) -> str:
        """The key of the teacher's states of these windows."""
        return hidden_key(
            self.tokens_dir,
            self.windows,
            teacher.model_dir,
            dtype=self.dtype,
            attention=teacher.attention,
            tensor_parallel=teacher.tensor_parallel,
        )


@contextmanager
def lent(teachers: Sequence[Teacher]) -> Iterator[Callable[[], list[FrozenModel]]]:
    """The frozen teachers, loaded when they are first asked for; freed at the end."""
    loaded: list[FrozenModel] = []

    def load() -> list[FrozenModel]:
        # One by one: a rank that has failed takes no part in the collectives of the next one.
        for teacher in teachers:
            loaded.append(ranks.on_every_rank(teacher.load))
        return loaded

    try:
        yield load
    finally:
        for model in loaded:
            model.destroy()
        loaded.clear()
        gc.collect()  # engines lie in reference cycles


def states_of(
    teacher: Teacher,
    model: FrozenModel,
    windows: TrainWindows,
    numbers: NDArray[np.int64],
    device: torch.device,
) -> Tensor:
    """Final hidden states [B, S, D] of windows by number.

    Raises:
        ModelError: they are not finite.
    """
    tokens_BS = torch.from_numpy(windows.numbered(numbers)).to(device)
    states_BSD = model.hidden_states(tokens_BS, pieces_of(windows, numbers, device))
    finite_B = states_BSD.isfinite().flatten(1).all(1).cpu().numpy()
    if not finite_B.all():
        raise not_finite("hidden states", teacher, numbers[~finite_B])
    return states_BSD


def pieces_of(
    windows: TrainWindows, numbers: NDArray[np.int64], device: torch.device
) -> Pieces | None:
    """The documents in windows by number, kept apart; none: windows are whole."""
    begins_BS = windows.numbered_begins(numbers)
    return None if begins_BS is None else Pieces.of(begins_BS, lambda tensor: tensor.to(device))


def not_finite(what: str, teacher: Teacher, numbers: NDArray[np.int64]) -> ModelError:
    """The error of a teacher whose `what` are infinite or NaN in windows by number."""
    return ModelError.of(
        f"teachers/{teacher.name}",
        got=f"{what} that are not finite, in windows {', '.join(map(str, numbers.tolist()))}",
        expected="finite numbers",
        hint=f"the weights of {teacher.name} are damaged, or its training had diverged: "
        "train it again, or leave it out",
    )
