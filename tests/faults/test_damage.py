"""What an earlier start made, damaged or left behind since: named before anything learns from it.

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


def test_a_run_that_was_moved_without_its_store(
    begin: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is trained again unasked, and the run still counts as done."""
    run = begin("name=moved")
    store, elsewhere = run.parent / "store", run.parent / "elsewhere"
    link = (run / "teachers" / "one").readlink()
    weights = (run / "student" / "model.safetensors").read_bytes()
    store.rename(elsewhere)
    with pytest.raises(RunError) as caught:
        begin("name=moved")
    (problem,) = caught.value.problems
    assert problem.where == str(run / "teachers" / "one")
    assert problem.got == f"a link to {link}, which is not there"
    assert problem.expected == f"the teacher that this run trained, in {store}"
    assert "bring the store along" in (problem.hint or "")
    assert not store.exists()
    assert (run / "state.json").read_text().split() == ["{", '"status":', '"done"', "}"]
    elsewhere.rename(store)  # as the hint says
    begin("name=moved")
    assert (run / "student" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(store / "teachers")  # one entry of the store, as another hint says
    caplog.clear()
    begin("name=moved")
    assert f"teachers/one: a link to {link}, which is not there: it is made anew" in caplog.text
    assert (run / "student" / "model.safetensors").read_bytes() == weights
