"""Wheels for a machine without internet: which are collected, for whom, and that they install.

An index of tiny wheels stands in for the real one, and for another Python than the tests run on.
pip is asked where tags and what it says matter; elsewhere a function that takes a second less. One
test, marked `network`, asks the real index.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "wheelhouse" / "collect.py"
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("collect", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["collect"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["collect"]


# -- a small index ---------------------------------------------------------------------------------

OWN: Sequence[str] = (
    "torch<2.15,>=2.11",
    "pure>=1",
    "old; python_version < '3.12'",
    "young; python_version >= '3.12'",
    "arm; platform_machine == 'aarch64'",
    "windows; sys_platform == 'win32'",
    "compiled>=1",
    "Deep.One[more]",
    "kernel; extra == 'flash'",
)
INDEX: Mapping[str, Sequence[str]] = {
    "pure-1.5-py3-none-any": ["round"],
    "pure-2.0-py3-none-any": ["round"],
    "round-1.0-py3-none-any": ["pure<2"],
    "old-1.0-py3-none-any": [],
    "young-1.0-py3-none-any": ["pure<2"],
    "arm-1.0-py3-none-any": [],
    "compiled-1.0-cp311-cp311-manylinux2014_aarch64": [],
    "compiled-1.0-cp312-cp312-manylinux_2_17_x86_64": [],
    "compiled-1.1-cp312-cp312-manylinux_2_28_x86_64": [],
    "compiled-1.2-cp312-cp312-manylinux_2_34_x86_64": [],
    "compiled-1.3-cp39-abi3-manylinux_2_39_x86_64": [],
    "compiled-2.0-cp313-cp313-manylinux_2_17_x86_64": [],
    "deep_one-1.0-py3-none-any": ["plain", "further; extra == 'more'", "less; extra == 'less'"],
    "plain-1.0-py3-none-any": ["filelock>=3"],
    "further-1.0-py3-none-any": [],
    "kernel-1.0-py3-none-any": [],
    "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64": ["filelock", "sympy", "setuptools>=77"],
    "torch-2.14.0-cp312-cp312-manylinux_2_28_x86_64": ["filelock", "sympy", "setuptools>=77"],
    "filelock-3.5-py3-none-any": [],
    "setuptools-84.0-py3-none-any": [],
    "sympy-1.0-py3-none-any": [],
}


def write_wheel(folder: Path, stem: str, requires: Sequence[str]) -> Path:
    """A wheel that holds nothing but its description."""
    name, version, tag = stem.split("-", 2)
    about = [f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11"]
    about += [f"Requires-Dist: {one}" for one in requires]
    about += [
        f"Provides-Extra: {one}" for one in re.findall(r"extra == '(\w+)'", "".join(requires))
    ]
    path = folder / f"{stem}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        inside = f"{name}-{version}.dist-info"
        archive.writestr(f"{inside}/METADATA", "\n".join(["Metadata-Version: 2.4", *about, ""]))
        archive.writestr(f"{inside}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{inside}/RECORD", "")
        # As setuptools does, which brings others within it.
        archive.writestr(f"{name}/_vendor/other-1.dist-info/METADATA", "Name: other\n")
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    for stem, requires in INDEX.items():
        write_wheel(folder, stem, requires)
    return folder


Collect = Callable[..., int]


@pytest.fixture
def collect_by_pip(
    script: ModuleType, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Collect:
    """Collect what `needs` says into `tmp_path/house`, from the small index: the exit status."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    pins = tmp_path / "constraints.txt"
    pins.write_text("pure==1.5\ntorch==2.13.0\nunheard-of==1.0\n")

    def run(needs: Sequence[str] = OWN, **given: object) -> int:
        own = write_wheel(tmp_path, "babyllama_ds-0.1.0-py3-none-any", needs)
        options = {"out": tmp_path / "house", "constraints": pins, "python": "3.12", **given}
        words = [f"--{name}={value}" for name, value in options.items()]
        monkeypatch.setattr(sys, "argv", ["collect.py", str(own), *words])
        status: int = script.exit_code_of(script.main)
        return status

    return run


