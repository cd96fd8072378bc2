"""The results of a run, done or not: its directory enters; a few small files leave, for the record.

    report.json, report.md, report.html     as `report` writes them; job and environment are in them
    job.yaml                                the job, resolved: it runs again as it is
    metrics.jsonl.gz                        every logged step, where there are any

No weights and no text: what a machine that is about to go, or a repository of results, has room
for.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.export.finished import check_outside
from babyllama_ds.report.write import write_report
from babyllama_ds.rundir import METRICS_NAME


def collect_results(run_dir: Path, target: Path) -> None:
    """Write the run's report, its job and its metrics to the folder `target`.

    Nothing is written into the run, which may be another's. The same run gives the same bytes.

    Raises:
        RunError: no run is there, its files are garbled, `target` exists or lies inside the run, or
            the disk refuses.
    """
    if not (run_dir / "job.yaml").is_file():
        raise RunError.of(
            run_dir,
            got="no job.yaml" if run_dir.is_dir() else "no such directory",
            expected="the directory of a run",
            hint="it is <runs>/<job name>",
        )
    check_outside(run_dir, target)
    with files.appearing(target) as place:
        place.mkdir(parents=True)
        write_report(run_dir, place)
        for figure in place.glob("*.svg"):
            figure.unlink()  # the page has them
        shutil.copyfile(run_dir / "job.yaml", place / "job.yaml")
        metrics = run_dir / METRICS_NAME
        if metrics.is_file():
            packed = gzip.compress(metrics.read_bytes(), mtime=0)
            (place / f"{METRICS_NAME}.gz").write_bytes(packed)
