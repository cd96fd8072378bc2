"""A plan as text for people, or as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from babyllama_ds.plan.measured import MeasuredTime
from babyllama_ds.plan.memory import Item
from babyllama_ds.plan.planned import Plan, RankCount
from babyllama_ds.report.formatting import (
    GIB,
    MISSING,
    columns,
    count,
    duration,
    number,
    size_in,
    size_unit,
)


def gibibytes(num_bytes: int) -> str:
    """A size with its unit: 21.3 GiB."""
    return f"{num_bytes / GIB:.1f} GiB"


def render_plan(plan: Plan) -> str:
    """Four tables and the assumptions; every number with its unit."""
    parts = [
        _title(plan),
        _stages(plan),
        _times(plan) if plan.measured is None else _measured(plan.measured),
        _memory(plan),
        _disk(plan),
        "assumptions\n" + "\n".join(f"  {line}" for line in plan.assumptions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_json(plan: Plan) -> str:
    """`plan_as_json` as text."""
    return json.dumps(plan_as_json(plan), indent=2) + "\n"


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The same, in tokens, FLOPs, bytes and seconds."""
    return {
        "job": plan.job.run_name,
        "machine": {
            "name": plan.machine.name,
            "device": plan.machine.device,
            "memory_bytes": plan.machine.memory_bytes,
            "peak_flops": plan.machine.peak_flops,
        },
        "precision": plan.precision,
        "corpus": {
            "train_tokens": plan.corpus.train_tokens,
            "dev_tokens": plan.corpus.dev_tokens,
            "vocab_size": plan.corpus.vocab_size,
            "source": plan.corpus.source,
            "windows": plan.work.num_windows,
            "distinct_windows": plan.work.distinct_windows,
        },
        "models": {
            **{teacher.name: teacher.sizes.params for teacher in plan.work.teachers},
            **{s.name: s.sizes.params for s in plan.work.stages if "/" not in s.name},
        },
        "stages": {
            stage.name: {
                "params": stage.sizes.params,
                "steps": stage.steps,
                "tokens": stage.tokens,
                "flops": {
                    "training": stage.flops.training,
                    "teachers": stage.flops.teachers,
                    "updates": stage.flops.updates,
                    "evaluation": stage.flops.evaluation,
                },
            }
            for stage in plan.work.stages
        },
        "ranks": {str(one.ranks): _count_as_json(plan, one) for one in plan.counts},
        "measured": None if plan.measured is None else _measured_as_json(plan.measured),
        "disk_bytes": {item.name: item.bytes for item in plan.disk},
        "disk_nodes": {item.name: item.nodes for item in plan.disk},
        "assumptions": list(plan.assumptions),
    }


def _count_as_json(plan: Plan, one: RankCount) -> dict[str, Any]:
    return {
        "impossible": one.impossible,
        "fits": None if plan.machine.memory_bytes is None else plan.fits(one),
        "usable_bytes": plan.usable_bytes(one.ranks),
        "seconds": one.seconds,
        "stages": {
            name: {
                "peak": memory.peak,
                "peak_bytes": memory.peak_bytes,
                "host_bytes": memory.host_bytes,
                "host_cache_bytes": memory.host_cache_bytes,
                "micro_batch": one.micro_batches[name],
                "moments": {moment: dict(items) for moment, items in memory.moments.items()},
            }
            for name, memory in one.memory.items()
        },
    }


def _measured_as_json(time: MeasuredTime) -> dict[str, Any]:
    return {
        "seconds": time.seconds,
        "before": dict(time.before),
        "stages": {
            stage.name: {
                "seconds": stage.seconds,
                "step_s": stage.step_s,
                "tokens_per_s": stage.tokens_per_s,
                "flops_per_s": stage.flops_per_s,
                "parts": dict(stage.parts),
            }
            for stage in time.stages
        },
        "evaluations": dict(time.evaluations),
    }


# -- tables ----------------------------------------------------------------------------------------


