"""Ranks that have ended enter: their collectives, and ZeRO-2 against a plain process, judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import load_file

from babyllama_ds import files
from babyllama_ds.doctor.findings import Finding, failure, ok, warning
from babyllama_ds.doctor.rank import COLLECTIVES
from babyllama_ds.doctor.world import Started, World
from babyllama_ds.engine.proof.case import STEPS, Case
from babyllama_ds.engine.proof.judge import Difference, judge
from babyllama_ds.engine.proof.models import CASES, COMPILED_CASES
from babyllama_ds.engine.proof.sharded import trace_path

NAMED = 3
"""Parameters named when there is a difference."""
_WRONG = "do not train here: install the pinned versions (make setup), then run doctor again"
_ENDED = "if the lines do not say why, run `make test` for the whole story"


def zero2(started: Started, *, compiled: bool) -> list[Finding]:
    """Wait for the ranks, then judge what they did and what they did not come to."""
    ended = started.wait()
    found = [
        _collectives(started, ended),
        _proof("zero-2 fp32", started, ended, [c for c in CASES if c.precision == "fp32"]),
        _proof("zero-2 bf16", started, ended, [c for c in CASES if c.precision == "bf16"]),
    ]
    if compiled:
        found.append(_proof("torch.compile", started, ended, COMPILED_CASES))
    if ended is not None and all(each.status != "failure" for each in found):
        found.append(_left_badly(started.world, ended))
    return found


def not_compiled(why: str | None) -> Finding:
    """The finding where torch.compile was not asked for (`why` is none), or cannot be tried."""
    if why is None:
        return ok("torch.compile", "not tried: --compile does, and takes about a minute more")
    return warning(
        "torch.compile",
        f"not proved: {why}",
        remedy="install one (Debian, Ubuntu: apt install g++); only compiled training needs it",
    )


def _collectives(started: Started, ended: str | None) -> Finding:
    world = started.world
    path = started.folder / COLLECTIVES
    if not path.exists():
        return failure("collectives", f"{world} ({world.backend}): {ended}", remedy=_ENDED)
    wrong = files.read_json(path)
    if wrong:
        return failure(
            "collectives",
            f"{world} ({world.backend}): wrong sums of {', '.join(wrong)}",
            remedy="try NCCL_P2P_DISABLE=1; if that helps, the cards' connection is at fault"
            if world.device == "cuda"
            else "install the pinned torch (make setup)",
        )
    return ok(
        "collectives",
        f"{world} ({world.backend}): all-reduce and reduce-scatter give the right sums",
    )


def _left_badly(world: World, ended: str) -> Finding:
    """All is written, and sound; it is in leaving that a rank died, or never came to an end."""
    return failure(
        "ranks",
        f"{world}: all trainings were done, but afterwards {ended}",
        remedy=f"a job would end so after its last checkpoint, or hang there; {_ENDED}",
    )


def _proof(check: str, started: Started, ended: str | None, cases: Sequence[Case]) -> Finding:
    world, lines, error = started.world, list[str](), 0.0
    for case in cases:
        path = trace_path(started.folder, case)
        if not path.exists():
            told = f"{world}: the training of {case.name} did not end; {ended}"
            return failure(check, told, remedy=_ENDED)
        place = torch.device(world.device)
        verdict = judge(case, load_file(path), num_ranks=world.num_ranks, device=place)
        error = max(error, verdict.error)
        if verdict.differences:
            lines.append(f"{case.name}: {_named(verdict.differences)}")
    if lines:
        return failure(check, f"{world}, not as a plain process. {'; '.join(lines)}", remedy=_WRONG)
    return ok(check, f"{world}: {_as_plain(cases, error)}")


def _as_plain(cases: Sequence[Case], error: float) -> str:
    trainings = f"{len(cases)} trainings" if len(cases) > 1 else "1 training"
    told = (
        f"largest relative difference {error:.0e}"
        if cases[0].precision == "fp32"
        else f"largest error {error:.2f} × a plain bf16 one's"
    )
    return (
        f"gradients, and weights after {STEPS} steps, are those of one plain PyTorch process "
        f"({trainings}; {told})"
    )


def _named(differences: Sequence[Difference]) -> str:
    return "; ".join(_first(differences))


def _first(differences: Sequence[Difference]) -> Iterator[str]:
    yield from (str(each) for each in differences[:NAMED])
    if len(differences) > NAMED:
        yield f"and {len(differences) - NAMED} more"
