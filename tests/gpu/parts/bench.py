"""`make bench` at the published sizes on this card: rows and keys as they come, judged by nobody.

tests/benchmarks/published.py measures; its file, with breakdowns and profiles, stays in the
proof's folder. What is left of the part's time goes to a larger batch of the student.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gpu.measures import Measure, told
from gpu.parts.runs import RANK

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "benchmarks" / "bench.py"
BUDGET_S = 590.0
"""Where the proof does not say how long it has."""
SPARED_S = 20.0
"""For what has been measured to be told."""
LARGER_WINDOWS, LARGER_S = 128, 60.0
"""A further batch of the student, and what must be left for it."""
REHEARSED = ["--only", "babyllama", "--rounds", "1", "--no-compiled"]


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    until_s = float(os.environ.get("GPU_PROOF_UNTIL", time.time() + BUDGET_S))
    end = time.monotonic() + (until_s - time.time()) - SPARED_S
    with tempfile.TemporaryDirectory(prefix="babyllama-proof-") as spare:
        folder = Path(os.environ.get("GPU_PROOF_OUT", spare)) / "bench"
        words = ["--sizes", "published", *(REHEARSED if small else [])]
        yield from _followed(words, device, folder / "published.json", end)
        if end - time.monotonic() > LARGER_S and not small:
            words = ["--sizes", "babyllama", "--batch-windows", str(LARGER_WINDOWS)]
            yield from _followed(words, device, folder / "larger.json", end)


def _followed(words: list[str], device: torch.device, out: Path, end: float) -> Iterator[Measure]:
    """Run the bench; tell the rows of each group when it is done, and the keys at the end."""
    out.unlink(missing_ok=True)
    env = {key: value for key, value in os.environ.items() if key not in RANK}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    seconds = str(max(1.0, end - time.monotonic()))
    words = [*words, "--device", device.type, "--seconds", seconds, "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *words], env=env)
    told_rows: set[str] = set()
    groups = 0
    while process.poll() is None:
        time.sleep(1)
        found = _read(out)
        if len(found.get("groups_done", [])) > groups:
            groups = len(found["groups_done"])
            yield from _rows(found, told_rows)
    result = _read(out)
    yield from _rows(result, told_rows)
    for key, value in result.get("keys", {}).items():
        aim = result["aims"].get(key)
        yield told(key + (f" (aim: {aim})" if aim else ""), value)
    yield told("all sides do the same work", str(result.get("same_work", "nothing was measured")))
    yield told("ended by", str(result.get("ended_by", f"status {process.returncode}")))
    if not told_rows:
        raise RuntimeError(f"the bench measured nothing: status {process.returncode}")


def _rows(result: Mapping[str, Any], told_rows: set[str]) -> Iterator[Measure]:
    """Those not told before: of groups that are done, each has all its rounds."""
    for workload, facts in result.get("workloads", {}).items():
        for row, measured in facts["rows"].items():
            name = f"{workload}: {row}"
            if name in told_rows or not ("step_s" in measured or "failed" in measured):
                continue
            told_rows.add(name)
            yield from _row(name, measured)


def _row(name: str, measured: Mapping[str, Any]) -> Iterator[Measure]:
    if "failed" in measured:
        yield told(name, f"failed: {measured['failed']}")
    if "step_s" not in measured:
        return
    batch, micro = measured["batch_windows"], measured["micro_batch"]
    attention = measured["variant"]["attention"] or "a job's own attention"
    yield told(f"{name}: batch", f"{batch} windows, {micro} a pass, {attention}")
    yield told(f"{name}: tokens/s", measured["tokens_per_s"])
    for key in ("mfu", "mfu_square"):
        if key in measured:
            yield told(f"{name}: {key}", measured[key])
    for key, value in measured["memory"].items():
        yield told(f"{name}: {key.removesuffix('_bytes')}, GiB", value / 2**30)
    profile = measured.get("profile", {})
    if "idle_share" in profile:
        yield told(f"{name}: share of a step in which the card idles", profile["idle_share"])


def _read(path: Path) -> dict[str, Any]:
    """The bench's file, which is always whole; nothing, where it is not there yet."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
