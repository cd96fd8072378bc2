"""What a real run leaves in its store, as `babyllama-ds store` finds it: killed, finished, removed.

One rank. The first start is a process that is killed in a teacher's training; the rest is made in
this process.
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import cli
from babyllama_ds.inventory.entries import KINDS
from babyllama_ds.pipeline import run_job
from babyllama_ds.spec.loading import load_job

pytestmark = pytest.mark.usefixtures("process_as_it_was")

LONG = (
    "teachers.0.training.epochs=1000",
    "teachers.0.training.max_steps=300",
    "teachers.0.training.checkpoint_every_steps=40",
    "windows.offsets=fixed",
    "distillation.cache=hidden",
    "distillation.cache_tier=disk",
)


def test_from_a_death_to_the_removal_of_the_run(
    tmp_path: Path,
    smallest_job: Callable[..., Path],
    start: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    job, runs = smallest_job(tmp_path / "job"), tmp_path / "runs"
    run_dir, root = runs / "tiny-1", runs / "store"

    def ask(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(["store", "--runs", str(runs), *words]) == 0
        return capsys.readouterr().out

    def there() -> dict[str, bytes]:
        files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {str(path.relative_to(root)): path.read_bytes() for path in files}

    # While a process trains the teacher, and when it is dead, nothing may go.
    program = Path(sys.executable).parent / "babyllama-ds"
    dying = start([[program, "run", job, "--runs", runs, *LONG]])
    dying.wait_until(lambda: any(root.glob("teachers/.building-*/step-*")), "a checkpoint")
    dying.signal_all(signal.SIGSTOP)
    out = ask()
    assert re.search(r"  unfinished, step \d+0, in use by pid \d+ .* teachers/one +tiny-1\n", out)
    before = there()
    assert ask("--remove-unused") == "freed: nothing\n"
    dying.kill()
    dying.end()
    assert "in use" not in ask()
    assert "unused" not in ask()
    assert ask("--remove-unused") == "freed: nothing\n"
    assert there() == before

    # Of the finished run nothing but its cache.
    run = load_job(job, list(LONG))
    run_job(run, runs=runs)
    out = ask()
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")][1:]
    assert sorted(row[0] for row in rows) == [
        "evaluations",
        "evaluations",
        "teacher_cache",
        "teachers",
        "tokenizers",
        "tokens",
    ]
    assert {path.name for path in root.iterdir()} <= set(KINDS)
    assert [row[0] for row in rows if row[-1] == "unused"] == ["teacher_cache"]
    assert all(row[-1] in ("unused", "tiny-1") for row in rows)
    before = there()
    assert "removed teacher_cache" in ask("--remove-unused")
    kept = {name: data for name, data in before.items() if not name.startswith("teacher_cache")}
    assert there() == kept
    assert len(kept) < len(before)

    # The run does without, until it makes its student again; then it is what it was.
    weights = (run_dir / "student" / "model.safetensors").read_bytes()
    run_job(run, runs=runs)
    assert there() == kept
    shutil.rmtree(run_dir / "student")
    run_job(run, runs=runs)
    assert (run_dir / "student" / "model.safetensors").read_bytes() == weights
    assert "teacher_cache" in ask()

    shutil.rmtree(run_dir)
    assert all("unused" in line for line in ask().splitlines()[2 : len(rows) + 2])
    ask("--remove-unused")
    assert there() == {}
