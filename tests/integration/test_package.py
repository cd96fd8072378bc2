"""What is shipped: the sdist and the wheel hold the package, whole, and it works from there.

They are built from a copy of this tree, without isolation, and installed into an environment that
sees the packages of this one: nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email.parser import HeaderParser
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import babyllama_ds

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
NOT_COPIED = (".git", ".venv", ".*_cache", ".hypothesis", "runs", "build", "dist", "wheelhouse")
FOR_PEOPLE = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "constraints.txt"}

Contents = Mapping[str, bytes]


def command(words: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run outside of the checkout, with no way to it in the environment."""
    dropped = ("PYTHON", "PIP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        env={**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:  # the launcher's ranks too, when their time is up
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def done(words: Sequence[object], folder: Path) -> str:
    """What a command printed that has to succeed."""
    ended = command(words, folder)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `dist/`, an sdist and the wheel that was built from it, and `direct/`, a wheel."""
    folder = tmp_path_factory.mktemp("package")
    ignored = ignore_patterns(*NOT_COPIED, "__pycache__", "*.egg-info")
    copytree(ROOT, folder / "tree", symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "build", "--no-isolation", "tree"]
    done([*build, "--outdir", "dist"], folder)
    done([*build, "--outdir", "direct", "--wheel"], folder)
    return folder


@pytest.fixture(scope="module")
def package(folder: Path) -> Contents:
    """Every file of the package as it stands in the tree; links are followed."""
    found: dict[str, bytes] = {}
    # Not `rglob`, which does not enter linked folders.
    for place, _, names in os.walk(ROOT / "babyllama_ds", followlinks=True):
        for path in (Path(place) / name for name in names):
            if "__pycache__" not in path.parts:
                found[str(path.relative_to(ROOT))] = path.read_bytes()
    assert {"babyllama_ds/jobs/nursery.yaml", "babyllama_ds/ds_configs/zero2_cpu.json"} <= set(
        found
    )
    return found


@pytest.fixture(scope="module")
def sdist(folder: Path) -> Contents:
    (path,) = (folder / "dist").glob("*.tar.gz")
    assert path.name == f"babyllama_ds-{babyllama_ds.__version__}.tar.gz"
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            assert member.isreg() or member.isdir(), f"{member.name} is a link"
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                found[member.name.partition("/")[2]] = file.read()
    return found


@pytest.fixture(scope="module", params=["dist", "direct"])
def wheel(folder: Path, request: pytest.FixtureRequest) -> Contents:
    (path,) = (folder / request.param).glob("*.whl")
    assert path.name == f"babyllama_ds-{babyllama_ds.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            assert not stat.S_ISLNK(member.external_attr >> 16), f"{member.filename} is a link"
        return {name: archive.read(name) for name in archive.namelist()}


def of_the_package(contents: Contents) -> Contents:
    return {name: text for name, text in contents.items() if name.startswith("babyllama_ds/")}


# -- what they hold --------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Contents, package: Contents) -> None:
    assert of_the_package(wheel) == package
    others = {name.partition("/")[0] for name in wheel.keys() - package.keys()}
    assert others == {f"babyllama_ds-{babyllama_ds.__version__}.dist-info"}


def test_the_sdist_holds_the_package_and_its_documents(sdist: Contents, package: Contents) -> None:
    assert of_the_package(sdist) == package
    documents = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.*")}
    contributing = {"CONTRIBUTING.md"} & {path.name for path in ROOT.iterdir()}
    assert FOR_PEOPLE | contributing | documents | {"pyproject.toml", "PKG-INFO"} <= sdist.keys()
    for name in FOR_PEOPLE | documents:
        assert sdist[name] == (ROOT / name).read_bytes()
    # Tests need a checkout: its Makefile, its launcher, its documents. The field ships none.
    rooms = {name.partition("/")[0] for name in sdist if "/" in name}
    assert rooms == {"babyllama_ds", "babyllama_ds.egg-info", "docs"}


def test_the_metadata_is_that_of_the_project(wheel: Contents) -> None:
    (about,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
    told = HeaderParser().parsestr(wheel[about].decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert told["Version"] == babyllama_ds.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == project["requires-python"]
    required = [Requirement(text) for text in told.get_all("Requires-Dist", [])]
    plain = {str(one) for one in required if "extra" not in str(one.marker)}
    assert plain == {str(Requirement(text)) for text in project["dependencies"]}
    assert set(told.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)


# -- installed -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bin_folder(folder: Path) -> Path:
    """Of a new environment with the wheel of `dist/`, and the packages of this one behind it."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = (folder / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    done([*pip, "--no-index", "--no-deps", wheel], folder)
    ours = done([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    behind = Path(ours.strip()) / "behind.pth"
    behind.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python.parent


def test_the_installed_package_is_the_one_of_the_wheel(bin_folder: Path, folder: Path) -> None:
    words = [bin_folder / "python", "-c", "import babyllama_ds; print(babyllama_ds.__file__)"]
    assert Path(done(words, folder).strip()).is_relative_to(folder / "venv")
    assert done([bin_folder / "babyllama-ds", "--version"], folder).strip() == (
        babyllama_ds.__version__
    )


@pytest.mark.parametrize("job", ["nursery", "babyllama"])
def test_shipped_jobs_are_found_by_name(
    bin_folder: Path, folder: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BABYLM_DATA", "/data/babylm")
    resolved = yaml.safe_load(done([bin_folder / "babyllama-ds", "check", job, "seed=7"], folder))
    assert resolved["seed"] == 7
    assert resolved["name"].startswith(job)


def test_the_schema_is_that_of_the_checkout(bin_folder: Path, folder: Path) -> None:
    schema = json.loads(done([bin_folder / "babyllama-ds", "schema"], folder))
    assert schema == json.loads((ROOT / "launcher" / "jobs" / "job.schema.json").read_text())


SHORT = {"batch_windows": 8, "epochs": 1, "max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 1}
LLAMA = {"kind": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
TINY: Mapping[str, Any] = {
    "corpus.words": 4000,
    "corpus.dev_words": 1500,
    "corpus.pairs_per_task": 4,
    "tokenizer.vocab_size": 400,
    "teachers": [
        {"name": "one", "model": {**LLAMA, "intermediate_size": 48}, "training": SHORT},
    ],
    "student.training": SHORT,
    "evaluation.samples": 0,
    "control": None,
}


@pytest.mark.launch
def test_a_job_runs_on_two_ranks_without_a_checkout(bin_folder: Path, folder: Path) -> None:
    # What `bin/deepspeed` is, which the environment behind has.
    launcher = [bin_folder / "python", "-m", "deepspeed.launcher.runner", "--num_gpus", 2]
    ours = ["--module", "babyllama_ds.cli.launch", "nursery", "--runs", "there"]
    tiny = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    done([*launcher, "--quiet", "--master_port", free_port(), *ours, *tiny], folder)
    run_dir = folder / "there" / "nursery-1"
    assert json.loads((run_dir / "state.json").read_text())["status"] == "done"
    report = json.loads((run_dir / "report" / "report.json").read_text())
    assert {"student", "one"} <= report["models"].keys()
    assert "<svg" in (run_dir / "report" / "report.html").read_text(encoding="utf-8")
    # The tree that this was built from is no archive of a commit.
    assert report["environment"]["commit"] is None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
