"""The hosts of a hostfile and the folder of runs: is it one folder that all of them see, or one of
each host's own? Hosts enter; a finding leaves that names the `deepspeed.storage` it is right for.

Every host writes a file of its own under a name never used before, then looks for those of all,
then removes its own. A run checks the same when it starts (`storages.find_storages`), against what
its job promises; here no job is known.
"""

from __future__ import annotations

import functools
import secrets
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from babyllama_ds.doctor.findings import Finding, failure, ok, warning
from babyllama_ds.doctor.ssh import told_over_ssh
from babyllama_ds.files import TEMPORARY_PREFIX
from babyllama_ds.storages import SEEN_WITHIN_S

_LIMIT_S = 60
_CHECK = "runs on all hosts"
_LOOKS_A_S = 2


def sharing(runs: Path, hosts: Sequence[str], *, ssh_port: int | None) -> list[Finding]:
    """Whether `runs`, as the hosts resolve it in this directory, is one folder or one of each."""
    if len(hosts) < 2:
        return []
    stem = runs / f"{TEMPORARY_PREFIX}doctor-{secrets.token_hex(8)}"
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:

        def on_each(programs: Sequence[str]) -> list[str | None]:
            """Each host's last line, and none where its program did not end well."""
            return list(pool.map(functools.partial(_told, ssh_port=ssh_port), hosts, programs))

        numbers = range(len(hosts))
        wrote = on_each([_writing(runs, stem, number) for number in numbers])
        looking = _looking(stem, len(hosts))
        told = on_each([looking] * len(hosts)) if all(wrote) else []
        on_each([f"rm -f {shlex.quote(f'{stem}-{number}')}" for number in numbers])
        if "made" in wrote:  # when nobody's file is there any more
            gone = f"rmdir {shlex.quote(str(runs))}"
            on_each([gone if how == "made" else ":" for how in wrote])
    silent = [host for host, answer in zip(hosts, told or wrote, strict=True) if answer is None]
    if silent:
        return [
            failure(
                _CHECK,
                f"{runs} cannot be written, or read again, on {', '.join(silent)}",
                remedy="choose another directory: --runs DIR, or mend this one there",
            )
        ]
    return [_found(runs, hosts, [_seen(answer) for answer in told])]


def _found(runs: Path, hosts: Sequence[str], seen: Sequence[frozenset[int]]) -> Finding:
    """`seen`: of each host, whose files it sees."""
    everyone = frozenset(range(len(hosts)))
    if all(each == everyone for each in seen):
        return ok(
            _CHECK,
            f"{runs} is one folder on all {len(hosts)}: right for deepspeed.storage=shared",
        )
    if all(each == {number} for number, each in enumerate(seen)):
        return warning(
            _CHECK,
            f"each of the {len(hosts)} hosts has a {runs} of its own",
            remedy="jobs need deepspeed.storage=node, or one folder mounted on all of them",
        )
    views = dict.fromkeys(", ".join(hosts[number] for number in sorted(each)) for each in seen)
    return failure(
        _CHECK,
        f"{runs} is shared by some: files of {'; of '.join(views)} are seen together",
        remedy="mount one folder on all hosts, or give each its own (deepspeed.storage=node)",
    )


def _told(host: str, program: str, *, ssh_port: int | None) -> str | None:
    there = f"cd {shlex.quote(str(Path.cwd()))} && {program}"
    # Whatever the login shell is.
    told = told_over_ssh(host, f"sh -c {shlex.quote(there)}", ssh_port, limit_s=_LIMIT_S)
    return told.line


# -- what is done there, in sh ---------------------------------------------------------------------


def _writing(runs: Path, stem: Path, number: int) -> str:
    folder, name = shlex.quote(str(runs)), shlex.quote(f"{stem}-{number}")
    return (
        f"had=had; [ -d {folder} ] || had=made; "
        f"mkdir -p {folder} && echo {number} > {name} && echo $had"
    )


def _looking(stem: Path, count: int) -> str:
    """Until all are seen, as long as a run would wait: a network file system may take its time."""
    numbers = " ".join(map(str, range(count)))
    name = f"{shlex.quote(str(stem))}-$number"
    return (
        f"look=0; while :; do seen=; for number in {numbers}; do "
        f'[ "$(cat {name} 2>/dev/null)" = $number ] && seen="$seen $number"; done; '
        f'[ "$seen" = " {numbers}" ] && break; '
        f"look=$((look + 1)); [ $look -ge {round(SEEN_WITHIN_S * _LOOKS_A_S)} ] && break; "
        f'sleep {1 / _LOOKS_A_S}; done; echo "seen$seen"'
    )


def _seen(answer: str | None) -> frozenset[int]:
    assert answer is not None, "the silent are named"
    return frozenset(map(int, answer.split()[1:]))
