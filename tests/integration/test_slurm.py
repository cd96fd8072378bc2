"""`launcher/slurm/distil.sbatch`, with stand-ins for Slurm's programs.

They do what those of Slurm 22.05 were seen to do: srun tells its tasks `SLURM_STEP_…`, kills them
at a SIGTERM of its own, and ends with the highest of their exit statuses; scancel signals the
tasks and not the script.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launcher" / "slurm" / "distil.sbatch"

SCONTROL = """#!/bin/sh
case "$1" in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""
SCANCEL = """#!/bin/sh
echo "$@" > "$CANCELLED"
kill -TERM $(cat "$TASKS")
"""
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
tasks = int(os.environ["SLURM_NTASKS"])
step = {{
    "SLURM_STEP_NUM_TASKS": str(tasks),
    "SLURM_STEP_TASKS_PER_NODE": str(tasks),
    "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
    "SLURM_NODEID": "0",
}}
started = []
signal.signal(signal.SIGTERM, lambda *_: [one.kill() for one in started])
for task in range(tasks):
    of_task = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}}
    started.append(subprocess.Popen(words, env={{**os.environ, **step, **of_task}}))
with open(os.environ["TASKS"], "w") as file:
    file.write(" ".join(str(one.pid) for one in started))
sys.exit(max(one.wait() for one in started))
"""


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, and programs that stand in for Slurm's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("scancel", SCANCEL), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RUNS": str(tmp_path / "runs"),
        "REQUEUED": str(tmp_path / "requeued"),
        "CANCELLED": str(tmp_path / "cancelled"),
        "TASKS": str(tmp_path / "tasks"),
        "MASTER_PORT": "0",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_PROCID": "0",
    }


def requeued(allocation: dict[str, str]) -> list[str]:
    path = Path(allocation["REQUEUED"])
    return path.read_text().split() if path.exists() else []


def run(
    allocation: dict[str, str], task: str, *words: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """The script, where every task is a Python program: its text."""
    python = Path(allocation["PATH"].partition(":")[0]) / "python"
    python.write_text(f"#!{sys.executable}\n{task}")
    python.chmod(0o755)
    return subprocess.run(
        [SCRIPT, *words],
        cwd=ROOT,
        # The batch script sets the threads where nobody has, as the tests may have here.
        env={
            **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
            **allocation,
            "PYTHON": str(python),
            **more,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (2, 0, False),  # the job is wrong: it would be wrong again
        (1, 0, False),
        (75, 0, True),  # a node was lost
        (75, 20, False),  # for the 21st time
        (143, 0, True),  # Slurm itself told the ranks to stop
        (143, 99, True),
    ],
)
def test_what_goes_back_into_the_queue(
    allocation: dict[str, str], code: int, restarts: int, again: bool
) -> None:
    done = run(allocation, f"raise SystemExit({code})", "job", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code, done.stderr
    assert requeued(allocation) == (["4711"] if again else [])


def test_tasks_get_the_words_and_the_threads(allocation: dict[str, str]) -> None:
    told = "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'])"
    more = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"} | {
        "SLURM_CPUS_PER_TASK": "5",
        "SLURM_NTASKS": "1",
    }
    done = run(allocation, told, "my job.yaml", "name=a b", **more)
    words = ["-u", "launcher/run.py", "my job.yaml", "name=a b", "seed=3", "--runs"]
    assert done.stdout.strip() == f"{[*words, allocation['RUNS']]} 5"


def test_a_task_of_an_array_names_itself_alone(allocation: dict[str, str]) -> None:
    """The number of its job may be that of the whole array."""
    more = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"}
    run(allocation, "raise SystemExit(75)", "job", **more)
    assert requeued(allocation) == ["4711_3"]


def test_without_a_job_it_says_how(allocation: dict[str, str]) -> None:
    done = run(allocation, "raise SystemExit(0)")
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


@pytest.mark.launch
def test_a_preempted_run_is_queued_again_and_goes_on(
    allocation: dict[str, str],
    tmp_path: Path,
    finished: Any,
    tiny_job: Callable[..., Path],
    start: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """`--signal=B:TERM@300` reaches the script alone."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        allocation["MASTER_PORT"] = str(probe.getsockname()[1])
    run_dir = tmp_path / "runs" / "tiny-1"
    command = [SCRIPT, tiny_job(tmp_path / "text")]
    running = start([command], [allocation])
    running.wait_until(
        lambda: any(line["stage"] == "student" for line in metrics(run_dir)), "a step of student"
    )
    os.kill(running.pid, signal.SIGTERM)
    ended = running.end()
    assert ended.code == 143
    assert requeued(allocation) == ["4711"]
    assert Path(allocation["CANCELLED"]).read_text() == "--signal=TERM 4711\n"
    state = json.loads((run_dir / "state.json").read_text())
    assert (state["status"], state["reason"]) == ("stopped", "SIGTERM")
    start([command], [{**allocation, "SLURM_RESTART_COUNT": "1"}]).end().assert_done()
    mine, theirs = (
        (folder / "student" / "model.safetensors").read_bytes()
        for folder in (run_dir, finished.run_dir)
    )
    assert mine == theirs
