"""Findings enter; a table for a terminal of 80 columns, or the same as JSON, leaves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from babyllama_ds.doctor.findings import Finding

WIDTH = 80
STATUSES = ("ok", "warning", "failure")


def as_table(findings: Sequence[Finding], *, seconds: float) -> str:
    """A row a finding: status, check, what was found; below it the remedy. Then the count."""
    check_width = max(len("check"), *(len(finding.check) for finding in findings))
    header = _row("status", "check", "found", check_width)
    rule = "-" * WIDTH
    rows = [line for finding in findings for line in _rows(finding, check_width)]
    return "\n".join([*header, rule, *rows, rule, _summary(findings, seconds)]) + "\n"


def as_json(findings: Sequence[Finding], *, seconds: float) -> str:
    """`findings` as in the table, how many there are of each status, and the seconds taken."""
    value = {
        "findings": [asdict(finding) for finding in findings],
        "counts": _counts(findings),
        "seconds": round(seconds, 1),
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _rows(finding: Finding, check_width: int) -> list[str]:
    rows = _row(finding.status, finding.check, finding.found, check_width)
    if finding.remedy:
        rows += _row("", "", f"remedy: {finding.remedy}", check_width)
    return rows


def _row(status: str, check: str, text: str, check_width: int) -> list[str]:
    first = f"{status:<7}  {check:<{check_width}}  "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
    )


def _summary(findings: Sequence[Finding], seconds: float) -> str:
    counts = _counts(findings)
    told = [
        f"{count} {status}{'s' if count != 1 and status != 'ok' else ''}"
        for status, count in counts.items()
    ]
    return f"{len(findings)} checks in {seconds:.0f} s: {', '.join(told)}"


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    return {status: sum(f.status == status for f in findings) for status in STATUSES}
