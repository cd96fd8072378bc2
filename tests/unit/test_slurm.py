"""What srun says, read as a launcher's description of a rank."""

from __future__ import annotations

import pytest

from babyllama_ds.errors import MachineError
from babyllama_ds.slurm import describe_task, first_host, tasks_by_node

STEP = {
    "SLURM_JOB_ID": "70123",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-08],gpu11",
}


def test_a_task_is_a_rank() -> None:
    told = dict(STEP)
    describe_task(told)
    assert {key: value for key, value in told.items() if key not in STEP} == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20123",
    }


def test_what_the_script_chose_is_kept() -> None:
    told = {**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"}
    describe_task(told)
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.7", "4711")


@pytest.mark.parametrize(
    "told",
    [
        {},
        # A launcher inside a step, which starts ranks of its own.
        {**STEP, "RANK": "3", "WORLD_SIZE": "12"},
        # A shell in an allocation of four tasks, and a step of one.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_nothing_is_said_elsewhere(told: dict[str, str]) -> None:
    before = dict(told)
    describe_task(told)
    assert told == before


@pytest.mark.parametrize(
    "broken",
    [
        {"SLURM_STEP_TASKS_PER_NODE": "two"},
        {"SLURM_STEP_TASKS_PER_NODE": "2"},
        {"SLURM_STEP_NODELIST": ""},
    ],
)
def test_what_cannot_be_read_is_refused(broken: dict[str, str]) -> None:
    with pytest.raises(MachineError, match="srun: got a task whose environment cannot be read"):
        describe_task({**STEP, **broken})


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("4,8(x2)", [4, 8, 8])]
)
def test_tasks_by_node(text: str, counts: list[int]) -> None:
    assert tasks_by_node(text) == counts


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("localhost", "localhost"),
        ("a,b", "a"),
        ("gpu[007-009,12]", "gpu007"),
        ("gpu[3,5],x", "gpu3"),
        ("gpu[007-009,12]-ib,login", "gpu007-ib"),
        ("rack[1-2]node[01-16]", "rack1node01"),
    ],
)
def test_the_first_host(text: str, host: str) -> None:
    assert first_host(text) == host
