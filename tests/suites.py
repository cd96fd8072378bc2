"""A suite of labelled tasks in the tiny job's language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASKS = ("cola", "rte", "wsc")


def write_suite(folder: Path, *, lines: int = 24) -> Path:
    """Three tasks of the tiny job's language: is it paint, the same person twice, and whose."""
    folder.mkdir(parents=True)
    people, acts = ("mara", "old tim"), ("paints", "hides")
    for part in ("train", "valid"):
        records: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
        for i in range(lines):
            who, act, other = people[i % 2], acts[i // 2 % 2], people[i // 4 % 2]
            text = f"{who} {act} the long ladder {i}."
            records["cola"].append({"sentence": text, "label": int(act == "paints")})
            twice = {"sentence1": text, "sentence2": f"{other} laughs."}
            records["rte"].append({**twice, "label": int(who == other)})
            spans = {"text": text, "span1_text": other, "span2_text": act}
            records["wsc"].append({**spans, "label": int(who == other)})
        for task, of_task in records.items():
            text = "".join(json.dumps(record) + "\n" for record in of_task)
            (folder / f"{task}.{part}.jsonl").write_text(text)
    return folder


def asked(folder: Path, **fields: Any) -> str:
    # The tiny models have 64 positions.
    suite = {"name": "toy", "path": str(folder), "max_tokens": 60, **fields}
    return f"evaluation.fine_tuning=[{json.dumps(suite)}]"