@pytest.fixture
def collect(
    collect_by_pip: Collect, script: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> Collect:
    """The same without pip: the newest version that fits, for Python 3.12 on manylinux_2_28."""

    def stand_in(asked: Any, words: Sequence[str]) -> None:
        for one in map(Requirement, words[words.index(str(asked.folder)) + 1 :]):
            fitting = {
                Version(version): path
                for path in index.glob("*.whl")
                for name, version, tag in [path.stem.split("-", 2)]
                if canonicalize_name(name) == canonicalize_name(one.name)
                if tag in ("py3-none-any", "cp312-cp312-manylinux_2_28_x86_64")
                if version in one.specifier
            }
            copy(fitting[max(fitting)], asked.folder)

    monkeypatch.setattr(script.Index, "_pip", stand_in)
    return collect_by_pip


def in_the(house: Path) -> set[str]:
    """Name and version of every wheel; requirements.txt names the same, with their hashes."""
    found = {}
    for path in house.glob("*.whl"):
        name, version = path.name.split("-")[:2]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[f"{canonicalize_name(name)}=={version}"] = f"--hash=sha256:{digest}"
    lines = (house / "requirements.txt").read_text().splitlines()
    listed = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    assert listed == found
    return set(found) - {"babyllama-ds==0.1.0"}


USUAL = {
    "pure==1.5",
    "round==1.0",
    "young==1.0",
    "compiled==1.1",
    "deep-one==1.0",
    "plain==1.0",
    "further==1.0",
    "filelock==3.5",
    "setuptools==84.0",
}


# -- for whom --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["collect", "collect_by_pip"])
def test_all_that_is_needed_and_no_more(
    how: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    assert request.getfixturevalue(how)() == 0
    assert in_the(tmp_path / "house") == USUAL


OF_TARGETS = ["pure"] + [
    one for one in OWN if one.startswith(("compiled", "old", "young", "arm", "windows"))
]


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ({"platform": "manylinux_2_34_x86_64"}, {"compiled==1.2", "young==1.0"}),
        ({"platform": "manylinux_2_39_x86_64"}, {"compiled==1.3", "young==1.0"}),
        ({"platform": "manylinux2014_x86_64"}, {"compiled==1.0", "young==1.0"}),
        ({"python": "3.13"}, {"compiled==2.0", "young==1.0"}),
        (
            {"python": "3.11", "platform": "manylinux_2_28_aarch64"},
            {"compiled==1.0", "old==1.0", "arm==1.0"},
        ),
    ],
    ids=["glibc 2.34", "glibc 2.39", "glibc 2.17", "Python 3.13", "arm64"],
)
def test_markers_and_tags_are_those_of_the_target(
    target: dict[str, str], found: set[str], collect_by_pip: Collect, tmp_path: Path
) -> None:
    assert collect_by_pip(OF_TARGETS, have="pure", **target) == 0
    assert in_the(tmp_path / "house") == found | {"setuptools==84.0"}


