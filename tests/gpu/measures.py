"""What a part of the proof measures: a check's name, what was found, and whether that is right."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the table."""

    check: str
    found: str
    allowed: str = ""
    """Empty: nothing is asked of it, it is only told."""
    passed: bool = True
    value: float | None = None
    """The number that was found, for programs; none: it is no number."""

    def as_line(self) -> str:
        """For the process that keeps the measures."""
        return json.dumps({"measure": asdict(self)}, ensure_ascii=False)


def at_most(check: str, value: float, allowed: float) -> Measure:
    """A number with a bound. What is not a number has passed no bound."""
    return Measure(
        check=check,
        found=f"{value:.3g}",
        allowed=f"≤ {allowed:.3g}",
        passed=value <= allowed,
        value=value if math.isfinite(value) else None,
    )


def holds(check: str, passed: bool, found: str) -> Measure:
    """Something that is so or not."""
    return Measure(check=check, found=found, allowed="yes", passed=passed)


def told(check: str, found: float | str) -> Measure:
    """A number or words, for the reader to judge."""
    if isinstance(found, str):
        return Measure(check=check, found=found)
    return Measure(check=check, found=f"{found:,.4g}", value=found)
