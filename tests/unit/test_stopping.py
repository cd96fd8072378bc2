"""Signals and a dead launcher become a reason that ranks share. Processes and signals are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from babyllama_ds import ranks
from babyllama_ds.errors import Stopped
from babyllama_ds.stopping import StopRequest, stopped

LIMIT_S = 60


@pytest.fixture
def request_installed() -> Iterator[StopRequest]:
    stop = StopRequest()
    stop.install()
    yield stop
    stop.uninstall()


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# -- in this process ----------------------------------------------------------------------------


def test_nothing_is_requested_until_a_signal_comes(request_installed: StopRequest) -> None:
    assert request_installed.requested() is None
    assert request_installed.agreed() is None
    request_installed.check()


@pytest.mark.parametrize(
    ("number", "reason", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130)]
)
def test_signal_only_sets_the_flag(
    request_installed: StopRequest, number: signal.Signals, reason: str, code: int
) -> None:
    os.kill(os.getpid(), number)
    assert request_installed.requested() == reason
    assert request_installed.agreed() == reason
    with pytest.raises(Stopped) as caught:
        request_installed.check()
    assert (caught.value.reason, caught.value.exit_code) == (reason, code)


def test_reason_does_not_change_to_a_weaker_one(request_installed: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert request_installed.requested() == "SIGTERM"


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    stop = StopRequest()
    stop.install()
    stop.install()  # twice does not lose the first handlers
    assert signal.getsignal(signal.SIGTERM) != before[0]
    os.kill(os.getpid(), signal.SIGINT)
    stop.uninstall()
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before
    assert stop.requested() == "SIGINT"  # the request stands


def test_launcher_that_is_gone_counts_only_when_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watching, not_watching = StopRequest(watch_parent=True), StopRequest()
    assert watching.requested() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert watching.requested() == "launcher gone"
    assert not_watching.requested() is None
    with pytest.raises(Stopped) as caught:
        watching.check()
    assert caught.value.exit_code == 143


def test_signal_outweighs_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(watch_parent=True)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    stop.install()
    try:
        assert stop.requested() == "launcher gone"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() == "SIGINT"
    finally:
        stop.uninstall()


@pytest.mark.parametrize("known_elsewhere", [0, 1])
def test_signal_during_the_agreement_counts_at_the_next(
    monkeypatch: pytest.MonkeyPatch, known_elsewhere: int
) -> None:
    def interrupted(own: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)  # as if while this rank waits for the others
        return max(own, known_elsewhere)

    stop = StopRequest()
    stop.install()
    try:
        with monkeypatch.context() as during:
            during.setattr(ranks, "max_int", interrupted)
            # What the others know now; the signal is this rank's secret yet.
            assert stop.agreed() == (None, "launcher gone")[known_elsewhere]
        assert stop.requested() == "SIGTERM"
        assert stop.agreed() == "SIGTERM"
    finally:
        stop.uninstall()


@pytest.mark.parametrize(
    ("reason", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("launcher gone", 143)]
)
def test_exit_codes(reason: str, code: int) -> None:
    error = stopped(reason)
    assert (error.reason, error.exit_code) == (reason, code)


# -- in other processes -------------------------------------------------------------------------

STOPPABLE = """
import sys, time
from babyllama_ds.stopping import StopRequest

stop = StopRequest(watch_parent=True)
stop.install()
print("ready", flush=True)
deadline = time.monotonic() + 60
while (reason := stop.requested()) is None and time.monotonic() < deadline:
    time.sleep(0.05)
print(reason, flush=True)
sys.stdin.readline()
"""


def test_second_ctrl_c_kills() -> None:
    process = start(STOPPABLE)
    try:
        assert line(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert line(process) == "SIGINT"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=LIMIT_S) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.DEVNULL)
process.wait()
"""


def test_killed_launcher_is_noticed() -> None:
    launcher = start(LAUNCHER, STOPPABLE)
    try:
        assert line(launcher) == "ready"  # said by its child, on the same pipe
        launcher.kill()
        assert line(launcher) == "launcher gone"
    finally:
        launcher.kill()
        launcher.communicate(timeout=LIMIT_S)


COMMAND = """
import subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.DEVNULL)
process.wait()
"""
LATE = """
import os, time
from babyllama_ds.stopping import _parent_of

command = _parent_of(os.getppid())
print("importing", flush=True)
while (now := _parent_of(os.getppid())) == command:
    time.sleep(0.05)
print(now, flush=True)
"""


def test_a_command_that_ended_before_its_ranks_looked_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CROSS_SIZE", "1")
    as_launch = ("-c", COMMAND, "-c", LATE + STOPPABLE, "deepspeed.launcher.launch")
    command = start(COMMAND, *as_launch)
    try:
        assert line(command) == "importing"
        command.kill()
        if line(command) != "1":
            pytest.skip("another process than the first takes in orphans here")
        assert line(command) == "ready"
        assert line(command) == "launcher gone"
    finally:
        command.kill()
        command.communicate(timeout=LIMIT_S)


TWO_RANKS = """
import os, signal, sys
import torch.distributed as dist
from babyllama_ds.stopping import StopRequest

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
stop = StopRequest()
stop.install()
for step in range(1, 5):
    if step == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if step == 3 and rank == 0:
        os.kill(os.getpid(), signal.SIGINT)
    own = stop.requested()
    if (reason := stop.agreed()) is not None:
        print(step, own, reason, stop.requested(), flush=True)
        break
for step in range(2):
    stop = StopRequest()
    stop.install()
    if step == 1 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    print(stop.requested(), stop.agreed(), flush=True)
"""


def test_ranks_stop_at_the_same_step_for_the_same_reason(tmp_path: Path) -> None:
    processes = [start(TWO_RANKS, rank, tmp_path / "meet") for rank in range(2)]
    try:
        said = [process.communicate(timeout=LIMIT_S)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=LIMIT_S)
    assert said[0] == ["3 SIGINT SIGTERM SIGTERM", "None None", "None SIGTERM"]
    assert said[1] == ["3 SIGTERM SIGTERM SIGTERM", "None None", "SIGTERM SIGTERM"]
