"""The proof's part `bench`, with a bench that only writes its file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from gpu.parts import bench as part

STUB = """
import json, pathlib, sys, time

words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
out.parent.mkdir(parents=True, exist_ok=True)

def row(tokens_per_s):
    return {"kind": "ours", "step_s": 1.0, "tokens_per_s": tokens_per_s, "batch_windows": 32,
            "micro_batch": 16, "variant": {"micro": 16, "attention": None}, "mfu": 0.5,
            "mfu_square": 0.25, "memory": {"peak_bytes": 2**30}, "profile": {"idle_share": 0.1}}

rows = {"ours": row(100.0), "textbook fp32": {"kind": "textbook", "failed": "no room"}}
result = {"workloads": {"babyllama": {"rows": rows}}, "groups_done": ["babyllama"], "keys": {},
          "aims": {}, "same_work": "yes", "words": words}
out.write_text(json.dumps(result))
time.sleep(2)
rows["ours compiled"] = row(200.0)
result |= {"keys": {"babyllama: tokens_per_s_ratio": 7.0, "babyllama: mfu": 0.5},
           "aims": {"babyllama: tokens_per_s_ratio": "≥ 6"}, "ended_by": "time"}
out.write_text(json.dumps(result))
"""


def test_rows_are_told_when_their_group_is_done_and_keys_with_their_aims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(part, "SCRIPT", script)
    monkeypatch.setenv("GPU_PROOF_OUT", str(tmp_path / "proof"))
    monkeypatch.setenv("GPU_PROOF_UNTIL", str(time.time() + 70))
    measures = part.measure(torch.device("cpu"), small=True)

    first = next(measures)
    written = tmp_path / "proof" / "bench" / "published.json"
    assert "ended_by" not in json.loads(written.read_text())  # while it was still at it
    assert first.check == "babyllama: ours: batch"
    found = {each.check: each for each in (first, *measures)}
    assert found["babyllama: ours: batch"].found.startswith("32 windows, 16 a pass")
    assert found["babyllama: ours compiled: tokens/s"].value == 200
    assert found["babyllama: textbook fp32"].found == "failed: no room"
    assert found["babyllama: ours: peak, GiB"].value == 1
    assert found["babyllama: tokens_per_s_ratio (aim: ≥ 6)"].value == 7
    assert found["ended by"].found == "time"
    assert all(each.passed and not each.allowed for each in found.values())

    words = json.loads(written.read_text())["words"]
    assert 40 < float(words[words.index("--seconds") + 1]) <= 50


def test_a_bench_that_measures_nothing_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "stub.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(part, "SCRIPT", script)
    monkeypatch.setenv("GPU_PROOF_OUT", str(tmp_path))
    with pytest.raises(RuntimeError, match="measured nothing: status 3"):
        list(part.measure(torch.device("cpu"), small=True))
