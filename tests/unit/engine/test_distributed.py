"""Which device, how many threads, and a process group with or without the launcher."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.joining import Joined, World
from babyllama_ds.errors import MachineError, NoRoomError, Stopped

LAUNCHER_WORDS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    for name in (*LAUNCHER_WORDS, *others):
        # Set first: so that it is restored after the test even where it was not set before.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def pretend_cards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


# -- the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "cards", "local_ranks", "expected"),
    [
        ("cpu", 0, 2, "cpu"),
        ("cpu", 8, 2, "cpu"),
        ("auto", 0, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("cuda", 1, 1, "cuda"),
        ("cuda", 8, 2, "cuda"),
    ],
)
def test_device(
    requested: str,
    cards: int,
    local_ranks: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_cards(monkeypatch, cards)
    monkeypatch.setenv("LOCAL_SIZE", str(local_ranks))
    assert distributed.resolve_device(requested) == expected


@pytest.mark.parametrize(
    ("device", "precision", "capability", "right"),
    [
        ("cuda", "bf16", (8, 0), True),
        ("cuda", "bf16", (7, 5), False),
        ("cuda", "fp32", (7, 5), True),
        ("cpu", "bf16", (7, 5), True),
    ],
)
def test_a_card_without_bf16_is_refused(
    device: Any,
    precision: Any,
    capability: tuple[int, int],
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if right:
        distributed.check_precision(device, precision)
        return
    with pytest.raises(MachineError) as caught:
        distributed.check_precision(device, precision)
    assert str(caught.value) == (
        "deepspeed.config: got bf16, and a card of compute capability 7.5, which has none, "
        "expected a card of compute capability 8.0 or newer\n"
        "    hint: use such a card, or run on the CPU (deepspeed.device=cpu)"
    )


def test_auto_honours_the_accelerator_that_deepspeed_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_cards(monkeypatch, 8)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert distributed.resolve_device("auto") == "cpu"
    assert distributed.resolve_device("cuda") == "cuda"


@pytest.mark.parametrize(
    ("requested", "cards", "local_ranks"),
    [("cuda", 0, 1), ("cuda", 1, 2), ("auto", 1, 2)],
)
def test_too_few_cards_are_refused(
    requested: str, cards: int, local_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cards(monkeypatch, cards)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    with pytest.raises(MachineError) as caught:
        distributed.resolve_device(requested)
    (problem,) = caught.value.problems
    assert problem.where == "deepspeed.device"
    assert (
        problem.got
        == f"{cards} CUDA devices for {local_ranks} ranks on host {socket.gethostname()}"
    )
    assert "deepspeed.device=cpu" in (problem.hint or "")


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, 5),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "5"}, 1),
        ({"LOCAL_SIZE": "16"}, 1),
        ({"OMP_NUM_THREADS": "3", "LOCAL_SIZE": "2"}, 3),
        ({"OMP_NUM_THREADS": "0"}, 1),
        ({"OMP_NUM_THREADS": ""}, 5),
        ({"OMP_NUM_THREADS": "2, 4"}, 2),
    ],
)
def test_ranks_share_the_cores(
    words: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert distributed.threads_per_rank() == expected


def test_threads_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    with pytest.raises(MachineError, match="OMP_NUM_THREADS: got 'all'"):
        distributed.threads_per_rank()


# -- the process group -----------------------------------------------------------------------------


def test_alone_there_is_a_world_of_one_as_often_as_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with what DeepSpeed remembers of the world before."""
    from deepspeed.utils import groups

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for _ in range(2):
        assert distributed.start("cpu") == torch.device("cpu")
        assert distributed.start("cpu") == torch.device("cpu")  # joined already
        assert (ranks.rank(), ranks.world_size()) == (0, 1)
        assert dist.get_backend() == "gloo"
        assert torch.get_num_threads() == 1
        assert gc.get_freeze_count() > 0
        assert dist.get_global_rank(groups._get_data_parallel_group(), 0) == 0
        distributed.stop()
        assert not dist.is_initialized()
        assert gc.get_freeze_count() == 0
        distributed.stop()


def test_the_launchers_description_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    distributed._describe_lone_rank()
    assert os.environ["RANK"] == "3"
    assert os.environ["MASTER_PORT"] == "29500"
    assert "WORLD_SIZE" not in os.environ


SHARED_MEMORY_OP = """
import deepspeed
assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], "nothing to skip on this system"
from babyllama_ds.engine import distributed
import torch.distributed as dist
distributed.start("cpu")
assert not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
dist.all_reduce(__import__("torch").ones(3))
distributed.stop()
"""


def test_the_shared_memory_operator_is_not_built(tmp_path: Path) -> None:
    """It would need g++; two ranks without one are in `test_training`."""
    (tmp_path / "bin").mkdir()
    assert shutil.which("g++", path=str(tmp_path / "bin")) is None
    ours = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": str(tmp_path / "bin"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"),
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARED_MEMORY_OP],
        env=os.environ | ours,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "built").exists()


# -- several nodes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, "eth7"])
def test_gloo_takes_the_interface_that_leads_to_rank_0(
    named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", named or "")
    if named is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    world = World(rank=1, size=2, address="127.0.0.1", port=29500)
    distributed._choose_interface(Joined(world=world, members=(), store=None, links={}))
    assert os.environ["GLOO_SOCKET_IFNAME"] == (named or "lo")


UNCONNECTED = """
import os, time
os.environ["RANK"] = "3"
from babyllama_ds.engine import distributed
with distributed._connecting_within(0.2):
    time.sleep(30)  # as torch does, for half an hour
"""


def test_ranks_that_met_but_cannot_connect_end_in_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCONNECTED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no connection to the other ranks within 0.2 s, though all have come" in done.stderr
    assert "GLOO_SOCKET_IFNAME" in done.stderr


class Watch:
    """A watch that only notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[BaseException] = []

    def failed(self, error: BaseException) -> None:
        self.heard.append(error)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA error"), True),
        (KeyError("x"), True),
        (MachineError.of("a", got="b", expected="c"), False),
        (NoRoomError.of("a", got="b", expected="c"), True),
        (Stopped("SIGTERM"), False),
        (ranks.RemoteError(1, "KeyError", "x"), False),
    ],
)
def test_what_one_rank_fails_with_alone_is_told(
    error: Exception, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    monkeypatch.setattr(distributed, "_watch", watch)
    with pytest.raises(type(error)), distributed.failures_told():
        raise error
    assert watch.heard == ([error] if told else [])
