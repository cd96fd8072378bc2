"""What srun tells a task enters; the environment that torch and DeepSpeed read leaves.

`srun python launcher/run.py …` starts a rank a task, as `deepspeed --launcher slurm` does. Neither
sets what a launcher sets. Only a step of several tasks is a world: a script that sbatch started
is told of the tasks of the whole allocation, but not of a step (`SLURM_STEP_…`).
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from babyllama_ds.errors import MachineError

FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Ports that jobs meet at, below those that Linux gives away by itself (from 32768 on)."""


def describe_task(environment: MutableMapping[str, str] | None = None) -> None:
    """Add RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, of a task of srun.

    Nothing where a launcher has done so, or without srun. Idempotent.

    Raises:
        MachineError: srun's description cannot be read.
    """
    told = os.environ if environment is None else environment
    num_tasks = told.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in told or num_tasks == "1":
        return
    try:
        found = {
            "RANK": told["SLURM_PROCID"],
            "WORLD_SIZE": num_tasks,
            "LOCAL_RANK": told["SLURM_LOCALID"],
            "LOCAL_SIZE": str(
                tasks_by_node(told["SLURM_STEP_TASKS_PER_NODE"])[int(told["SLURM_NODEID"])]
            ),
            "MASTER_ADDR": told.get("MASTER_ADDR") or first_host(told["SLURM_STEP_NODELIST"]),
            # The same number for all tasks, and another for the next job.
            "MASTER_PORT": told.get("MASTER_PORT")
            or str(FIRST_PORT + int(told["SLURM_JOB_ID"]) % NUM_PORTS),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise MachineError.of(
            "srun",
            got=f"a task whose environment cannot be read ({type(error).__name__}: {error})",
            expected="SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, SLURM_JOB_ID, "
            "SLURM_STEP_TASKS_PER_NODE and SLURM_STEP_NODELIST, as srun sets them",
            hint="set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT instead",
        ) from None
    told.update(found)


def tasks_by_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` is 2, 2, 2, 1. Raises `ValueError`."""
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{text!r} is no list of tasks")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(text: str) -> str:
    """Of Slurm's list of hosts: `gpu[007-009,12]-ib,login` begins with `gpu007-ib`.

    Raises `ValueError`.
    """
    found = re.match(r"((?:[^,\[\]]|\[[^\[\]]*\])+)(?:,|$)", text)
    if found is None:
        raise ValueError(f"{text!r} is no list of hosts")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[1])