def _title(plan: Plan) -> str:
    machine = plan.machine
    where = f"{machine.device}, {plan.precision}"
    if machine.memory_bytes is not None:
        where += f", {machine.name} ({number(machine.memory_bytes / GIB, 0)} GiB)"
    exact = "" if plan.corpus.source == "store" else "about "
    loaded = [
        f"{teacher.name} {count(teacher.sizes.params)}"
        for teacher in plan.work.teachers
        if f"teachers/{teacher.name}" not in {stage.name for stage in plan.work.stages}
    ]
    lines = [
        f"plan of {plan.job.run_name} on {where}",
        f"corpus: {exact}{count(plan.corpus.train_tokens)} training tokens, "
        f"{plan.work.num_windows:,} windows of {plan.job.windows.length} an epoch, "
        f"vocabulary {plan.corpus.vocab_size:,}",
    ]
    if loaded:
        lines.append(f"teachers loaded, not trained: {', '.join(loaded)} parameters")
    return "\n".join(lines)


def _stages(plan: Plan) -> str:
    by_muon = any(stage.training.muon is not None for stage in plan.work.stages)
    flops = [
        [
            s.flops.training,
            s.flops.teachers,
            *([s.flops.updates] if by_muon else []),
            s.flops.evaluation,
            s.flops.total,
        ]
        for s in plan.work.stages
    ]
    total = sum(row[-1] for row in flops)
    unit, size = ("PFLOP", 1e15) if total >= 1e15 else ("TFLOP", 1e12)
    rows = [
        [
            stage.name,
            f"{stage.sizes.params:,}",
            f"{stage.steps:,}",
            count(stage.tokens),
            *(_three_digits(value / size) for value in row),
        ]
        for stage, row in zip(plan.work.stages, flops, strict=True)
    ]
    parts = ["training", "teachers", *(["Muon"] if by_muon else []), "evaluation", "all"]
    header = ["stage", "parameters", "steps", "tokens", *parts]
    rows.append(["all", *[""] * (len(header) - 2), _three_digits(total / size)])
    return f"work, matrix products in {unit}\n" + columns(header, rows)


def _times(plan: Plan) -> str:
    """Time by stage; none where no speed is known."""
    timed = [one for one in plan.counts if one.seconds]
    if not timed:
        return ""

    def cell(one: RankCount, name: str) -> str:
        return duration(one.seconds[name]) if one.seconds else MISSING

    rows = [
        [stage.name, *(cell(one, stage.name) for one in plan.counts)] for stage in plan.work.stages
    ]
    rows.append(["all", *(duration(_all(one.seconds)) for one in plan.counts)])
    return "time\n" + columns(_header("stage", plan.counts), rows)


_PARTS = ("start", "cache", "steps", "evaluations", "checkpoints", "export")


def _measured(time: MeasuredTime) -> str:
    """Rates of the stages, then where the time of a run goes."""
    trained = [stage for stage in time.stages if stage.step_s]
    fast = max((stage.flops_per_s for stage in trained), default=0.0)
    unit, size = ("TFLOP/s", 1e12) if fast >= 1e12 else ("GFLOP/s", 1e9)
    rates = [
        [
            stage.name,
            f"{1e3 * stage.step_s:,.1f}",
            f"{stage.tokens_per_s:,.0f}",
            _three_digits(stage.flops_per_s / size),
        ]
        for stage in trained
    ]
    rows = [
        [
            stage.name,
            *(_seconds(stage.parts.get(part, 0.0)) for part in _PARTS),
            duration(stage.seconds),
        ]
        for stage in time.stages
    ]
    empty = [""] * len(_PARTS)
    rows += [[name, *empty, duration(seconds)] for name, seconds in time.before.items()]
    rows += [
        [f"measuring {name}", *empty, duration(seconds)]
        for name, seconds in time.evaluations.items()
    ]
    rows.append(["all", *empty, duration(time.seconds)])
    return "\n".join(
        [
            "rates, measured on this machine",
            columns(["stage", "ms a step", "tokens/s", unit], rates),
            "",
            "time of a run at these rates, parts in seconds",
            columns(["", *_PARTS, "all"], rows),
        ]
    )


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value else MISSING


