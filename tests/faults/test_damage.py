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

pytestmark = pytest.mark.usefixtures("process_as_it_was")

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


def test_one_wrong_bit_in_what_was_made_before(begin: Callable[..., Path]) -> None:
    run = begin("name=first")
    for part in PARTS:
        shared = not part.startswith("student/")
        with one_bit_flipped(run / part):
            for name in ("first", "second") if shared else ("first",):
                with pytest.raises(RunError) as caught:
                    begin(f"name={name}")
                (problem,) = caught.value.problems
                assert problem.where == str((run / part).resolve()), part
                assert problem.got.startswith("SHA-256 "), part
                assert "made anew" in (problem.hint or "")
    teacher = (run / PARTS[2]).resolve()
    whole = teacher.read_bytes()
    shutil.rmtree(teacher.parent)  # as the hint says
    assert begin("name=second").is_dir()
    assert teacher.read_bytes() == whole
