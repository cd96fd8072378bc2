"""How the time of a token grows: with vocabulary, teachers, window length and ranks.

One size is changed at a time, the rest stays as in `BASE`; our side and the textbook's in fp32 take
turns at each point. Smaller batches than the main benchmark's, so that the textbook's logits of the
largest vocabulary fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from scenario import DEFAULT, Sizes, machine
from turns import Running, Side, fastest, take_turns

from babyllama_ds.report.formatting import number, table

BASE = replace(DEFAULT, batch_windows=8)
VOCABULARIES = (8192, 32_768, 131_072)
NUM_TEACHERS = (1, 2, 3, 4)
LENGTHS = (128, 256, 512)


def measure(logs: Path, *, rounds: int) -> dict[str, Any]:
    """Microseconds a token, at every point."""
    return {"points": [_point(*point, logs=logs, rounds=rounds) for point in points()]}


def points() -> Iterator[tuple[str, int, Sizes, int]]:
    """(what is changed, its value, the sizes, our ranks)."""
    device, units = machine()
    most = units if device == "cuda" else 2
    for vocab_size in VOCABULARIES:
        yield "vocabulary", vocab_size, replace(BASE, vocab_size=vocab_size), most
    for teachers in NUM_TEACHERS:
        yield "teachers", teachers, BASE.with_teachers(teachers), most
    for length in LENGTHS:
        windows = BASE.tokens // length
        yield "window length", length, replace(BASE, length=length, batch_windows=windows), most
    for ranks in range(1, most + 1):
        if BASE.batch_windows % ranks == 0:
            yield "ranks", ranks, BASE, ranks


def render(result: Mapping[str, Any]) -> str:
    """A line a point."""
    header = ["changed", "to", "ours, µs a token", "textbook fp32, µs a token", "ratio"]
    lines = [
        [
            point["changed"],
            f"{point['to']:,}",
            number(point["ours_us"], 1),
            number(point["textbook_us"], 1),
            number(point["ratio"], 2),
        ]
        for point in result["points"]
    ]
    return table(header, lines, left=1)


def _point(
    changed: str, to: int, sizes: Sizes, ranks: int, *, logs: Path, rounds: int
) -> dict[str, Any]:
    device, units = machine()
    threads = 1 if device == "cuda" else max(1, units // ranks)
    print(f"{changed} {to:,}", flush=True)
    sides = (
        Side("ours", sizes, device, ranks, threads),
        Side("textbook", sizes, device, 1, units, precision="fp32", attention="sdpa"),
    )
    with ExitStack() as stack:
        running = []
        for side in sides:
            running.append(fastest([Running(side, logs)]))
            stack.callback(running[-1].end)
        take_turns(running, rounds, after_each=lambda: None)
    ours, textbook = running
    return {
        "changed": changed,
        "to": to,
        "sizes": sizes.as_json(),
        "ours_us": 1e6 * median(ours.step_s) / sizes.tokens,
        "textbook_us": 1e6 * median(textbook.step_s) / sizes.tokens,
        "ratio": median(t / o for t, o in zip(textbook.step_s, ours.step_s, strict=True)),
    }
