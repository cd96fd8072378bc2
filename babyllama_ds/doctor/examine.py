"""All checks: a directory for runs and a device enter; findings in the table's order leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from babyllama_ds.doctor.attention import attention
from babyllama_ds.doctor.devices import bf16, devices, host, loss_kernel, shared_memory
from babyllama_ds.doctor.disk import disk
from babyllama_ds.doctor.findings import Finding
from babyllama_ds.doctor.hosts import hosts, read_hostfile
from babyllama_ds.doctor.sharing import sharing
from babyllama_ds.doctor.versions import versions
from babyllama_ds.doctor.world import Started, worlds
from babyllama_ds.doctor.zero2 import not_compiled, zero2
from babyllama_ds.engine.compiling import what_compiling_lacks
from babyllama_ds.engine.distributed import Device
from babyllama_ds.engine.quirks import quiet_known_noise


def examine(
    runs: Path,
    device: Device,
    *,
    compiled: bool,
    hostfile: Path | None = None,
    ssh_port: int | None = None,
) -> list[Finding]:
    """Try everything out. The ranks work while this process does the checks that need none.

    `compiled` asks for the proof of torch.compile too, where there is a compiler; `hostfile` for a
    look at the hosts that it names.

    Raises:
        MachineError: the hostfile cannot be read.
    """
    quiet_known_noise()
    slots = None if hostfile is None else read_hostfile(hostfile)
    found = [*versions(), *devices(device), *shared_memory(device), *disk(runs)]
    if slots is not None:
        of_hosts = hosts(slots, device, ssh_port=ssh_port)
        found += of_hosts
        if all(finding.status != "failure" for finding in of_hosts):
            found += sharing(runs, list(slots), ssh_port=ssh_port)
    lacking = what_compiling_lacks(device) if compiled else None
    compiled = compiled and lacking is None
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        started = [
            stack.enter_context(Started(world, compiled=compiled)) for world in worlds(device)
        ]
        found += [*bf16(device), *attention(device), *loss_kernel(device)]
        for each in started:
            found += zero2(each, compiled=compiled)
    return found if compiled else [*found, not_compiled(lacking)]


def glance(runs: Path, device: Device) -> list[Finding]:
    """What is seen in passing, beside a job that runs: no card is touched, nothing computed."""
    return [*versions(), host(), *shared_memory(device), *disk(runs, quick=True)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads than cores, beside the ranks, would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
