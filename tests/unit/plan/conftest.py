"""Jobs to plan: the shipped nursery with changes, and one of text files in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job

Nursery = Callable[..., JobSpec]
FilesJob = Callable[..., JobSpec]


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    """The shipped job, with overrides."""
    return lambda *overrides: load_job(find_job("nursery"), overrides)


@pytest.fixture(scope="session")
def reload_nursery() -> Callable[[Sequence[str]], Callable[[Sequence[str]], JobSpec]]:
    """What the command line gives to `check_fits`: the same job with more overrides."""
    return lambda first: lambda more: load_job(find_job("nursery"), [*first, *more])


@pytest.fixture
def files_job(tmp_path: Path, nursery: Nursery) -> FilesJob:
    """Ten thousand bytes of training text and two thousand of development text."""
    (tmp_path / "a.train").write_text("x" * 9_999 + "\n", encoding="utf-8")
    (tmp_path / "a.dev").write_text("y" * 1_999 + "\n", encoding="utf-8")

    def make(*overrides: str) -> JobSpec:
        corpus = (
            f"corpus={{kind: files, train: ['{tmp_path}/*.train'], "
            f"split: {{kind: held_out, dev: ['{tmp_path}/*.dev']}}}}"
        )
        return nursery(corpus, *overrides)

    return make
