"""Whole runs of a tiny job on one rank: started, killed, compared by their students' weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

LIMIT_S = 240.0
"""Of one run."""
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def write_job(folder: Path, device: torch.device, *, small: bool) -> Path:
    """A job of seconds: text from the embedded grammar, two teachers, eager attention."""
    width, layers, steps = (16, 1, 16) if small else (128, 2, 200)
    sizes = {"num_layers": layers, "hidden_size": width, "num_heads": 4, "max_positions": 64}
    training = {
        "batch_windows": 4 if small else 16,
        "micro_batch": 2 if small else 8,
        "epochs": 100,
        "max_steps": steps,
        "learning_rate": 2e-3,
        "warmup_steps": 3,
        "evaluate_every_steps": steps // 2,
        "evaluate_windows": 16,
        "checkpoint_every_steps": steps // 8,
        "log_every_steps": 1,
    }
    llama = {"kind": "llama", "intermediate_size": 2 * width, "attention": "eager", **sizes}
    gpt2 = {"kind": "gpt2", "dropout": 0.1, "attention": "eager", **sizes}
    job = {
        "name": "proof",
        "corpus": {"kind": "nursery", "words": 2_000, "dev_words": 400, "pairs_per_task": 2},
        "tokenizer": {"kind": "bpe", "vocab_size": 400},
        "windows": {"length": 32, "offsets": "fixed"},
        "teachers": [
            {"name": "gpt2", "model": gpt2, "training": training},
            {"name": "llama", "model": llama, "training": training},
        ],
        "student": {"model": llama, "training": training},
        "distillation": {"alpha": 0.5, "temperature": 2.0},
        "deepspeed": {"device": device.type},
        "evaluation": {"dev_windows": 16},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(job))), encoding="utf-8")
    return path


class Runs:
    """Runs of one job in one folder; they share a store, so that teachers are trained once."""

    def __init__(self, folder: Path, device: torch.device, *, small: bool) -> None:
        self.folder = folder
        self.job = write_job(folder, device, small=small)

    def to_end(self, name: str, overrides: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """The student's weights of a run of that name, undisturbed."""
        process = self._start(name, overrides)
        code = self._end(process, lambda: False)
        if code != 0:
            raise RuntimeError(f"the run {name} ended with {code}: {self._said(name)}")
        return load_file(self.folder / "runs" / name / "student" / "model.safetensors")

    def killed(self, name: str, overrides: Sequence[str] = (), *, after_step: int) -> int:
        """Kill a run in the student's training, after a step; the step that it had logged."""
        process = self._start(name, overrides)
        self._end(process, lambda: self._step(name) >= after_step)
        if process.returncode == 0:
            raise RuntimeError(f"the run {name} ended before it could be killed")
        return self._step(name)

    def said(self, name: str) -> str:
        """All that a run wrote, of all starts."""
        return self._log(name).read_text(encoding="utf-8", errors="replace")

    def _start(self, name: str, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "babyllama_ds.cli", "run", str(self.job), f"name={name}"]
        words += [*overrides, "--runs", str(self.folder / "runs")]
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                words,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _end(self, process: subprocess.Popen[bytes], struck: Callable[[], bool]) -> int:
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None:
            if struck() or time.monotonic() > deadline:
                process.kill()
                process.wait()
            time.sleep(0.005)
        return process.returncode

    def _step(self, name: str) -> int:
        path = self.folder / "runs" / name / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines: list[Mapping[str, Any]] = [
            json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()
        ]
        return max((line["step"] for line in lines if line["stage"] == "student"), default=0)

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _said(self, name: str) -> str:
        return " | ".join(self.said(name).strip().splitlines()[-4:])


def environment() -> dict[str, str]:
    """Ours, without a rank; cuBLAS repeats itself to the bit."""
    kept = {key: value for key, value in os.environ.items() if key not in RANK}
    return kept | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """‖one − other‖ / ‖one‖ over all weights; 0 only where they are equal to the bit."""
    if one.keys() != other.keys():
        return float("inf")
    if all(torch.equal(one[name], other[name]) for name in one):
        return 0.0
    of = torch.stack([(one[n].double() - other[n].double()).norm() for n in one]).norm()
    return float(of / torch.stack([one[n].double().norm() for n in one]).norm()) or float("inf")
