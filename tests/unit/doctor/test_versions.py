"""Versions that fit and those that do not, by what the metadata and the driver say."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import pytest
import torch

from babyllama_ds.doctor import versions as module
from babyllama_ds.doctor.findings import Finding


def finding(check: str) -> Finding:
    (found,) = [each for each in module.versions() if each.check == check]
    return found


def pretend(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    def version(name: str) -> str:
        told = changed[name] if name in changed else installed(name)
        if told is None:
            raise PackageNotFoundError(name)
        return told

    monkeypatch.setattr(module, "version", version)


def test_what_is_installed_here_fits() -> None:
    packages = finding("packages")
    assert packages.status == "ok"
    assert f"deepspeed {installed('deepspeed')}" in packages.found
    assert finding("deepspeed").status == "ok"


def test_packages_outside_the_required_ranges_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, transformers="4.57.1", tqdm=None)
    found = finding("packages")
    assert found.status == "failure"
    assert (
        found.found == "transformers 4.57.1, required <6,>=5.17; tqdm is missing, required >=4.67"
    )
    assert "make setup" in (found.remedy or "")


def test_extras_are_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **{"flash-attn": None, "pytest": None})
    assert finding("packages").status == "ok"


@pytest.mark.parametrize(
    ("version", "issues"),
    [
        ("0.17.4", {"#7188", "#7829", "#8035", "#8061"}),
        ("0.18.2", {"#7718", "#7829", "#8035", "#8061"}),
        ("0.18.4", {"#8224", "#7829", "#8035", "#8061"}),
        ("0.19.2", {"#8224", "#8035", "#8061"}),
        ("0.19.7", {"#8224"}),
        ("0.19.8", set()),
    ],
)
def test_bad_versions_of_deepspeed(
    version: str, issues: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, deepspeed=version)
    found = finding("deepspeed")
    assert found.status == ("failure" if issues else "ok")
    assert found.found.startswith(version)
    assert {word.strip(":") for word in found.found.split() if word.startswith("#")} == issues


def test_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, deepspeed=None)
    found = finding("deepspeed")
    assert (found.status, found.found) == ("failure", "not installed")


# -- CUDA ------------------------------------------------------------------------------------------


def pretend_cuda(
    monkeypatch: pytest.MonkeyPatch,
    built_for: str | None,
    driver: tuple[int, int] | None,
    *,
    usable: bool,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(module, "_driver_cuda", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)


@pytest.mark.parametrize(
    ("driver", "usable", "status", "told"),
    [
        ((13, 0), True, "ok", "torch is built for CUDA 12.8; the driver supports 13.0"),
        ((12, 4), True, "ok", "the driver supports 12.4"),  # minor-version compatibility
        ((11, 8), False, "failure", "the driver supports 11.8"),
        ((12, 8), False, "failure", "torch cannot use the card"),
    ],
)
def test_torch_and_the_driver(
    driver: tuple[int, int],
    usable: bool,
    status: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_cuda(monkeypatch, "12.8", driver, usable=usable)
    found = finding("cuda")
    assert found.status == status
    assert told in found.found
    assert (found.remedy is None) == (status == "ok")


def test_without_a_card_cuda_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BABYLLAMA_DS_FORM", raising=False)
    pretend_cuda(monkeypatch, "12.8", None, usable=False)
    assert "cuda" not in {each.check for each in module.versions()}


@pytest.mark.parametrize("driver", [None, (0, 0)])
def test_the_image_for_gpus_says_that_it_was_given_none(
    driver: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(0, 0) is what torch is told where the host's kernel has a driver, and the container not."""
    monkeypatch.setenv("BABYLLAMA_DS_FORM", "cuda")
    pretend_cuda(monkeypatch, "13.0", driver, usable=False)
    found = finding("cuda")
    assert found.status == "warning"  # a container is healthy with it
    assert "the container was given none: jobs run on the CPU" in found.found
    assert found.remedy is not None
    assert "docker run --gpus all" in found.remedy


def test_a_driver_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that is too old."""
    monkeypatch.delenv("BABYLLAMA_DS_FORM", raising=False)
    pretend_cuda(monkeypatch, "13.0", (0, 0), usable=False)
    found = finding("cuda")
    assert found.status == "failure"
    assert "libcuda.so.1 is not found" in found.found


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_drivers_library_is_asked_what_it_supports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library with the function of CUDA's driver API, of a kernel that has a driver."""
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuDriverGetVersion(int *v) { *v = 13020; return 0; }", encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    monkeypatch.setattr(module, "DRIVER_FILE", source)
    monkeypatch.setattr(module, "DRIVER_LIBRARY", str(library))
    assert module._driver_cuda() == (13, 2)
    monkeypatch.setattr(module, "DRIVER_LIBRARY", str(tmp_path / "none.so"))
    assert module._driver_cuda() == (0, 0)
    monkeypatch.setattr(module, "DRIVER_FILE", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module._driver_cuda() is None


def test_a_card_that_torch_was_not_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cuda(monkeypatch, None, None, usable=False)
    monkeypatch.setattr(module, "DRIVER_FILE", tmp_path)
    found = finding("cuda")
    assert found.status == "warning"
    assert "built without CUDA" in found.found
