"""`make bench` on the smallest sizes: every side does the same work, every key is there."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench.py"
KEYS = {
    "tokens_per_s_ratio",
    "tokens_per_s_ratio_autocast",
    "cached_tokens_per_s_ratio",
    "cached_tokens_per_s_ratio_autocast",
    "tokens_per_s_ratio_uncompiled",
    "cached_tokens_per_s_ratio_uncompiled",
    "loss_peak_memory_ratio",
    "loss_time_ratio",
    "mfu",
    "zero2_overhead",
}


@pytest.mark.launch
def test_the_published_workload_in_small(start: Callable[..., Any], tmp_path: Path) -> None:
    """Real sides: the same first loss, memory, parts of a step and operators."""
    pytest.importorskip("accelerate", reason="the textbook's trainer needs it")
    out = tmp_path / "published.json"
    words = ["--sizes", "babyllama", "--device", "cpu", "--rounds", "1", "--no-compiled"]
    words += ["--rows", "ours", "ours cached", "textbook fp32", "--only", "babyllama"]
    start([[sys.executable, BENCH, *words, "--out", out]], limit_s=400).end().assert_done()

    result = json.loads(out.read_text())
    assert result["ended_by"] == "all measured"
    assert result["same_work"] == "yes"
    rows = result["workloads"]["babyllama"]["rows"]
    assert set(rows) == {"ours", "ours cached", "textbook fp32"}
    for row in rows.values():
        assert row["step_s"] > 0
        assert row["memory"]["peak_rss_bytes"] > 2**20
        assert row["first_loss"] == pytest.approx(rows["textbook fp32"]["first_loss"], rel=0.02)
    # Another micro-batch was tried in the same process, and both attentions of the textbook.
    assert len({each["micro"] for each in rows["ours"]["tried"]}) == 2
    assert {each["attention"] for each in rows["textbook fp32"]["tried"]} == {"sdpa", "eager"}
    assert rows["ours"]["breakdown_s"]["teachers"] > rows["ours cached"]["breakdown_s"]["teachers"]
    assert rows["ours"]["profile"]["kinds"]["matrix products"]["ms"] > 0
    assert result["keys"]["babyllama: cached_tokens_per_s_ratio"] > 0


@pytest.mark.launch
def test_the_harness_runs(start: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the textbook's trainer needs it")
    out = tmp_path / "bench.json"
    words = ["--sizes", "small", "--rounds", "2", "--no-compiled", "--out", out]
    ended = start([[sys.executable, BENCH, *words]]).end()
    ended.assert_done()

    result = json.loads(out.read_text())
    assert result["keys"].keys() >= KEYS
    assert all(math.isfinite(value) for value in result["keys"].values())
    for row in result["rows"].values():
        assert len(row["rounds_s"]) == 2
        assert min(row["rounds_s"]) > 0
    assert result["sizes"]["batch_windows"] == 4
    for row, facts in result["rows"].items():
        assert row in ended.out
        # The same weights and tokens: one rank or two, with a cache or without, the same loss.
        assert facts["first_loss"] == pytest.approx(
            result["rows"]["textbook fp32"]["first_loss"],
            rel=0.15 if row == "textbook autocast" else 0.01,
        )
