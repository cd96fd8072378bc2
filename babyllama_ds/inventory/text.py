"""Items as text for people: a table, and what it comes to."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from babyllama_ds.inventory.entries import SHORT, Item
from babyllama_ds.inventory.uses import Uses
from babyllama_ds.report.formatting import columns, with_unit

HEADER = ("kind", "key", "size", "last written", "state", "what", "used by")
SIZE = HEADER.index("size")


def render_items(items: Sequence[Item], uses: Uses, runs: Path) -> str:
    """A row an item, then the totals."""
    rows = [_row(item, uses) for item in items]
    left = set(range(len(HEADER))) - {SIZE}
    lines = [str(runs / "store"), columns(HEADER, rows, left=left), ""]
    if any(uses.perhaps(item) for item in items):
        lines.append("?: a run that is not done; whether it comes for this is not known before")
    lines.append(f"all: {_sum(items)}")
    unused = [item for item in items if uses.unused(item)]
    if unused:
        command = shlex.join(["babyllama-ds", "store", "--runs", str(runs), "--remove-unused"])
        lines.append(f"unused: {_sum(unused)}; to remove it: {command}")
    return "\n".join(lines) + "\n"


def render_removed(item: Item) -> str:
    """A line of what is gone."""
    return f"removed {item.name}, {item.state}, {with_unit(item.bytes)}"


def render_freed(items: Sequence[Item]) -> str:
    """What all that came to."""
    return f"freed: {_sum(items)}\n"


def _row(item: Item, uses: Uses) -> list[str]:
    users = [*uses.known(item), *(f"{run}?" for run in uses.perhaps(item))]
    state = ", ".join(part for part in (item.state, item.reached) if part)
    if item.holder is not None:
        state += f", in use by {item.holder}"
    return [
        item.kind,
        item.key[:SHORT],
        with_unit(item.bytes),
        datetime.fromtimestamp(item.touched).strftime("%Y-%m-%d %H:%M"),
        state,
        uses.called(item),
        ", ".join(users) or ("unused" if uses.unused(item) else ""),
    ]


def _sum(items: Sequence[Item]) -> str:
    if not items:
        return "nothing"
    num = f"{len(items)} item" + "s" * (len(items) != 1)
    return f"{num}, {with_unit(sum(item.bytes for item in items))}"
