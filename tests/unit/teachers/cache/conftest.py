"""A small teacher on disk, windows with phases, a store, and what a cache needs of its run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from babyllama_ds import files
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.models.build import load_model
from babyllama_ds.spec.corpus import Phases
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache.opening import CacheContext
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput

VOCAB, LENGTH, NUM_TOKENS = 61, 10, 405


def write_tokens(directory: Path, *, seed: int) -> Path:
    """Training tokens and a few development tokens, as an entry of the store holds them."""
    directory.mkdir()
    tokens = np.random.default_rng(seed).integers(0, VOCAB, NUM_TOKENS).astype("<u2")
    (directory / "train-00000.bin").write_bytes(tokens.tobytes())
    (directory / "dev-00000.bin").write_bytes(b"\0\0")
    files.write_manifest(directory, fingerprint=f"tokens {seed}")
    return directory


@pytest.fixture
def seen(tmp_path: Path) -> TeacherInput:
    """Two phases of 40 windows of 10 random tokens, in passes of 3."""
    return seen_in(write_tokens(tmp_path / "tokens", seed=1))


@pytest.fixture
def other_seen(tmp_path: Path) -> TeacherInput:
    """The same of another text."""
    return seen_in(write_tokens(tmp_path / "other tokens", seed=2))


def seen_in(tokens_dir: Path) -> TeacherInput:
    stream = np.fromfile(tokens_dir / "train-00000.bin", "<u2")
    index: dict[str, Any] = {"vocab_size": VOCAB, "splits": {"train": {}}}
    windows = TrainWindows(
        TokenShards(index, {"train": [stream]}), length=LENGTH, offsets=Phases(phases=2), seed=0
    )
    assert windows.num_windows == 40
    return TeacherInput(
        windows=windows,
        tokens_dir=tokens_dir,
        vocab_size=VOCAB,
        dtype=torch.bfloat16,
        forward_windows=3,
    )


@pytest.fixture
def teacher_of(
    alone: torch.device, tmp_path: Path, tiny_model: Callable[..., Any]
) -> Callable[..., Teacher]:
    """A teacher of a kind and a seed, saved in bf16."""

    def make(kind: str = "llama", *, seed: int = 0, weight: float = 1.0, **changes: Any) -> Teacher:
        directory = tmp_path / f"teacher-{kind}-{seed}"
        model = tiny_model(kind, seed=seed, **changes).to(torch.bfloat16)
        model.save_pretrained(directory)

        def load() -> FrozenModel:
            loaded = load_model(
                str(directory), attention="sdpa", where="test", dtype=torch.bfloat16
            )
            return FrozenModel(loaded, device=alone, dtype=torch.bfloat16)

        return Teacher(
            name=f"{kind}-{seed}", weight=weight, model_dir=directory, attention="sdpa", load=load
        )

    return make


@pytest.fixture
def context(tmp_path: Path) -> CacheContext:
    """Files on the disk, unless a test chooses another tier."""
    return CacheContext(
        store=Store(tmp_path / "store"),
        stop=StopRequest(),
        device=torch.device("cpu"),
        tier="disk",
        student_bytes=0,
    )


class Counted:
    """A teacher whose loading and windows are counted."""

    def __init__(self, teacher: Teacher) -> None:
        self.loads, self.passes = 0, 0
        self.teacher = replace(teacher, load=self._load)
        self._inner = teacher

    def _load(self) -> Any:
        self.loads += 1
        model = self._inner.load()
        hidden_states = model.hidden_states

        def counted(*inputs: Any) -> torch.Tensor:
            self.passes += 1
            return hidden_states(*inputs)

        model.hidden_states = counted  # type: ignore[method-assign]
        return model


@pytest.fixture
def counted() -> Callable[[Teacher], Counted]:
    """Count what a teacher is asked for."""
    return Counted
