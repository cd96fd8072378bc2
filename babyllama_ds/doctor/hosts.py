"""The hosts of a hostfile: its lines enter; what is wrong with reaching them, and on them, leaves.

Each is asked over ssh, as DeepSpeed's launcher will start ranks there: in this directory, by this
Python, which must be there at the same path.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from babyllama_ds.doctor.findings import Finding, failure, ok, warning
from babyllama_ds.doctor.ssh import told_over_ssh
from babyllama_ds.engine.distributed import Device
from babyllama_ds.environment import compared_code, compared_hardware
from babyllama_ds.errors import MachineError

ANSWER_LIMIT_S = 120
"""For a host to connect and import torch: from a shared file system, cold."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks a host, in the file's order, which is that of the nodes.

    Raises:
        MachineError: there is no such file (DeepSpeed would quietly run on this machine alone), or
            a line is not `NAME slots=N`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError.of(
            path,
            got=(getattr(error, "strerror", None) or str(error)).lower(),
            expected="a hostfile",
            hint="DeepSpeed would say nothing and run on this machine alone",
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if found is None or found[1] in slots:
            twice = found is not None
            raise MachineError.of(
                f"{path}:{number}",
                got=f"{found[1]} for the second time" if found is not None else repr(text),
                expected="every host once" if twice else "NAME slots=N, N ranks on host NAME",
            )
        slots[found[1]] = int(found[2])
    if not slots:
        raise MachineError.of(path, got="no host", expected="lines of NAME slots=N")
    return slots


def hosts(slots: Mapping[str, int], device: Device, *, ssh_port: int | None) -> list[Finding]:
    """Of each host whether it can be reached, has its slots, and runs what this one runs."""
    with ThreadPoolExecutor(min(64, len(slots))) as pool:
        answers = list(pool.map(lambda host: _ask(host, device, ssh_port), slots))
    found = [_slots(slots)]
    for (host, number), answer in zip(slots.items(), answers, strict=True):
        found += _of_host(host, number, answer, device)
    return found


def describe_host(device: Device) -> dict[str, Any]:
    """What a host says of itself (`python -m babyllama_ds.doctor.hosts`)."""
    return {
        "name": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "cards": torch.cuda.device_count() if device == "cuda" else 0,
        "same": compared_code(),
        "alike": compared_hardware(device),
    }


def _slots(slots: Mapping[str, int]) -> Finding:
    told = f"{sum(slots.values())} ranks on {len(slots)} hosts"
    if len(set(slots.values())) > 1:
        told += ", not as many on each: every rank has the same share of a batch"
    return ok("hostfile", told)


def _ask(host: str, device: Device, ssh_port: int | None) -> dict[str, Any] | str:
    """The host's description, or what ssh said instead."""
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    there = (
        f"cd {shlex.quote(str(Path.cwd()))} && PYTHONPATH={shlex.quote(path)} "
        f"{shlex.quote(sys.executable)} -m babyllama_ds.doctor.hosts {device}"
    )
    told = told_over_ssh(host, there, ssh_port, limit_s=ANSWER_LIMIT_S)
    if told.line is None:
        return told.problem
    try:
        answer: dict[str, Any] = json.loads(told.line)
    except ValueError:
        return f"an answer of another kind: {told.line}"
    return answer


def _of_host(
    host: str, slots: int, answer: dict[str, Any] | str, device: Device
) -> Iterator[Finding]:
    check = f"host {host}"
    if isinstance(answer, str):
        yield failure(
            check,
            f"not reached, or not ready: {answer}",
            remedy=f"`ssh {host} {sys.executable} --version` must work without a password",
        )
        return
    different = [
        f"{name} is {answer['same'].get(name)} there, {value} here"
        for name, value in compared_code().items()
        if answer["same"].get(name) != value
    ]
    if different:
        yield failure(
            check,
            "; ".join(different),
            remedy="install the same versions and the same code on every host",
        )
        return
    have = answer["cards"] if device == "cuda" else answer["cores"]
    what = "GPUs" if device == "cuda" else "cores"
    if slots > have:
        short = failure if device == "cuda" else warning
        yield short(check, f"{slots} slots, {have} {what}", remedy=f"slots={have} in the hostfile")
        return
    others = [
        f"{name} is {answer['alike'].get(name)} there, {value} here"
        for name, value in compared_hardware(device).items()
        if answer["alike"].get(name) != value
    ]
    if others:
        yield warning(
            check,
            "; ".join(others),
            remedy="none needed; the last bits of results depend on it",
        )
        return
    yield ok(check, f"{answer['name']}: {slots} slots, {have} {what}, the same versions and code")


if __name__ == "__main__":
    print(json.dumps(describe_host(sys.argv[1])))  # type: ignore[arg-type] # noqa: T201
