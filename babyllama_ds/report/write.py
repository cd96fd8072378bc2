"""Writing the report: a run's directory enters; JSON, Markdown, a page and its figures leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from babyllama_ds.files import write_atomic, write_json
from babyllama_ds.report.collect import collect_report
from babyllama_ds.report.html import render_html, view_of
from babyllama_ds.report.markdown import render_markdown
from babyllama_ds.report.metrics import collect_curves


def write_report(run_dir: Path, folder: Path | None = None) -> dict[str, Any]:
    """Collect a run's report and write it into `folder`, by default the run's own; each file
    appears whole.

    Raises:
        RunError: the run's files are missing or garbled, or the directory is not writable.
    """
    folder = folder or run_dir / "report"
    while True:
        report = collect_report(run_dir)
        _write(report, run_dir, folder)
        # A run that ended meanwhile has written its own, which this one may have replaced.
        if report["unfinished"] is None or collect_report(run_dir)["unfinished"] is not None:
            return report


def _write(report: dict[str, Any], run_dir: Path, folder: Path) -> None:
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.md", render_markdown(report))
    view = view_of(report, collect_curves(run_dir / "metrics.jsonl", report["models"]))
    for figure in view.figures:
        write_atomic(folder / f"{figure.name}.svg", figure.svg)
    write_atomic(folder / "report.html", render_html(view))
    for left_over in {*folder.glob("*.svg")} - {folder / f"{one.name}.svg" for one in view.figures}:
        left_over.unlink(missing_ok=True)  # of an earlier report, of what is no longer there
