"""Numbers and tables for people: values enter, text leaves, Markdown or plain. What is missing is a
dash."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

MISSING = "–"
GIB = 2**30
MIB = 2**20
KIB = 2**10
_GAP = "  "


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table, aligned in the source too; the first `left` columns are text."""
    cells = [[_cell(text) for text in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        "-" * width if index < left else "-" * (width - 1) + ":"
        for index, width in enumerate(widths)
    ]
    lines = [
        [
            text.ljust(width) if index < left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Container[int] = (0,)
) -> str:
    """Columns in plain text: those that are named to the left, numbers to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        _GAP.join(
            text.ljust(width) if index in left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A number with a fixed count of decimals, no minus before zero; with `sign`, a plus."""
    if value is None:
        return MISSING
    return f"{value:+z,.{digits}f}" if sign else f"{value:z,.{digits}f}"


def percent(share: float | None) -> str:
    """A share as per cent, without the sign: headers carry the unit."""
    return number(None if share is None else 100 * share, 2)


def estimate(share: float | None, error: float | None) -> str:
    """A share as `percent` shows it, and its standard error, where that is known."""
    return percent(share) + ("" if share is None or error is None else f" ± {percent(error)}")


def points(difference: float | None, error: float | None) -> str:
    """A difference in percentage points and its standard error, where that is known."""
    around = "" if difference is None or error is None else f" ± {error:.2f}"
    return number(difference, 2, sign=True) + around


def count(value: float | None) -> str:
    """A count to three digits with its multiple: 58.3 M."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Below one unit, but rounded to it: 999,999 is 1.00 M, not 1000 k.
        if value >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f}"


def size_unit(num_bytes: int) -> str:
    """The unit that a size, or a table of them, is told in."""
    return "GiB" if num_bytes >= GIB else "MiB"


def size_in(num_bytes: int, unit: str) -> str:
    """A size in this unit, without it: headers carry it."""
    if not num_bytes:
        return MISSING
    return number(num_bytes / GIB, 2) if unit == "GiB" else number(num_bytes / MIB, 1)


def with_unit(num_bytes: int) -> str:
    """A size with its own unit: 21.30 GiB."""
    if num_bytes < MIB:
        return f"{number(num_bytes / KIB, 1)} KiB"
    unit = size_unit(num_bytes)
    return f"{size_in(num_bytes, unit)} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units of h, min, s."""
    if seconds is None:
        return MISSING
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Key paths and values of nested objects, as text."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            pairs += flat(item, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", MISSING if item is None else str(item)))
    return pairs


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
