"""A job across two hosts, over ssh and without it: the student is that of two ranks on one machine,
whether or not a host dies, is cut off or loses the other on the way.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from babyllama_ds.errors import LOST_EXIT_CODE

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.nodes

STUDENT_STEPS = 90
SILENCE_S = 6
NOTICED_WITHIN_S = 60
"""Of a host that is gone: its silence, and the ends of processes, on cores that others use too."""
WORDS = (f"deepspeed.node_timeout_minutes={SILENCE_S / 60}",)
JOINING = "deepspeed.join_timeout_minutes={}"


@pytest.fixture(scope="session")
def job(tiny_job: Callable[..., Path]) -> Callable[..., Path]:
    """The tiny job with one teacher and no control: a student of enough steps to strike at."""

    def make(folder: Path) -> Path:
        path = tiny_job(folder, control=None)
        plain = yaml.safe_load(path.read_text())
        plain["teachers"] = plain["teachers"][1:]
        batch = {"batch_windows": 6}  # for two ranks, and for three
        plain["teachers"][0]["training"] |= batch | {"max_steps": 8}
        plain["student"]["milestones"] = plain["evaluation"]["milestones"] = None
        plain["student"]["training"] |= batch | {
            "max_steps": STUDENT_STEPS,
            "evaluate_every_steps": STUDENT_STEPS // 3,
            "checkpoint_every_steps": 10,
        }
        path.write_text(yaml.safe_dump(plain, sort_keys=False))
        return path

    return make


@pytest.fixture(scope="session")
def on_one_machine(once: Any, job: Callable[..., Path], start_ranks: Callable[..., Any]) -> Any:
    def make(scene: Any) -> list[Any]:
        return [start_ranks(job(scene.folder), "--runs", scene.runs).end()]

    scene = once("one_machine", make)
    scene.ended[0].assert_done()
    return scene


def student_of(scene: Any) -> bytes:
    return (scene.run_dir / "student" / "model.safetensors").read_bytes()


def state_of(scene: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((scene.run_dir / "state.json").read_text())
    return state


def steps_of(scene: Any, metrics: Callable[[Path], list[dict[str, Any]]]) -> int:
    lines = (line for line in metrics(scene.run_dir) if line["stage"] == "student")
    return max((line["step"] for line in lines), default=0)


def wait_for_end(running: Any) -> tuple[Any, float]:
    """How a launch ended, and how long it took from now."""
    start_s = time.monotonic()
    return running.end(), time.monotonic() - start_s


# -- undisturbed ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_ssh(once: Any, job: Callable[..., Path], start_without_ssh: Callable[..., Any]) -> Any:
    def make(scene: Any) -> list[Any]:
        words = (job(scene.folder), "--runs", scene.runs, *WORDS)
        return [one.end() for one in start_without_ssh(scene.folder, *words)]

    return once("without_ssh", make)


def test_a_job_on_two_hosts_gives_the_student_of_one(without_ssh: Any, on_one_machine: Any) -> None:
    for ended in without_ssh.ended:
        ended.assert_done()
    assert student_of(without_ssh) == student_of(on_one_machine)


def test_gloo_takes_the_interface_between_the_hosts(without_ssh: Any) -> None:
    """By a host's own name it would listen where no other host finds it."""
    assert "gloo uses the interface eth0 (10.77.0.1)" in without_ssh.ended[0].err


# -- struck ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def struck(
    once: Any,
    hosts: Any,
    job: Callable[..., Path],
    start_over_ssh: Callable[..., Any],
    start_without_ssh: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> Any:
    """host-b killed under ssh; host-b cut off, then host-a killed, without ssh; then in peace."""
    a, b = hosts

    def make(scene: Any) -> list[Any]:
        words = (job(scene.folder), "--runs", scene.runs, *WORDS)
        ended, facts = [], []

        def strike(running: Any, stroke: Callable[[], None], after: int, on: list[Any]) -> None:
            # What rank 0 logs is what the next steps are counted by.
            running.wait_until(lambda: steps_of(scene, metrics) >= after, f"step {after}")
            stroke()
            outcomes = [wait_for_end(one) for one in on]
            ended.extend(outcome for outcome, _ in outcomes)
            facts.append({"seconds": outcomes[0][1], "state": state_of(scene)})

        over_ssh = start_over_ssh(scene.folder, *words)
        strike(over_ssh, b.kill, 12, [over_ssh])
        b.boot()
        on_a, on_b = start_without_ssh(scene.folder, *words)
        strike(on_a, b.cut_off, 32, [on_a, on_b])
        b.reconnect()
        on_a, on_b = start_without_ssh(scene.folder, *words)
        strike(on_a, a.kill, 52, [on_b])
        a.boot()
        ended.append(start_over_ssh(scene.folder, *words).end())
        left = [host.processes("launcher/run.py") for host in hosts]
        (scene.folder / "facts.json").write_text(json.dumps({"strokes": facts, "left": left}))
        return ended

    return once("struck_nodes", make)


