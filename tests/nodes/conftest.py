"""Two hosts on this machine, for jobs that run across both: they need root, and `PROGRAMS`.

A host is a network namespace with an address, a name, processes, mounts and an ssh daemon of its
own; a pair of virtual interfaces joins the two. Nothing of it is seen outside, so that runs beside
each other do not meet; at the end, however it comes, the processes are killed and the namespaces
deleted. As on many systems, the name of a host is 127.0.1.1 to itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh")
UP_LIMIT_S = 60.0
COMMAND_LIMIT_S = 60.0
LAUNCH_LIMIT_S = 600.0
"""Of one launch on both hosts: a tenth of it where nobody else computes."""

INIT = """
set -e
hostname {name}
mount --bind {folder}/hosts-of-{name} /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs none /run
mkdir /run/sshd
/usr/sbin/sshd -f {folder}/sshd_config -E {folder}/sshd-{name}.log
touch {folder}/{name}-is-up
while sleep 3600 & wait $!; do :; done
"""
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
SSH = """
Host *
  IdentityFile {folder}/user_key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 2
  ServerAliveCountMax 3
"""


def lacking() -> str | None:
    """Why there can be no such hosts here."""
    if os.geteuid() != 0:
        return "needs root, to make hosts out of namespaces"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2 util-linux openssh-server pdsh)"
    name = f"bl{os.getpid()}try"
    tried = [["ip", "netns", "add", name], ["ip", "netns", "exec", name, "unshare", "-pf", "true"]]
    done = [subprocess.run(words, capture_output=True, text=True, check=False) for words in tried]
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    told = [one.stderr.strip() for one in done if one.returncode]
    return f"no namespaces can be made here: {told[0]}" if told else None


class Host:
    """One of the two, up until it is killed; `boot` brings it back."""

    def __init__(self, name: str, space: str, address: str, folder: Path) -> None:
        self.name, self.space, self.address, self._folder = name, space, address, folder
        self._outer: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        up = self._folder / f"{self.name}-is-up"
        up.unlink(missing_ok=True)
        script = INIT.format(name=self.name, folder=self._folder)
        spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        self._outer = subprocess.Popen(
            ["ip", "netns", "exec", self.space, *spaces, "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + UP_LIMIT_S
        while not up.exists():
            assert self._outer.poll() is None, f"{self.name} did not come up"
            assert time.monotonic() < deadline_s, f"{self.name} did not come up in time"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to every process at once; the kernel goes on and says that they are gone."""
        if self._outer is not None and self._outer.poll() is None:
            os.kill(self._init(), signal.SIGKILL)
            self._outer.wait()

    def cut_off(self) -> None:
        """Nothing comes in or out any more, not even word that a connection is closed."""
        command("ip", "-n", self.space, "link", "set", "eth0", "down")

    def reconnect(self) -> None:
        command("ip", "-n", self.space, "link", "set", "eth0", "up")

    def words(self, *words: object) -> list[str]:
        """A command line that runs `words` on this host."""
        spaces = ["--net", "--pid", "--mount", "--uts"]
        return ["nsenter", "--target", str(self._init()), *spaces, "--", *map(str, words)]

    def processes(self, words: str) -> list[int]:
        """Those with `words` in their command lines, as this host numbers them."""
        done = subprocess.run(
            self.words("pgrep", "-f", words), capture_output=True, text=True, check=False
        )
        return [int(line) for line in done.stdout.split()]

    def _init(self) -> int:
        assert self._outer is not None
        pid = self._outer.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=COMMAND_LIMIT_S)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """`host-a` and `host-b`, up and connected."""
    why_not = lacking()
    if why_not is not None:
        pytest.skip(why_not)
    folder = tmp_path_factory.mktemp("hosts")
    pair = tuple(
        Host(f"host-{letter}", f"bl{os.getpid()}{letter}", f"10.77.0.{number}", folder)
        for number, letter in enumerate("ab", start=1)
    )
    try:
        connect(pair)
        write_settings(pair, folder)
        for host in pair:
            host.boot()
        yield pair
    finally:
        for host in pair:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.space], capture_output=True, check=False)


def connect(pair: Sequence[Host]) -> None:
    a, b = pair
    for host in pair:
        command("ip", "netns", "add", host.space)
        command("ip", "-n", host.space, "link", "set", "lo", "up")
    words = ["type", "veth", "peer", "name", "eth0", "netns", b.space]
    command("ip", "link", "add", "eth0", "netns", a.space, *words)
    for host in pair:
        command("ip", "-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.reconnect()


def write_settings(pair: Sequence[Host], folder: Path) -> None:
    for name in ("host_key", "user_key"):
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    known = [f"{host.name},{host.address} {key}\n" for host in pair]
    (folder / "known_hosts").write_text("".join(known) + f"127.0.1.1 {key}\n")
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    for host in pair:
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}"]
        lines += [f"{other.address} {other.name}" for other in pair if other is not host]
        (folder / f"hosts-of-{host.name}").write_text("\n".join(lines) + "\n")


# -- launching ------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """What a person who is logged in has; the rest comes from `.deepspeed_env`."""
    return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="session")
def start_over_ssh(hosts: tuple[Host, Host], start: Callable[..., Any]) -> Callable[..., Any]:
    """`deepspeed --hostfile … launcher/run.py WORDS` on host-a; pdsh starts what runs on both."""

    def begin(folder: Path, *words: object, slots: Mapping[str, int] | None = None) -> Any:
        hostfile = write_hostfile(folder, hosts, slots)
        env = [f"OMP_NUM_THREADS={1}", "DS_ACCELERATOR=cpu", "HF_HUB_OFFLINE=1"]
        (folder / ".deepspeed_env").write_text("\n".join(env) + "\n")
        launcher = [BIN / "deepspeed", "--quiet", "--hostfile", hostfile]
        script = ROOT / "launcher" / "run.py"
        line = hosts[0].words("env", "-C", folder, *launcher, script, *words)
        return start([line], [environment()], limit_s=LAUNCH_LIMIT_S)

    return begin


@pytest.fixture(scope="session")
def start_without_ssh(hosts: tuple[Host, Host], start: Callable[..., Any]) -> Callable[..., Any]:
    """One launch a node: `deepspeed --no_ssh --node_rank N …` on each of `nodes`."""

    def begin(
        folder: Path,
        *words: object,
        slots: Mapping[str, int] | None = None,
        nodes: Sequence[int] = (0, 1),
        words_of: Mapping[int, Sequence[object]] | None = None,
    ) -> list[Any]:
        hostfile = write_hostfile(folder, hosts, slots)
        script = ROOT / "launcher" / "run.py"
        started = []
        for node in nodes:
            launcher = [BIN / "deepspeed", "--quiet", "--hostfile", hostfile, "--no_ssh"]
            launcher += ["--node_rank", str(node), "--master_addr", hosts[0].address]
            extra = (words_of or {}).get(node, ())
            line = hosts[node].words("env", "-C", folder, *launcher, script, *words, *extra)
            started.append(start([line], [environment()], limit_s=LAUNCH_LIMIT_S))
        return started

    return begin


@pytest.fixture
def hostfile(hosts: tuple[Host, Host]) -> Callable[..., Path]:
    """Write a hostfile of both into a folder."""
    return lambda folder, slots=None: write_hostfile(folder, hosts, slots)


def write_hostfile(
    folder: Path, hosts: Sequence[Host], slots: Mapping[str, int] | None = None
) -> Path:
    path = folder / "hostfile"
    lines = [f"{host.name} slots={(slots or {}).get(host.name, 1)}\n" for host in hosts]
    path.write_text("".join(lines))
    return path