def _all(seconds: dict[str, float] | None) -> float | None:
    return sum(seconds.values()) if seconds else None


def _memory(plan: Plan) -> str:
    """The hungriest stage's items for each rank count, then every stage's peak."""
    possible = [one for one in plan.counts if one.impossible is None]
    name = possible[0].hungriest
    unit = size_unit(possible[0].memory[name].peak_bytes)
    rows = _Rows(plan.counts, unit)
    for item in _items(possible, name):
        rows.size(item, partial(_item_bytes, name=name, item=item))
    rows.size(f"peak of {name}", partial(_peak_bytes, name=name))
    rows.add("  reached at", lambda one: one.memory[name].peak)
    rows.add("  windows in a micro-batch", lambda one: str(one.micro_batches[name]))
    for other in possible[0].memory:
        if other != name:
            rows.size(f"peak of {other}", partial(_peak_bytes, name=other))
    if _host_bytes(possible[0]):
        rows.size("host memory of rank 0", _host_bytes)
    if any(map(_host_cache_bytes, possible)):
        rows.size("teacher cache in host memory, all ranks", _host_cache_bytes)
    if plan.machine.memory_bytes is not None:
        rows.size("usable", lambda one: plan.usable_bytes(one.ranks) or 0)
        rows.add("fits", lambda one: "yes" if plan.fits(one) else "NO")
    notes = [f"  {one.ranks} ranks: {one.impossible}" for one in plan.counts if one.impossible]
    title = f"memory of a rank in {unit}, item by item for the stage that needs most, {name}"
    return "\n".join([title, columns(_header("item", plan.counts), rows.rows), *notes])


class _Rows:
    """Rows of a table with a column for each rank count; a dash where the job cannot be cut."""

    def __init__(self, counts: Sequence[RankCount], unit: str) -> None:
        self.counts = counts
        self.unit = unit
        self.rows: list[list[str]] = []

    def add(self, label: str, cell: Callable[[RankCount], str]) -> None:
        """A row of texts."""
        cells = (MISSING if one.impossible else cell(one) for one in self.counts)
        self.rows.append([label, *cells])

    def size(self, label: str, num_bytes: Callable[[RankCount], int]) -> None:
        """A row of sizes."""
        self.add(label, lambda one: size_in(num_bytes(one), self.unit))


def _items(counts: Sequence[RankCount], name: str) -> list[Item]:
    """What there is at any rank count's peak, in order."""
    found = (item for one in counts for item, b in one.memory[name].items.items() if b)
    return list(dict.fromkeys(found))


def _item_bytes(one: RankCount, *, name: str, item: Item) -> int:
    return one.memory[name].items.get(item, 0)


def _peak_bytes(one: RankCount, *, name: str) -> int:
    return one.memory[name].peak_bytes


def _host_bytes(one: RankCount) -> int:
    return max(memory.host_bytes for memory in one.memory.values())


def _host_cache_bytes(one: RankCount) -> int:
    return max(memory.host_cache_bytes for memory in one.memory.values())


def _disk(plan: Plan) -> str:
    """The disk of one node; where each keeps its own, that of the first, which holds everything."""
    own = any(item.nodes != "one" for item in plan.disk)
    total = sum(item.bytes for item in plan.disk)
    unit = size_unit(total)
    rows = [
        [item.name, size_in(item.bytes, unit), "stays" if item.stays else "while training"]
        + ([f"{item.nodes} node{'s' * (item.nodes != 'every')}"] if own else [])
        for item in plan.disk
        if item.bytes
    ]
    rows.append(["all", size_in(total, unit), "", *["first node"] * own])
    where = "disk of a node" if own else "disk"
    return f"{where} in {unit}\n" + columns(["files", "size", "", *[""] * own], rows)


def _header(first: str, counts: Sequence[RankCount]) -> list[str]:
    return [first, *(f"{o.ranks} rank" if o.ranks == 1 else f"{o.ranks} ranks" for o in counts)]


def _three_digits(value: float) -> str:
    """A number to three digits, or to its last whole one."""
    if not value:
        return MISSING
    return number(value, max(0, 2 - math.floor(math.log10(value))))
