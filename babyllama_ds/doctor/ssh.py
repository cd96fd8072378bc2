"""A command on another host, over ssh as DeepSpeed's launcher will use it: without a password."""

from __future__ import annotations

import subprocess
from typing import NamedTuple

CONNECT_LIMIT_S = 10


class Told(NamedTuple):
    """What came back."""

    line: str | None
    """The last line that the command wrote; none: it did not end well, or wrote none."""
    problem: str
    """Why there is no line, in words."""


def told_over_ssh(host: str, command: str, port: int | None, *, limit_s: float) -> Told:
    """Run `command` on `host` by its login shell, for at most `limit_s` seconds."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_LIMIT_S}"]
    at_port = [] if port is None else ["-p", str(port)]
    try:
        done = subprocess.run(
            ["ssh", *options, *at_port, host, command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except FileNotFoundError:
        return Told(None, "there is no ssh here")
    except subprocess.TimeoutExpired:
        return Told(None, f"no answer within {limit_s} s")
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode == 0 and last:
        return Told(last[0], "")
    said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
    return Told(None, f"ssh ended with status {done.returncode}: {said[0]}")
