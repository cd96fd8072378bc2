"""Joining the other ranks: the launcher's environment enters, a process group leaves."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from babyllama_ds import ranks
from babyllama_ds.engine.joining import Facts, Joined, join
from babyllama_ds.engine.quirks import (
    ask_torch_for_free_memory,
    leave_out_deepspeeds_muon,
    quiet_known_noise,
    skip_looks_at_windows,
    skip_shared_memory_op,
)
from babyllama_ds.engine.tensor_parallel import forget_groups
from babyllama_ds.engine.watching import NodeWatch
from babyllama_ds.environment import compared_code, compared_hardware
from babyllama_ds.errors import EXIT_CODE, MachineError, MeetingError
from babyllama_ds.memory import keep_freed_memory

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]

BF16_CAPABILITY = 8
"""The least compute capability (major version) of a card with bf16 arithmetic."""

JOIN_TIMEOUT_S = 600.0
NODE_TIMEOUT_S = 300.0

# Of the world this process is in; none where all ranks are on one node.
_watch: NodeWatch | None = None


def resolve_device(requested: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device that every rank computes on.

    Raises:
        MachineError: CUDA is asked for by name and there is none, or too few cards.
    """
    # DeepSpeed's own variable may settle what `auto` leaves open; a named device overrides it.
    prefers_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if requested == "cpu" or (requested == "auto" and prefers_cpu):
        return "cpu"
    cards = torch.cuda.device_count()
    if cards < ranks.local_world_size():
        raise MachineError.of(
            "deepspeed.device",
            got=f"{cards} CUDA devices for {ranks.local_world_size()} ranks on host "
            f"{socket.gethostname()}",
            expected="a CUDA device for every rank",
            hint="start fewer ranks (NPROC, --num_gpus) or set deepspeed.device=cpu",
        )
    return "cuda"


def check_precision(device: Device, precision: Literal["bf16", "fp32"]) -> None:
    """This rank's device computes in that precision.

    Raises:
        MachineError: a card without bf16 arithmetic, which torch would emulate without a word.
    """
    if device != "cuda" or precision != "bf16":
        return
    major, minor = torch.cuda.get_device_capability()
    if major < BF16_CAPABILITY:
        raise MachineError.of(
            "deepspeed.config",
            got=f"bf16, and a card of compute capability {major}.{minor}, which has none",
            expected=f"a card of compute capability {BF16_CAPABILITY}.0 or newer",
            hint="use such a card, or run on the CPU (deepspeed.device=cpu)",
        )


def start(
    device: Device,
    *,
    same: Mapping[str, Any] | None = None,
    join_timeout_s: float = JOIN_TIMEOUT_S,
    node_timeout_s: float = NODE_TIMEOUT_S,
    while_waiting: Callable[[], None] = lambda: None,
) -> torch.device:
    """Join the process group that the launcher describes (alone if there is none).

    Returns this rank's device. Threads of CPU ranks are shared out, so that two ranks on two
    cores run one thread each instead of four between them. `same` is compared between ranks,
    beside versions and code. `while_waiting` is called while others are still to come, and may
    raise.

    Raises:
        MeetingError: not all ranks came within `join_timeout_s`, or they differ.
    """
    # Read at deepspeed's import: without it a CPU job on a machine with a GPU would start NCCL.
    os.environ["DS_ACCELERATOR"] = device
    _describe_lone_rank()
    import deepspeed

    skip_shared_memory_op()
    leave_out_deepspeeds_muon()
    skip_looks_at_windows()
    quiet_known_noise()
    if device == "cuda":
        ask_torch_for_free_memory()
        torch.cuda.set_device(ranks.local_rank())
    else:
        torch.set_num_threads(threads_per_rank())
        keep_freed_memory()
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        # A world of one has nobody to meet, and torchrun's agents have met already.
        if os.environ.get("WORLD_SIZE") != "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
            facts = Facts(
                same={"deepspeed.device": device, **compared_code(), **(same or {})},
                alike=compared_hardware(device) | {"threads per rank": torch.get_num_threads()},
            )
            _meet(
                backend,
                facts,
                join_timeout_s=join_timeout_s,
                node_timeout_s=node_timeout_s,
                while_waiting=while_waiting,
            )
        # Takes over the group that stands.
        deepspeed.init_distributed(dist_backend=backend)
    ranks.start_control_group()
    # What is imported stays: nobody need look through it for garbage, as each engine that is freed
    # does, and Python by itself between two steps.
    gc.freeze()
    return torch.device(device, ranks.local_rank()) if device == "cuda" else torch.device("cpu")


