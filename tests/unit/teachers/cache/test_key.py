"""Other teachers, other data, another way to look at them: another key."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from babyllama_ds import files
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.spec.corpus import Offsets, Phases
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.cache import key as key_module
from babyllama_ds.teachers.cache.key import topk_key
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput

TWO_PHASES = Phases(phases=2)


def windows(*, length: int = 10, offsets: Offsets = TWO_PHASES, seed: int = 0) -> TrainWindows:
    shards = TokenShards({"vocab_size": 61, "splits": {}}, {"train": [np.zeros(405, "<u2")]})
    return TrainWindows(shards, length=length, offsets=offsets, seed=seed)


def flip_a_bit(directory: Path, name: str) -> None:
    path = directory / name
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    files.write_manifest(directory, fingerprint="of the changed")


@pytest.fixture
def teacher(teacher_of: Callable[..., Teacher]) -> Teacher:
    return teacher_of()


def test_what_decides_the_states_decides_the_key(
    seen: TeacherInput,
    teacher: Teacher,
    teacher_of: Callable[..., Teacher],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    keys = [
        seen.key(teacher),
        seen.key(teacher_of(seed=1)),
        seen.key(replace(teacher, attention="eager")),
        seen.key(replace(teacher, tensor_parallel=2)),
        seen.key(replace(teacher, tensor_parallel=4)),
        replace(seen, dtype=torch.float32).key(teacher),
        replace(seen, windows=windows(length=9)).key(teacher),
        replace(seen, windows=windows(offsets=Phases(phases=3))).key(teacher),
        replace(seen, windows=windows(offsets="fixed")).key(teacher),
    ]
    other = Path(shutil.copytree(seen.tokens_dir, tmp_path / "other"))
    flip_a_bit(other, "train-00000.bin")
    keys.append(replace(seen, tokens_dir=other).key(teacher))
    for token in (b"\1\0", b"\2\0"):  # in a second shard
        (other / "train-00001.bin").write_bytes(token)
        files.write_manifest(other, fingerprint="of more text")
        keys.append(replace(seen, tokens_dir=other).key(teacher))
    config = Path(shutil.copytree(teacher.model_dir, tmp_path / "config")) / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    keys.append(seen.key(replace(teacher, model_dir=config.parent)))
    monkeypatch.setattr(key_module, "FORMAT", 1000)
    keys.append(seen.key(teacher))
    for one, two in itertools.combinations(keys, 2):
        assert one != two


def test_what_does_not_is_no_part_of_it(
    seen: TeacherInput, teacher: Teacher, tmp_path: Path
) -> None:
    key = seen.key(teacher)
    assert seen.key(replace(teacher, name="other", weight=3.0)) == key
    assert replace(seen, forward_windows=8).key(teacher) == key
    assert replace(seen, windows=windows(seed=9)).key(teacher) == key  # a sweep over seeds
    moved = Path(shutil.copytree(teacher.model_dir, tmp_path / "moved"))
    assert seen.key(replace(teacher, model_dir=moved)) == key
    (seen.tokens_dir / "dev-00000.bin").write_bytes(b"\1\1")
    files.write_manifest(seen.tokens_dir, fingerprint="other development text")
    assert seen.key(teacher) == key


def test_what_decides_the_mixture_decides_the_key_of_the_top_k() -> None:
    def key(*members: tuple[str, float], vocab_size: int = 61, **loss: object) -> str:
        spec = DistillationSpec.model_validate({"cache": "topk", **loss})
        return topk_key(members, spec, vocab_size=vocab_size)

    ab = (("a", 1.0), ("b", 3.0))
    keys = [
        key(*ab),
        key(("a", 1.0), ("b", 1.0)),
        key(("a", 1.0)),
        key(("a", 1.0), ("c", 3.0)),
        key(*ab, temperature=1.0),
        key(*ab, mean_of="probabilities"),
        key(*ab, cache_top_k=8),
        key(*ab, vocab_size=60),
    ]
    for one, two in itertools.combinations(keys, 2):
        assert one != two
    # Only shares matter, and neither alpha nor the reduction is the targets'.
    assert key(("a", 2.0), ("b", 6.0)) == key(*ab)
    assert key(*ab, alpha=0.1, soft_reduction="token", cache_tier="disk") == key(*ab)
