"""What a report says of where it was made."""

from __future__ import annotations

import json
import os
import platform
import re
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
    for package in ("deepspeed", "transformers", "numpy"):
        assert versions[package] == version(package)
    assert versions["torch"] == torch.__version__
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
def test_without_git_there_is_no_commit_but_the_one_that_was_named(
    git: Git, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(checkout / "empty"))
    assert environment._commit() is None
    monkeypatch.setenv("BABYLLAMA_DS_REVISION", "")
    assert environment._commit() is None
    monkeypatch.setenv("BABYLLAMA_DS_REVISION", "0123abcd")
    assert environment._commit() == "0123abcd"


@needs_git
def test_a_broken_checkout_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".git").mkdir()
    assert environment._commit() is None
    monkeypatch.setenv("BABYLLAMA_DS_REVISION", "0123abcd")  # git is there, and knows of none
    assert environment._commit() is None


def test_a_built_package_knows_its_commit(checkout: Path) -> None:
    written = checkout / "babyllama_ds" / "commit.txt"
    written.write_text("0123456789abcdef" * 2 + "01234567\n")
    assert environment._commit() == "0123456789abcdef" * 2 + "01234567"
    # As it stands in a checkout: what was built from this was no `git archive`.
    written.write_text("$Format:%H$\n")
    assert environment._commit() is None


@needs_git
def test_a_checkout_is_asked_first(git: Git, checkout: Path) -> None:
    (checkout / "babyllama_ds" / "commit.txt").write_text("0123456789abcdef" * 2 + "01234567\n")
    assert environment._commit() == git("rev-parse", "HEAD")


@needs_git
def test_an_archive_of_the_checkout_names_the_commit(git: Git, checkout: Path) -> None:
    package = Path(babyllama_ds.__file__).parent
    for name in (".gitattributes", "babyllama_ds/commit.txt"):
        shutil.copy(package.parent / name, checkout / name)
    git("add", ".")
    git("commit", "--quiet", "--message", "second")
    git("archive", "--format=zip", f"--output={checkout}/archive.zip", "HEAD")
    shutil.rmtree(checkout / ".git")
    assert environment._commit() is None
    shutil.unpack_archive(checkout / "archive.zip", checkout)
    assert re.fullmatch("[0-9a-f]{40}", environment._commit() or "")


def test_what_nodes_compare() -> None:
    compared = environment.compared_code()
    assert json.loads(json.dumps(compared)) == compared
    assert compared["version of torch"] == torch.__version__
    assert compared["python"] == platform.python_version()
    hardware = environment.compared_hardware("cpu")
    assert hardware == {"CPU capability": torch.backends.cpu.get_cpu_capability()}


def test_code_is_the_same_wherever_it_lies_and_another_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(babyllama_ds.__file__).parent
    here = environment.code_hash()
    shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "copy" / "environment.py"))
    assert environment.code_hash() == here
    changed = tmp_path / "copy" / "losses" / "rows.py"
    changed.write_text(changed.read_text() + "\n")
    assert environment.code_hash() != here