def stop() -> None:
    """Leave the process group; a later `start` in this process makes another."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None
    if dist.is_initialized():
        import deepspeed

        ranks.forget_control_group()
        forget_groups()
        # DeepSpeed's own: it also forgets the groups that it keeps of this world.
        deepspeed.comm.destroy_process_group()
        # Engines lie in reference cycles, which still hold groups and so gloo's threads.
        gc.collect()
    gc.unfreeze()


@contextmanager
def failures_told() -> Iterator[None]:
    """An error that is this rank's alone reaches the other nodes, which would wait for it.

    A gradient collective breaks off with an error of the network where another node's ranks have
    died: then the watch ends this process too, and says so.
    """
    try:
        yield
    except BaseException as error:
        if _watch is not None and not ranks.raised_by_all(error):
            _watch.failed(error)
        raise


def when_a_node_is_lost(tell: Callable[[str, dict[str, Any]], None]) -> None:
    """Have `tell(reason, facts)` called before this process ends because another node is gone."""
    if _watch is not None:
        _watch.tell = tell


def threads_per_rank() -> int:
    """This rank's share of the cores it may run on; `OMP_NUM_THREADS` overrides it, of several
    numbers (for parallelism within parallelism) the first.

    Raises:
        MachineError: that is no number.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not asked:
        return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size())
    first = asked.split(",")[0].strip()
    if not first.isdecimal():
        raise MachineError.of(
            "OMP_NUM_THREADS",
            got=repr(asked),
            expected="the number of threads of a rank",
            hint="unset it, and the ranks of a machine share its cores",
        )
    return max(1, int(first))


def _meet(
    backend: str,
    facts: Facts,
    *,
    join_timeout_s: float,
    node_timeout_s: float,
    while_waiting: Callable[[], None],
) -> None:
    """Make the process group of all ranks, and watch the other nodes from here on."""
    global _watch
    import deepspeed

    timeout: timedelta = deepspeed.constants.default_pg_timeout
    joined = join(
        facts, timeout_s=join_timeout_s, store_timeout=timeout, while_waiting=while_waiting
    )
    if joined.num_nodes > 1:
        _choose_interface(joined)
        _watch = NodeWatch(joined, timeout_s=node_timeout_s)
        _watch.start()
    else:
        for link in joined.links.values():
            link.close()
    with _connecting_within(join_timeout_s):
        dist.init_process_group(
            backend,
            store=joined.store,
            rank=joined.world.rank,
            world_size=joined.world.size,
            timeout=timeout,
            # As DeepSpeed does: NCCL then makes every later group out of this one.
            device_id=torch.device("cuda", ranks.local_rank()) if backend == "nccl" else None,
        )


def _choose_interface(joined: Joined) -> None:
    """Let gloo use the interface that leads to rank 0, where the environment names none.

    By itself it takes the address of this host's name, which on many systems is 127.0.1.1: no
    other host finds it there.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    world = joined.world
    family = socket.getaddrinfo(world.address, world.port)[0][0]
    if family != socket.AF_INET:
        return
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((world.address, world.port))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
                if socket.inet_ntoa(answer[20:24]) == own:
                    log.info("gloo uses the interface %s (%s)", name, own)
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


_SIOCGIFADDR = 0x8915


@contextmanager
def _connecting_within(limit_s: float) -> Iterator[None]:
    """End the process when ranks that have met do not reach each other for the collectives."""

    def end() -> None:
        problem = MeetingError.of(
            f"rank {os.environ['RANK']} of host {socket.gethostname()}",
            got=f"no connection to the other ranks within {limit_s:g} s, though all have come",
            expected="every rank to reach every other",
            hint="name the interface between the nodes: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
        )
        os.write(2, f"error: {problem}\n".encode())
        os._exit(EXIT_CODE)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _describe_lone_rank() -> None:
    """Give a process started without the launcher the environment of a world of one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in lone.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
