"""Shipped jobs and DeepSpeed files are found by name, other files by path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from babyllama_ds.errors import JobError
from babyllama_ds.spec.shipped import find_file, find_job, shipped_names, shipped_path

ROOT = Path(__file__).parents[3]


def test_the_repositorys_files_are_the_packages() -> None:
    names = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
    assert shipped_names("ds_configs") == names
    assert {"zero2_cpu", "zero2_cpu_fp32", "zero2_cuda"} <= set(names)
    for name in names:
        found = shipped_path("ds_configs", name)
        assert found.resolve() == (ROOT / "ds_configs" / f"{name}.json").resolve()
        json.loads(found.read_text())
    assert (ROOT / "babyllama_ds" / "jobs").resolve() == (ROOT / "launcher" / "jobs").resolve()


@pytest.mark.parametrize("name", ["zero2_cpu", "zero2_cpu.json"])
def test_a_bare_name_is_a_shipped_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("ds_configs", name) == shipped_path("ds_configs", "zero2_cpu")


def test_a_file_that_is_there_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nursery").write_text("name: mine")
    assert find_job("nursery") == Path("nursery")
    assert find_job("some/where.yaml") == Path("some/where.yaml")


@pytest.mark.parametrize("name", ["zero2_cpo", "..", "", "zero3"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(JobError) as caught:
        find_file("ds_configs", name)
    (problem,) = caught.value.problems
    assert problem.got == "no such file"
    assert "shipped DeepSpeed configuration" in problem.expected
    assert "zero2_cpu" in (problem.hint or "")


def test_an_unknown_job_is_refused() -> None:
    with pytest.raises(
        JobError, match="no-such-job: got no such file, expected a file's path or a shipped job"
    ):
        find_job("no-such-job")


def test_a_directory_is_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    with pytest.raises(JobError, match="jobs: got a directory, expected a file's path"):
        find_job("jobs")