@pytest.fixture(scope="module")
def facts(struck: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((struck.folder / "facts.json").read_text())
    return found


def test_a_killed_host_ends_the_run_and_is_named(struck: Any, facts: dict[str, Any]) -> None:
    ended, stroke = struck.ended[0], facts["strokes"][0]
    assert ended.code != 0
    assert "host host-b (rank 1): got the connection broke off" in ended.err
    assert stroke["seconds"] < NOTICED_WITHIN_S
    assert stroke["state"]["status"] == "failed"
    assert "host-b" in stroke["state"]["error"]
    assert stroke["state"]["lost"] == [
        {"rank": 1, "host": "host-b", "node": "1", "pid": stroke["state"]["lost"][0]["pid"]}
    ]


def test_a_host_that_is_cut_off_ends_the_run_on_both_sides(
    struck: Any, facts: dict[str, Any]
) -> None:
    on_a, on_b = struck.ended[1:3]
    stroke = facts["strokes"][1]
    assert (on_a.code, on_b.code) == (LOST_EXIT_CODE, LOST_EXIT_CODE)
    assert f"host host-b (rank 1): got no answer for {SILENCE_S} s" in on_a.err
    assert f"host host-a (rank 0): got no answer for {SILENCE_S} s" in on_b.err
    assert SILENCE_S - 2 < stroke["seconds"] < NOTICED_WITHIN_S
    assert stroke["state"]["status"] == "failed"
    assert "cut off from host host-a" in stroke["state"]["error"]


def test_without_rank_0_the_others_end_too(struck: Any) -> None:
    on_b = struck.ended[3]
    assert on_b.code == LOST_EXIT_CODE
    assert "host host-a (rank 0): got the connection broke off" in on_b.err


def test_the_environment_file_arrives_over_ssh(struck: Any) -> None:
    """ssh alone passes nothing on; without it a rank would take both cores."""
    assert "threads per rank 1," in struck.ended[-1].err


def test_no_error_of_the_network_is_shown_raw(struck: Any) -> None:
    for ended in struck.ended:
        assert "Traceback" not in ended.err


def test_the_same_command_ends_with_the_same_student(
    struck: Any, on_one_machine: Any, facts: dict[str, Any]
) -> None:
    struck.ended[-1].assert_done()
    assert re.search(r"going on from .*step-0*(\d+)", struck.ended[-1].err)
    assert state_of(struck) == {"status": "done"}
    assert student_of(struck) == student_of(on_one_machine)
    assert facts["left"] == [[], []]


# -- what is wrong at the start -------------------------------------------------------------------


def test_a_node_that_does_not_come_is_named(
    tmp_path: Path, job: Callable[..., Path], start_without_ssh: Callable[..., Any]
) -> None:
    words = (job(tmp_path), "--runs", tmp_path / "runs", JOINING.format(0.2))
    (on_a,) = start_without_ssh(tmp_path, *words, nodes=[0])
    ended = on_a.end()
    assert ended.code == 2
    assert "got 1 of 2 ranks within 12 s: host host-a (rank 0); missing: rank 1" in ended.err
    assert not (tmp_path / "runs").exists()


def test_nodes_that_run_different_jobs_are_refused(
    tmp_path: Path, job: Callable[..., Path], start_without_ssh: Callable[..., Any]
) -> None:
    words = (job(tmp_path), "--runs", tmp_path / "runs")
    started = start_without_ssh(tmp_path, *words, words_of={1: ["seed=7"]})
    for running in started:
        ended = running.end()
        assert ended.code == 2
        assert "the job's seed: got 1 on host host-a (rank 0); 7 on host host-b (rank 1)" in (
            ended.err
        )
    assert not (tmp_path / "runs").exists()


def test_hosts_with_different_numbers_of_slots_train(
    tmp_path: Path,
    job: Callable[..., Path],
    start: Callable[..., Any],
    start_without_ssh: Callable[..., Any],
) -> None:
    """Every rank has the same share of the batch, wherever it runs."""
    path, folders = job(tmp_path), [tmp_path / "uneven", tmp_path / "alone"]
    words = ("student.training.max_steps=12",)
    slots = {"host-a": 2, "host-b": 1}
    for running in start_without_ssh(tmp_path, path, "--runs", folders[0], *words, slots=slots):
        running.end().assert_done()
    command = [BIN / "deepspeed", "--quiet", "--num_gpus", 3, "--master_port", free_port()]
    script = ["launcher/run.py", path, "--runs", folders[1], *words]
    start([[*command, *script]], limit_s=600.0).end().assert_done()
    uneven, alone = (
        (folder / "tiny-1" / "student" / "model.safetensors").read_bytes() for folder in folders
    )
    assert uneven == alone


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


LOOK = """
from pathlib import Path
from babyllama_ds.doctor.hosts import hosts, read_hostfile
for found in hosts(read_hostfile(Path("hostfile")), "cpu", ssh_port=None):
    print(found.check, found.status, found.found)
"""


def test_the_doctor_sees_who_can_be_reached(
    tmp_path: Path, hosts: Any, start: Callable[..., Any], hostfile: Callable[..., Path]
) -> None:
    a, b = hosts
    hostfile(tmp_path)

    def look() -> str:
        words = ["env", "-C", tmp_path, f"PYTHONPATH={ROOT}", sys.executable, "-c", LOOK]
        out: str = start([a.words(*words)]).end().out
        return out

    found = look()
    assert "host host-a ok" in found
    assert "host host-b ok host-b: 1 slots" in found
    b.cut_off()
    try:
        found = look()
    finally:
        b.reconnect()
    assert "host host-a ok" in found
    assert "host host-b failure not reached, or not ready: ssh ended with status 255" in found
