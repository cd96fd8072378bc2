"""Installed packages: do they fit what this one requires, each other, and the driver?

The ranges are those of the package's own metadata (`pyproject.toml`), so they stand in one place.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from babyllama_ds.doctor.findings import Finding, failure, ok, warning

SHOWN = ("torch", "deepspeed", "transformers")
REINSTALL = "make setup, or: pip install -c constraints.txt -e ."
DRIVER_FILE = Path("/proc/driver/nvidia/version")
DRIVER_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True, kw_only=True)
class KnownBug:
    """A range of DeepSpeed versions that computes wrongly here, and where it is told."""

    versions: str
    issue: str
    what: str


KNOWN_BUGS = (
    KnownBug(
        versions="<0.17.5",
        issue="#7188",
        what="overlap_comm reuses a gradient bucket too early (the loss falls to 0)",
    ),
    KnownBug(
        versions=">=0.17.6,<0.18.3",
        issue="#7718",
        what="wrong ZeRO-2 gradients (norms about a third of the right ones)",
    ),
    KnownBug(
        versions=">=0.18.3,<0.19.8",
        issue="#8224",
        what="ZeRO-2 loses gradients of a module used twice in a forward pass, in bf16",
    ),
    KnownBug(
        versions="<0.18.6",
        issue="#7829",
        what="ZeRO-2 takes gradients for complete that are not",
    ),
    KnownBug(
        versions="<0.19.3",
        issue="#8035",
        what="one infinite bf16 gradient turns AdamW's moments into NaN",
    ),
    KnownBug(
        versions="<0.19.3",
        issue="#8061",
        what="overlap_comm with torch.compile reads gradients too early (NaN)",
    ),
)
"""Issues of github.com/deepspeedai/DeepSpeed."""


def versions() -> list[Finding]:
    """Packages against their ranges, DeepSpeed against its known bugs, CUDA against the driver."""
    return [_packages(), _deepspeed(), *_cuda()]


def _packages() -> Finding:
    wrong = list(_misfits())
    if wrong:
        return failure("packages", "; ".join(wrong), remedy=REINSTALL)
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    return ok("packages", f"{shown}, and all others within the required ranges")


def _misfits() -> Iterator[str]:
    for line in requires("babyllama_ds") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue  # of an extra, or of another platform
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield f"{wanted.name} is missing, required {wanted.specifier}"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} {found}, required {wanted.specifier}"


def _deepspeed() -> Finding:
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        return failure("deepspeed", "not installed", remedy=REINSTALL)
    bugs = [
        f"{bug.issue}: {bug.what}"
        for bug in KNOWN_BUGS
        if SpecifierSet(bug.versions).contains(found, prereleases=True)
    ]
    if bugs:
        return failure("deepspeed", f"{found} has known bugs. {'; '.join(bugs)}", remedy=REINSTALL)
    return ok("deepspeed", f"{found} has none of the {len(KNOWN_BUGS)} known gradient bugs")


def _cuda() -> Iterator[Finding]:
    built_for = torch.version.cuda
    driver = _driver_cuda()
    if built_for is None:
        if DRIVER_FILE.exists():
            yield warning(
                "cuda",
                f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA",
                remedy="install torch from the CUDA index (pytorch.org/get-started) to use the GPU",
            )
        return
    if driver is None or not any(driver):
        yield from _no_driver(is_loaded=driver is not None)
        return
    found = f"torch is built for CUDA {built_for}; the driver supports {driver[0]}.{driver[1]}"
    # Within one major version any driver runs any build (CUDA's minor-version compatibility).
    if driver[0] < int(built_for.partition(".")[0]):
        remedy = f"update the NVIDIA driver, or install a torch built for CUDA {driver[0]}"
        yield failure("cuda", found, remedy=remedy)
    elif not torch.cuda.is_available():
        yield failure(
            "cuda",
            f"{found}, yet torch cannot use the card",
            remedy="run nvidia-smi; a restart after a driver update usually helps",
        )
    else:
        yield ok("cuda", found)


def _no_driver(*, is_loaded: bool) -> Iterator[Finding]:
    """Nothing of a build with CUDA on a machine without a card: many are installed so.

    The image for GPUs is not; and a container that was given none sees the kernel's part of its
    host's driver all the same.
    """
    if os.environ.get("BABYLLAMA_DS_FORM") == "cuda":
        yield warning(
            "cuda",
            "this is the image for GPUs, and the container was given none: jobs run on the CPU",
            remedy="docker run --gpus all; the host needs its NVIDIA driver, and the NVIDIA "
            "Container Toolkit",
        )
    elif is_loaded:
        yield failure(
            "cuda",
            f"there is an NVIDIA driver, but its library {DRIVER_LIBRARY} is not found",
            remedy="install the driver's libraries (run nvidia-smi); in a container, start it with "
            "its GPUs (docker run --gpus all)",
        )


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; none without a driver, (0, 0) without its
    library."""
    if not DRIVER_FILE.exists() and not torch.cuda.is_available():
        return None
    try:
        library = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return 0, 0
    number = ctypes.c_int()
    # Needs no cuInit, so no card is touched. torch has no word of its own for it.
    library.cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10
