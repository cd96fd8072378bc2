"""What a check says: its name, how bad it is, what was found, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from babyllama_ds.errors import MachineError

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table. `remedy` is there unless all is well."""

    check: str
    status: Status
    found: str
    remedy: str | None = None


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check=check, status="ok", found=found)


def warning(check: str, found: str, *, remedy: str) -> Finding:
    """Jobs run, but slowly, or not all of them."""
    return Finding(check=check, status="warning", found=found, remedy=remedy)


def failure(check: str, found: str, *, remedy: str) -> Finding:
    """Jobs would fail, or give wrong numbers."""
    return Finding(check=check, status="failure", found=found, remedy=remedy)


def refuse_failures(findings: Sequence[Finding]) -> None:
    """Nothing, where no check failed.

    Raises:
        MachineError: the checks that failed, by name.
    """
    failed = [finding.check for finding in findings if finding.status == "failure"]
    if failed:
        raise MachineError.of(
            "doctor",
            got=f"{_failures(len(failed))}: {', '.join(failed)}",
            expected="none",
            hint="the table says what to do about each",
        )


def _failures(count: int) -> str:
    return "1 failure" if count == 1 else f"{count} failures"
