"""Planned against measured memory: run by hand, prints the table of docs/plan.md.

    .venv/bin/python tests/benchmarks/plan_memory.py [CASE…] [--device cuda] [--out FILE]

Every case is a job of two steps a stage, run by the pipeline on one or two ranks, each rank a
process of its own. At the door of a stage the rank returns what its allocator keeps and resets
its high-water mark (`/proc/self/clear_refs`); behind it the mark, less what was resident before,
is the stage's peak. So imports and the corpus do not count, nor does what the stages before left.
About a minute of two idle cores and a gigabyte and a half for each case.

On a card the mark is that of torch's allocator, which the stage before has left and so has not to
give anything back for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from babyllama_ds.plan.planned import Question
from babyllama_ds.plan.planner import plan_job
from babyllama_ds.report.formatting import number, table
from babyllama_ds.spec.loading import load_job

MIB = 2**20
LIMIT_S = 900

CASES: dict[str, dict[str, Any]] = {
    "one rank": {"ranks": 1},
    "one rank, four micro-batches": {"ranks": 1, "micro_batch": 8},
    "two ranks": {"ranks": 2},
    "two ranks, two micro-batches": {"ranks": 2, "micro_batch": 8},
    "one rank, sdpa": {"ranks": 1, "attention": "sdpa"},
    "one rank, windows of 256": {"ranks": 1, "length": 256, "batch": 16},
}
SMALL = ({"hidden_size": 384, "num_layers": 8}, {"hidden_size": 252, "num_layers": 6})
MIDDLE = (
    {"hidden_size": 1024, "num_layers": 8, "num_heads": 8},
    {"hidden_size": 512, "num_layers": 16, "num_heads": 8},
)
CUDA_CASES: dict[str, dict[str, Any]] = {
    "small": {"ranks": 1},
    "student of 58 M": {"ranks": 1, "models": MIDDLE, "batch": 128, "micro_batch": 64},
    "published": {
        "ranks": 1,
        "models": (
            {"hidden_size": 1536, "num_layers": 24, "num_heads": 16},
            MIDDLE[1],
        ),
        "batch": 32,
        "micro_batch": 16,
    },
}
"""Teachers' and student's sizes; the largest has a GPT-2 of some 700 million parameters."""
REHEARSAL: dict[str, dict[str, Any]] = {
    "rehearsal": {"ranks": 1, "models": ({"hidden_size": 48, "num_layers": 1},) * 2, "batch": 4}
}
"""So small that its numbers mean nothing."""


def main() -> None:
    """Measure the cases named, or all, and print them beside their plans."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES | CUDA_CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the numbers there, too (JSON)")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        _run_rank(arguments.rank_of)
        return
    found: list[dict[str, Any]] = []
    known = {"cpu": CASES, "cuda": CUDA_CASES}[arguments.device]
    for name in arguments.cases or known:
        with tempfile.TemporaryDirectory() as folder:
            found += _measure(name, Path(folder), arguments.device, **{**known, **REHEARSAL}[name])
            print(table(HEADER, [_cells(row) for row in found[-4:]], left=2), flush=True)
    print(f"\n{table(HEADER, [_cells(row) for row in found], left=2)}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found), encoding="utf-8")


HEADER = ("case", "stage", "parameters", "peak at", "planned MiB", "measured MiB", "error %")


def _measure(
    name: str, folder: Path, device: str, *, ranks: int, **shape: Any
) -> list[dict[str, Any]]:
    _write_job(folder, device=device, **shape)
    measured = _run(folder, ranks, threads=1 if device == "cpu" else os.cpu_count() or 1)
    question = Question(ranks=(ranks,), runs=folder / "runs")
    plan = plan_job(load_job(folder / "job.yaml"), question)
    assert plan.corpus.source == "store", "the run left its shards"
    rows = []
    for stage in plan.work.stages:
        memory = plan.counts[0].memory[stage.name]
        rows.append(
            {
                "case": name,
                "stage": stage.name,
                "parameters": stage.sizes.params,
                "peak": memory.peak,
                "planned_bytes": memory.peak_bytes,
                "measured_bytes": measured[stage.name],
            }
        )
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    planned, found = row["planned_bytes"] / MIB, row["measured_bytes"] / MIB
    cells = [f"{row['parameters']:,}", row["peak"], number(planned, 0), number(found, 0)]
    error = number(100 * (planned / found - 1), 1, sign=True)
    return [row["case"], row["stage"], *cells, error]


# -- the job ---------------------------------------------------------------------------------------


def _write_job(
    folder: Path,
    *,
    micro_batch: int | None = None,
    attention: str = "auto",
    length: int = 128,
    batch: int = 32,
    device: str = "cpu",
    models: tuple[dict[str, Any], dict[str, Any]] = SMALL,
) -> None:
    _write_text(folder / "made_up.train", words=60_000, seed=1)
    _write_text(folder / "made_up.dev", words=15_000, seed=2)
    training = {
        "batch_windows": batch,
        "micro_batch": micro_batch,
        "epochs": 1,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "evaluate_windows": 8_192 // length,
        # On a card they are made in the host's memory, of which nothing is measured.
        **({} if device == "cpu" else {"checkpoint_every_steps": 1_000}),
    }
    teacher, student = models
    common = {"num_heads": 6, "max_positions": 256, "attention": attention}
    job = {
        "name": "memory",
        "corpus": {
            "kind": "files",
            "train": [str(folder / "*.train")],
            "split": {"kind": "held_out", "dev": [str(folder / "*.dev")]},
            "cleaning": "none",
        },
        "tokenizer": {"kind": "bpe", "vocab_size": 8_192},
        "windows": {"length": length},
        "teachers": [
            {
                "name": "gpt2",
                "model": {"kind": "gpt2", "dropout": 0.0} | common | teacher,
                "training": training,
            },
            {
                "name": "llama",
                "model": {"kind": "llama", "intermediate_size": 1_024} | common | teacher,
                "training": training,
            },
        ],
        "student": {
            "model": {"kind": "llama", "intermediate_size": 688} | common | student,
            "training": training,
        },
        "control": {},
        "deepspeed": {"device": device},
        "evaluation": {"dev_windows": 64},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(job))), encoding="utf-8")


def _write_text(path: Path, *, words: int, seed: int) -> None:
    """Made-up words, enough different ones for eight thousand merges."""
    draw = random.Random(seed)
    letters = random.Random(0)
    known = ["".join(letters.choices("abcdefghijklmnopqrstuvw", k=6)) for _ in range(6_000)]
    lines = (" ".join(draw.choices(known, k=12)) for _ in range(words // 12))
    path.write_text("".join(f"{line}.\n" for line in lines), encoding="utf-8")


# -- one rank --------------------------------------------------------------------------------------


def _run(folder: Path, ranks: int, *, threads: int) -> dict[str, int]:
    """Run the job's ranks; the peaks of rank 0, in bytes by stage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
        environment = os.environ | {key: str(value) for key, value in (own | shared).items()}
        words = [sys.executable, __file__, "--rank-of", str(folder)]
        log = (folder / f"rank-{rank}.log").open("w")
        processes.append(
            subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        )
    try:
        codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        sys.exit((folder / "rank-0.log").read_text(encoding="utf-8"))
    peaks: dict[str, int] = json.loads((folder / "peaks.json").read_text(encoding="utf-8"))
    return peaks


def _run_rank(folder: Path) -> None:
    """The pipeline in this process, its stages measured; rank 0 leaves `peaks.json`."""
    import deepspeed  # noqa: F401 - its import is not what is measured

    from babyllama_ds.pipeline import Pipeline, run_job

    job = load_job(folder / "job.yaml")
    mark = _CardMark() if job.deepspeed.device == "cuda" else _HostMark()
    peaks: dict[str, int] = {}

    def measured(stage_of: Callable[..., str], method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Pipeline, *inputs: Any) -> Any:
            gc.collect()
            before = mark.reset()
            result = method(self, *inputs)
            peaks[stage_of(*inputs)] = mark.highest() - before
            return result

        return call

    doors: list[tuple[str, Callable[..., str]]] = [
        ("teacher", lambda spec, *_: f"teachers/{spec.name}"),
        ("student", lambda *_: "student"),
        ("control", lambda *_: "control"),
    ]
    for door, stage_of in doors:
        setattr(Pipeline, door, measured(stage_of, getattr(Pipeline, door)))
    run_job(job, runs=folder / "runs")
    if os.environ["RANK"] == "0":
        (folder / "peaks.json").write_text(json.dumps(peaks), encoding="utf-8")


class _HostMark:
    """The high-water mark of this process's memory."""

    def reset(self) -> int:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return before

    def highest(self) -> int:
        return _status_bytes("VmHWM")


class _CardMark:
    """That of this rank's card, as torch's allocator counts what tensors take."""

    def reset(self) -> int:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def highest(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()
