"""Provenance: where, with what and from which commit a run was made, for its report."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from babyllama_ds import __version__
from babyllama_ds.memory import total_host_bytes

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "flash-attn")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Commit, versions and hardware. What is not known is none."""
    return {
        "commit": _commit(),
        "versions": {
            "babyllama_ds": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "hardware": {
            "host_cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(total_host_bytes() / 2**30, 1),
            "cuda_device": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }


def compared_code() -> dict[str, Any]:
    """What must be the same on every node of a run: versions, and this package's own files."""
    return {
        "python": platform.python_version(),
        **{f"version of {name}": _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "code of babyllama_ds": code_hash(),
    }


def compared_hardware(device_kind: str) -> dict[str, Any]:
    """What should be: on a processor or card of another kind, kernels round otherwise."""
    if device_kind == "cuda":
        return {"CUDA device": torch.cuda.get_device_name()}
    return {"CPU capability": torch.backends.cpu.get_cpu_capability()}


def code_hash() -> str:
    """SHA-256 of the package's sources, in short: what is installed, with a commit or without."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The checkout's commit, `+changes` when the tree differs; elsewhere that of the build, or what
    `BABYLLAMA_DS_REVISION` says, which the image sets. It also speaks for a checkout on a machine
    without git, where it is set by who brought it there."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("BABYLLAMA_DS_REVISION") or _commit_of_build()

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except FileNotFoundError:
        return os.environ.get("BABYLLAMA_DS_REVISION") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _commit_of_build() -> str | None:
    """What `git archive` wrote into `commit.txt`; none where the package was built otherwise."""
    try:
        text = Path(__file__).with_name("commit.txt").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else None


def _version(package: str) -> str | None:
    if package == "torch":  # which build, too (`+cu130`): what was installed need not say
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or None
    return platform.processor() or None
