"""What a report says of where it was made."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import babyllama_ds
from babyllama_ds import environment
from babyllama_ds.environment import PACKAGES, describe_environment

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def test_versions_and_hardware() -> None:
    described = describe_environment(torch.device("cpu"))
    assert json.loads(json.dumps(described)) == described
    assert set(described) == {"commit", "versions", "hardware"}
    versions, hardware = described["versions"], described["hardware"]
    assert versions["babyllama_ds"] == babyllama_ds.__version__
    assert versions["python"] == platform.python_version()
    for package in ("torch", "deepspeed", "transformers", "numpy"):
        assert versions[package] == version(package)
    assert set(versions) == {"babyllama_ds", "python", "cuda", *PACKAGES}
    assert hardware["cores"] == len(os.sched_getaffinity(0))
    assert hardware["cuda_device"] is None
    assert 0 < hardware["memory_gib"] < 100_000
    assert hardware["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package-here",))
    versions = describe_environment(torch.device("cpu"))["versions"]
    assert versions["no-such-package-here"] is None


def test_a_cuda_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    described = describe_environment(torch.device("cuda", 3))
    assert described["hardware"]["cuda_device"] == "card 3"


# -- the commit ------------------------------------------------------------------------------------

Git = Callable[..., str]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the package seems to lie in."""
    (tmp_path / "babyllama_ds").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "babyllama_ds" / "environment.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # as within a hook
    return tmp_path


@pytest.fixture
def git(checkout: Path) -> Git:
    def run(*words: str) -> str:
        who = ("-c", "user.name=A Name", "-c", "user.email=a@example.org")
        done = subprocess.run(
            ["git", "-C", str(checkout), *who, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    run("init", "--quiet")
    (checkout / "tracked").write_text("one")
    run("add", "tracked")
    run("commit", "--quiet", "--message", "first")
    return run


@needs_git
def test_the_commit_of_a_checkout(
    checkout: Path, git: Git, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = git("rev-parse", "HEAD")
    assert len(head) == 40
    assert environment._commit() == head
    monkeypatch.setenv("BABYLLAMA_DS_REVISION", "0123abcd")  # a checkout mounted into an image
    (checkout / "untracked").write_text("a run's output, say")
    assert environment._commit() == head
    (checkout / "tracked").write_text("two")
    assert environment._commit() == f"{head}+changes"


def test_outside_a_checkout_there_is_no_commit_but_an_images(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment._commit() is None
    monkeypatch.setenv("BABYLLAMA_DS_REVISION", "")
    assert environment._commit() is None
    monkeypatch.setenv("BABYLLAMA_DS_REVISION", "0123abcd")
    assert environment._commit() == "0123abcd"


@needs_git
def test_without_git_there_is_no_commit(
    git: Git, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(checkout / "empty"))
    assert environment._commit() is None


def test_a_broken_checkout_has_no_commit(checkout: Path) -> None:
    (checkout / ".git").mkdir()
    assert environment._commit() is None