def test_a_torch_of_the_machine_brings_what_it_alone_needs(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect(torch="system") == 0
    assert "the machine has to have torch<2.15,>=2.11" in capsys.readouterr().out
    assert not {"torch==2.13.0", "sympy==1.0"} & in_the(tmp_path / "house")


@pytest.mark.parametrize("version", ["2.13.0", "2.14.0"])
def test_a_torch_in_the_house(collect: Collect, tmp_path: Path, version: str) -> None:
    assert collect(torch=version) == 0
    assert in_the(tmp_path / "house") == USUAL | {f"torch=={version}", "sympy==1.0"}


def test_extras_of_ours(collect: Collect, tmp_path: Path) -> None:
    assert collect(extras="flash") == 0
    assert in_the(tmp_path / "house") == USUAL | {"kernel==1.0"}


# -- what the machine has --------------------------------------------------------------------------


def test_what_the_machine_has_is_left_out_but_not_its_extras(
    collect: Collect, tmp_path: Path
) -> None:
    assert collect(have="deep.one,compiled==1.0") == 0
    gone = {"deep-one==1.0", "plain==1.0", "filelock==3.5", "compiled==1.1"}
    assert in_the(tmp_path / "house") == USUAL - gone


def test_what_pip_found_on_the_machine(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze = tmp_path / "freeze.txt"
    freeze.write_text(
        "# a machine's\n"
        "-e git+https://example.org/mine.git#egg=mine\n"
        "pure==2.5\n"  # `young` cannot do with it
        "round @ file:///builds/round\n"
        "Deep_One @ file:///builds/deep_one-1.0-py3-none-any.whl\n"
        "compiled==0.9\n"  # too old
        "filelock==3.0\n"
        "torch==2.12.0a0+local\n"
        "elsewhere==1.0\n"
        "setuptools==81.0\n"
    )
    assert collect(system=freeze) == 0
    gone = {"round==1.0", "deep-one==1.0", "plain==1.0", "filelock==3.5", "setuptools==84.0"}
    assert in_the(tmp_path / "house") == USUAL - gone
    lines = (tmp_path / "house" / "requirements.txt").read_text().splitlines()
    assert "# The machine has to have torch<2.15,>=2.11" in lines


@pytest.mark.parametrize(("python", "found"), [("3.11", {"setuptools==84.0"}), ("3.12", set())])
def test_the_machines_setuptools_is_left_to_its_torch_unless_an_environment_hides_it(
    python: str, found: set[str], collect: Collect, tmp_path: Path
) -> None:
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("torch==2.11.0\npure==1.5\nround==1.0\nsetuptools==81.0\n")
    assert collect(["torch>=2.11", "pure>=1"], system=freeze, python=python) == 0
    assert in_the(tmp_path / "house") == found


def test_a_house_is_made_anew(collect: Collect, tmp_path: Path) -> None:
    assert collect(torch="2.13.0") == 0
    assert collect() == 0
    assert in_the(tmp_path / "house") == USUAL


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"python": "312"}, "PYTHON: got '312', expected a version >=3.11, written like 3.12"),
        ({"python": "python3"}, "PYTHON: got 'python3'"),
        ({"python": "3.10"}, "PYTHON: got '3.10', expected a version >=3.11"),
        ({"platform": "win_amd64"}, "PLATFORM: got 'win_amd64', expected a Linux by its glibc"),
        ({"torch": "newest"}, "TORCH: got 'newest', expected `system`, or a version"),
        (
            {"extras": "flsh"},
            "EXTRAS: got 'flsh', expected extras of babyllama_ds\n    hint: did you mean `flash`?",
        ),
        ({"have": "compild"}, "HAVE: got 'compild'"),
        ({"have": "compiled>=1"}, "HAVE: got 'compiled>=1', expected names, or name==version"),
        ({"have": "torch==2.9"}, "TORCH=system: got torch 2.9 on the machine, expected torch<2.15"),
    ],
    ids=str,
)
def test_words_that_do_not_do(
    given: dict[str, str],
    told: str,
    collect: Collect,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert collect(**given) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "house").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"python": "3.14"}, "compiled>=1: got no wheel for Python 3.14 on manylinux_2_28_x86_64"),
        (
            {"platform": "manylinux_2_12_x86_64"},
            "compiled>=1: got no wheel for Python 3.12",
        ),
        ({"torch": "2.9.0"}, "torch==2.9.0: got no wheel"),
    ],
    ids=str,
)
def test_what_has_no_wheel_is_named(
    given: dict[str, str],
    told: str,
    collect_by_pip: Collect,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert collect_by_pip(["torch" if "torch" in given else "compiled>=1"], **given) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "hint: another PYTHON or PLATFORM" in err
    assert not (tmp_path / "house").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("", "got no packages"),
        ("Package Version\n------- -------\npure    1.5\n", ":1: got 'Package Version'"),
        ("pure==1.5\ntorch>=2\n", ":2: got 'torch>=2', expected a line of `pip freeze`"),
        ("pure==1.5-what\n", ":1: got 'pure==1.5-what'"),
        ("pure==1.*\n", ":1: got 'pure==1.*'"),
        ("pure==1.5\n", "TORCH: got `system`, and no torch in "),
        ("torch==2.10\n", "TORCH=system: got torch 2.10 on the machine"),
    ],
)
def test_a_list_that_does_not_do(
    text: str | None,
    told: str,
    collect: Collect,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        (tmp_path / "freeze.txt").write_text(text)
    assert collect(system=tmp_path / "freeze.txt") == 2
    assert told in capsys.readouterr().err


def test_an_index_that_does_not_answer_is_no_missing_wheel(
    collect_by_pip: Collect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert collect_by_pip(["unheard-of"]) == 2
    err = capsys.readouterr().err
    assert "pip download: got connection broken by" in err
    assert "expected a package index that answers" in err


def test_pins_that_do_not_agree(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("pure==2.0\n")
    assert collect(constraints=pins) == 2
    assert "young needs pure: got 2.0, expected <2" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "mine.txt").write_text("dear to me")
    assert collect() == 2
    assert "house: got a folder of something else" in capsys.readouterr().err
    assert (tmp_path / "house" / "mine.txt").read_text() == "dear to me"


def test_make_hands_everything_on() -> None:
    given = ["PYTHON=3.12", "PLATFORM=p", "TORCH=t", "EXTRAS=e", "HAVE=h", "SYSTEM=s", "OUT=o"]
    done = subprocess.run(
        ["make", "--dry-run", "wheelhouse", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (one for one in done.stdout.replace("\\\n", " ").splitlines() if "collect.py" in one)
    for word in given:
        name, _, value = word.partition("=")
        assert f'--{name.lower()} "{value}"' in line
    assert "3.12 -m venv" not in done.stdout  # the Python here is another


# -- installed -------------------------------------------------------------------------------------

LACKING = (
    "babyllama-ds",
    "deepspeed",
    "hjson",
    "msgpack",
    "py-cpuinfo",
    "pydantic",
    "pydantic-core",
)


@pytest.mark.network
def test_a_machine_without_internet_is_served(tmp_path: Path) -> None:
    """A machine like this one, less some packages, with compiled ones and deepspeed among them."""
    there = Path(sysconfig.get_path("purelib"))
    lacking = {
        str(part).split("/")[0]
        for one in distributions(path=[str(there)])
        if canonicalize_name(one.name) in LACKING
        for part in one.files or []
    }
    (tmp_path / "behind").mkdir()
    for path in there.iterdir():
        if path.name not in lacking and not path.name.startswith("__editable__"):
            (tmp_path / "behind" / path.name).symlink_to(path)
    freeze = tmp_path / "freeze.txt"
    freeze.write_text(
        "".join(
            f"{one.name}=={one.version}\n" for one in distributions(path=[str(tmp_path / "behind")])
        )
    )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done([*build, "--wheel-dir", tmp_path, tree(tmp_path)], tmp_path)
    (own,) = tmp_path.glob("*.whl")
    words = [sys.executable, SCRIPT, own, "--constraints", ROOT / "constraints.txt"]
    done([*words, "--python", HERE, "--system", freeze, "--out", "house"], tmp_path)
    collected = {name.partition("==")[0] for name in in_the(tmp_path / "house")}
    of_311 = {"setuptools"} if HERE == "3.11" else set()  # its environments hide the machine's
    assert collected | {"babyllama-ds"} == {*LACKING, *of_311}
    deepspeed = next((tmp_path / "house").glob("deepspeed-*-py3-none-any.whl"))
    with zipfile.ZipFile(deepspeed) as archive:
        built = archive.read("deepspeed/git_version_info_installed.py").decode()
    assert "'version': '0.0'" in built  # of no torch
    assert "True" not in built.partition("installed_ops=")[2].partition("\n")[0]

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    place = done([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path)
    (Path(place.strip()) / "behind.pth").write_text(f"{tmp_path / 'behind'}\n")
    done(["sh", tmp_path / "house" / "install.sh", python], tmp_path)
    installed = done([python, "-m", "pip", "list", "--path", place.strip()], tmp_path)
    assert set(LACKING) <= {canonicalize_name(line.split()[0]) for line in installed.splitlines()}
    done([tmp_path / "venv" / "bin" / "babyllama-ds", "check", "nursery"], tmp_path)
    done([python, "-c", "import deepspeed, babyllama_ds.pipeline"], tmp_path)


def test_another_python_is_told(collect: Collect, tmp_path: Path) -> None:
    other = "3.12" if HERE != "3.12" else "3.13"
    assert collect(python=other) == 0
    ended = subprocess.run(
        ["sh", tmp_path / "house" / "install.sh", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert f"got Python {HERE}, expected {other}" in ended.stderr


def tree(folder: Path) -> Path:
    """A copy of what our wheel is built from."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / "tree").mkdir(exist_ok=True)
        copy(ROOT / name, folder / "tree" / name)
    copytree(
        ROOT / "babyllama_ds",
        folder / "tree" / "babyllama_ds",
        ignore=ignore_patterns("__pycache__"),
    )
    return folder / "tree"


def done(words: Sequence[object], folder: Path) -> str:
    """What a command printed that has to succeed, with no way to the checkout but by its words."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    if str(words[0]) != sys.executable:
        kept.pop("PYTHONPATH", None)
    ended = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**kept, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout
