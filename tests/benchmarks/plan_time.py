"""How well `plan --measure` foretells a run: a job enters; both times of one thread leave.

    python tests/benchmarks/plan_time.py JOB [KEY=VALUE …] [--seconds 30]

The clock of both is the CPU time of a process of one thread, which other programs do not change by
taking turns: what is compared is the reckoning, not the machine's mood. On a machine of one's own
it is the time that passes. Each has a folder of its own, so that a run does everything.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from babyllama_ds.spec.job import JobSpec

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Foretell, run, compare."""
    parser = argparse.ArgumentParser(description="Compare `plan --measure` with a run.")
    parser.add_argument("job")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--role", choices=("trial", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_intermixed_args()
    if words.role is not None:
        print(json.dumps(_trial(words) if words.role == "trial" else _run(words)))
        return
    with tempfile.TemporaryDirectory() as folder:
        said = {role: _child(words, role, Path(folder) / role) for role in ("trial", "run")}
    foretold, took = said["trial"]["seconds"], said["run"]["seconds"]
    print(json.dumps(said, indent=2))
    print(f"foretold {foretold:.1f} s, took {took:.1f} s of CPU: {foretold / took - 1:+.1%}")


def _child(words: argparse.Namespace, role: str, runs: Path) -> dict[str, object]:
    command = [sys.executable, __file__, words.job, *words.overrides, "--role", role]
    command += ["--runs", str(runs), "--seconds", str(words.seconds)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def _job(words: argparse.Namespace) -> JobSpec:
    from babyllama_ds.spec.loading import load_job
    from babyllama_ds.spec.shipped import find_job

    return load_job(find_job(words.job), [*words.overrides, "deepspeed.device=cpu"])


def _trial(words: argparse.Namespace) -> dict[str, object]:
    from babyllama_ds.pipeline.trial import try_job
    from babyllama_ds.plan.planned import Question
    from babyllama_ds.plan.planner import plan_job
    from babyllama_ds.plan.text import plan_as_json

    job = _job(words)
    time.perf_counter = time.process_time
    pace = try_job(job, runs=words.runs, seconds=words.seconds, began_s=time.process_time())
    planned = plan_job(job, Question(ranks=(1,), gpu="here", runs=words.runs, pace=pace))
    measured: dict[str, object] = plan_as_json(planned)["measured"]
    return measured


def _run(words: argparse.Namespace) -> dict[str, object]:
    from babyllama_ds.pipeline import run_job

    directory = run_job(_job(words), runs=words.runs)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    last = {line["stage"]: line["step"] for line in map(json.loads, lines)}
    return {"seconds": time.process_time(), "steps": last}


if __name__ == "__main__":
    main()
