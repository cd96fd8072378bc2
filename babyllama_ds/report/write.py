"""Writing the report: a run's directory enters, `report/report.json` and `report.md` leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from babyllama_ds.files import write_atomic, write_json
from babyllama_ds.report.collect import collect_report
from babyllama_ds.report.markdown import render_markdown


def write_report(run_dir: Path) -> dict[str, Any]:
    """Collect a run's report and write it into the run; each file appears whole.

    Raises:
        RunError: the run's files are missing or garbled, or the directory is not writable.
    """
    report = collect_report(run_dir)
    write_json(run_dir / "report" / "report.json", report)
    write_atomic(run_dir / "report" / "report.md", render_markdown(report))
    return report
