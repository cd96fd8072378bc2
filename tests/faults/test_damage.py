"""What an earlier start made, damaged since on its disk: named before anything learns from it.

One rank, in this process.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from babyllama_ds.errors import RunError
from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.loading import load_job

pytestmark = pytest.mark.usefixtures("process_as_it_was")

MODEL = {
    "kind": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 24,
}
TRAINING = {
    "batch_windows": 8,
    "epochs": 1.0,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "evaluate_windows": 8,
}
PARTS = (
    "tokenizer/tokenizer.json",
    "tokens/train-00000.bin",
    "teachers/one/model.safetensors",
    "student/model.safetensors",
)


@contextmanager
def one_bit_flipped(path: Path) -> Iterator[None]:
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) * 2 // 3] ^= 1
    path.write_bytes(damaged)
    yield
    path.write_bytes(whole)


def test_one_wrong_bit_in_what_was_made_before(
    tmp_path: Path, tiny_job: Callable[..., Path]
) -> None:
    job = tiny_job(
        tmp_path / "job",
        teachers=[{"name": "one", "model": MODEL, "training": TRAINING}],
        student={"model": MODEL, "training": TRAINING},
        control=None,
        evaluation={"dev_windows": 8},
    )

    def start(name: str) -> Path:
        return run_job(load_job(job, [f"name={name}"]), runs=tmp_path / "runs")

    run = start("first")
    for part in PARTS:
        shared = not part.startswith("student/")
        with one_bit_flipped(run / part):
            for name in ("first", "second") if shared else ("first",):
                with pytest.raises(RunError) as caught:
                    start(name)
                (problem,) = caught.value.problems
                assert problem.where == str((run / part).resolve()), part
                assert problem.got.startswith("SHA-256 "), part
                assert "made anew" in (problem.hint or "")
    teacher = (run / PARTS[2]).resolve()
    whole = teacher.read_bytes()
    shutil.rmtree(teacher.parent)  # as the hint says
    assert start("second").is_dir()
    assert teacher.read_bytes() == whole
