"""What of the image needs no build: its pins agree, its files are sound, so is its entry point."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from babyllama_ds.cli.parser import command_line

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
LOCKS = ("runtime", "cuda", "flash", "build")
BIN = Path(sys.executable).parent

# What the entry point takes from its environment, and the launcher.
OWN_WORDS = ("DS_ACCELERATOR", "NPROC", "RUNS", "MASTER_PORT", "BABYLLAMA_DS_FORM")

# What markers are asked with: the two Pythons of the image's two forms.
PLATFORM = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
PYTHONS = ("3.11", "3.12")


def python_environment(python: str) -> dict[str, str]:
    return {**PLATFORM, "python_version": python, "python_full_version": f"{python}.2", "extra": ""}


def argument(name: str) -> str:
    """The default of a build argument."""
    found = re.search(rf"^ARG {name}=\"?([^\"\n]*)", DOCKERFILE, re.M)
    assert found, name
    return found[1]


@dataclass(frozen=True)
class Locked:
    """A package in a lock."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def version(self) -> str:
        (pin,) = self.requirement.specifier
        assert pin.operator == "=="
        return pin.version


def read_lock(name: str) -> dict[str, Locked]:
    text = (DOCKER / f"{name}.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    locked = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        words, *hashes = line.split("--hash=")
        requirement = Requirement(words.strip())
        locked[canonicalize_name(requirement.name)] = Locked(
            requirement, tuple(each.strip() for each in hashes)
        )
    return locked


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }


# -- the locks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_by_the_sha_256_of_its_files(name: str) -> None:
    locked = read_lock(name)
    assert locked
    for package, each in locked.items():
        assert each.version, package
        assert each.hashes, package
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for found in each.hashes), package


@pytest.mark.parametrize("name", LOCKS)
def test_locks_and_constraints_agree(name: str) -> None:
    pins = constraints()
    for package, each in read_lock(name).items():
        assert each.version == pins.get(package, each.version), package


def test_the_constraints_name_all_that_runs_on_a_cpu() -> None:
    pins = constraints()
    assert "torch" not in read_lock("runtime")
    unknown = {
        package
        for package, each in read_lock("runtime").items()
        if package not in pins and any(applies(each.requirement, python) for python in PYTHONS)
    }
    assert unknown == set()
    assert read_lock("cuda")["torch"].version == pins["torch"]


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(python_environment(python))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_image_has_all_that_is_required(python: str) -> None:
    """Following what installed packages say of themselves, from this one on: of another version
    than the lock's they may say something else."""
    there = {
        package: each.version
        for name in ("runtime", "cuda")
        for package, each in read_lock(name).items()
        if applies(each.requirement, python)
    }
    wanted, seen = [Requirement("babyllama_ds")], set()
    while wanted:
        each = wanted.pop()
        name = canonicalize_name(each.name)
        if (installed := other_version(name, there.get(name))) is not None:
            pytest.skip(f"{name} {installed} is installed, {there[name]} is locked (make setup)")
        for line in of_package(each.name):
            needed = Requirement(line)
            extras = {"", *each.extras}
            if not any(
                needed.marker is None
                or needed.marker.evaluate({**python_environment(python), "extra": extra})
                for extra in extras
            ):
                continue
            package = canonicalize_name(needed.name)
            assert package in there, f"{name} requires {needed}"
            assert needed.specifier.contains(there[package], prereleases=True), f"{name}: {needed}"
            if (package, *sorted(needed.extras)) not in seen:
                seen.add((package, *sorted(needed.extras)))
                wanted.append(needed)
    assert len(seen) > 60


def other_version(name: str, locked: str | None) -> str | None:
    """The installed version, if it is not the locked one; builds of one version are alike."""
    try:
        installed = Version(version(name))
    except PackageNotFoundError:
        return None
    same = locked is None or installed.public == Version(locked).public
    return None if same else str(installed)


@pytest.mark.parametrize("python", PYTHONS)
def test_kernels_can_import_torch_before_the_other_packages_are_there(python: str) -> None:
    """DeepSpeed and FlashAttention ask torch how they are to be built; a build without isolation
    has what stands in the locks that come before theirs, and nothing else."""
    there = {
        package
        for name in ("build", "cuda")
        for package, each in read_lock(name).items()
        if applies(each.requirement, python)
    }
    wanted, missing = ["torch"], set[str]()
    while wanted:
        package = canonicalize_name(wanted.pop())
        if package not in there:
            missing.add(package)
            continue
        wanted += [
            needed.name
            for line in of_package(package)
            if applies(needed := Requirement(line), python)
        ]
    assert missing == set()


def of_package(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []  # a library of CUDA's, where there is no CUDA


def test_constraints_are_within_the_required_ranges_of_this_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (flash,) = map(Requirement, project["optional-dependencies"]["flash"])
    assert flash.specifier.contains(read_lock("flash")["flash-attn"].version)


# -- versions --------------------------------------------------------------------------------------


def test_the_bases_have_the_cuda_that_torch_is_built_for() -> None:
    """Of another one DeepSpeed's build refuses to know (its `assert_no_cuda_mismatch`)."""
    devel, runtime = argument("BASE_DEVEL"), argument("BASE_RUNTIME")
    found = re.fullmatch(r"nvidia/cuda:(\d+\.\d+\.\d+)-devel-(ubuntu\d\d\.04)", devel)
    assert found, devel
    assert runtime == f"nvidia/cuda:{found[1]}-base-{found[2]}"
    base, torchs = Version(found[1]), Version(read_lock("cuda")["cuda-toolkit"].version)
    assert (base.major, base.minor) == (torchs.major, torchs.minor)
    # Of the libraries that torch brings, those with CUDA's major version in their names too.
    named = {n[1] for p in read_lock("cuda") if (n := re.fullmatch(r"nvidia-.*-cu(\d+)", p))}
    assert named == {str(base.major)}


def test_deepspeeds_check_accepts_that_cuda() -> None:
    """Its own function, told what nvcc and torch of the image would say."""
    import torch
    from deepspeed.ops.op_builder import builder

    base = re.search(r"cuda:(\d+)\.(\d+)", argument("BASE_DEVEL"))
    assert base
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_SKIP_CUDA_CHECK", raising=False)
        patch.setattr(builder, "installed_cuda_version", lambda _="": (int(base[1]), int(base[2])))
        toolkit = Version(read_lock("cuda")["cuda-toolkit"].version)
        patch.setattr(torch.version, "cuda", f"{toolkit.major}.{toolkit.minor}")
        assert builder.assert_no_cuda_mismatch()
        patch.setattr(torch.version, "cuda", f"{toolkit.major}.{toolkit.minor + 1}")
        with pytest.raises(builder.CUDAMismatchException):
            builder.assert_no_cuda_mismatch()


def test_the_python_is_the_bases_and_one_that_the_package_takes() -> None:
    of_ubuntu = {"ubuntu24.04": "python3.12"}
    assert argument("PYTHON") == of_ubuntu[argument("BASE_DEVEL").rpartition("-")[2]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = project["requires-python"].removeprefix(">=")
    assert PYTHONS[0] == least
    assert argument("PYTHON") == f"python{PYTHONS[1]}"


def test_architectures_are_those_from_a100_to_blackwell() -> None:
    named = argument("TORCH_CUDA_ARCH_LIST").split(";")
    assert named == ["8.0", "8.6", "8.9", "9.0", "10.0+PTX"]
    of_flash = argument("FLASH_ATTN_CUDA_ARCHS").split(";")
    assert of_flash == ["80", "90", "100"]


# -- the Dockerfile --------------------------------------------------------------------------------


def instructions(kind: str) -> Iterator[str]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == kind:
            yield rest


def test_labels_say_where_it_comes_from() -> None:
    (labels,) = instructions("LABEL")
    found = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', labels))
    assert found["version"] == "${VERSION}"
    assert found["revision"] == "${REVISION}"
    assert found["source"] == "${SOURCE}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found["licenses"] == project["license"]
    assert found["description"] == project["description"]
    assert set(found) >= {"title"}
    arguments = re.search(r'babyllama_ds\.arguments="([^"]*)"', labels)
    assert arguments
    of_cards = {"FORM", "TORCH_CUDA_ARCH_LIST", "FLASH_ATTN_CUDA_ARCHS"}
    assert set(re.findall(r"(\w+)=\$\{\1\}", arguments[1])) == of_cards
    # An argument has no value in a stage that does not name it.
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert of_cards <= set(re.findall(r"^ARG (\w+)", last, re.M))


def test_any_user_may_write_what_is_mounted_and_what_is_kept() -> None:
    """A volume has the mode of the folder that it is mounted on, and without one is root's."""
    (run,) = (rest for rest in instructions("RUN") if "install -d" in rest)
    made = re.search(r"install -d -m 1777((?: /[\w./]+)+)", run)
    assert made
    folders = set(made[1].split())
    whole = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = whole["services"].values()
    written = {each["target"] for each in service["volumes"] if not each.get("read_only")}
    assert written <= folders
    (variables,) = (rest for rest in instructions("ENV") if "HOME=" in rest)
    named = dict(word.split("=", 1) for word in variables.split())
    assert {named["HOME"], named["RUNS"]} <= folders
    for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert named[cache].startswith(f"{named['HOME']}/.cache/"), cache


def test_it_runs_as_an_ordinary_user_and_knows_how_it_is() -> None:
    assert list(instructions("USER")) == ["1000:1000"]
    (health,) = instructions("HEALTHCHECK")
    words = yaml.safe_load(health.partition("CMD ")[2])
    parsed = command_line().parse_args(words[1:])
    assert words[0] == "babyllama-ds"
    assert parsed.quick


def test_all_that_is_copied_is_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    for copied in instructions("COPY"):
        if copied.startswith("--from"):
            continue
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.partition("/")[0] in sent, source


def test_every_word_of_the_shells_is_sound() -> None:
    folders = (".ci", "docker", "launcher", "tests")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    scripts = [path for path in files if re.match(rb"#!.*[/ ](ba)?sh\b", path.read_bytes()[:80])]
    assert {path.name for path in scripts} >= {"run", "entrypoint.sh", "test.sh"}
    ask(tool("shellcheck"), *scripts)


def test_the_dockerfile_is_sound() -> None:
    ask(tool("hadolint"), DOCKER / "Dockerfile")


def tool(name: str) -> Path:
    path = BIN / name
    if not path.exists():
        pytest.skip(f"{name} is not installed (make setup)")
    return path


def ask(*words: object) -> None:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- compose ---------------------------------------------------------------------------------------


def test_compose_gives_what_ranks_on_gpus_need() -> None:
    whole = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = whole["services"].values()
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert set(service["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
    assert service["shm_size"] == "1gb"
    assert service["ulimits"]["memlock"] == -1
    mounts = {volume["target"]: volume for volume in service["volumes"]}
    assert set(mounts) == {"/runs", "/data", "/home/babyllama/.cache"}
    assert mounts["/data"]["read_only"] is True
    assert service["environment"]["BABYLM_DATA"] == "/data"
    assert service["stop_grace_period"] == "2m"


# -- the entry point -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the entry point did: its status, the program that it started, and what it said."""

    code: int
    started: list[str]
    err: str


@pytest.fixture
def enter(tmp_path: Path) -> Callable[..., Answer]:
    """The entry point with programs that only tell with what they were started."""
    stubs, told = tmp_path / "stubs", tmp_path / "told.txt"
    stubs.mkdir()

    def stub(name: str, body: str) -> None:
        (stubs / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (stubs / name).chmod(0o755)

    # What it was started with, one word a line; and how DeepSpeed is to compute.
    tell = f'printf "%s\\n" "$(basename "$0")" "$@" "DS_ACCELERATOR=$DS_ACCELERATOR" >{told}'
    stub("deepspeed", f"{tell}; exit ${{STUB_STATUS:-0}}")
    stub("babyllama-ds", tell)
    stub("python", f'exec {sys.executable} "$@"')

    def begin(*words: str, gpus: int = 0, **env: str) -> Answer:
        cards = "\n".join(f"echo 'GPU {i}: card'" for i in range(gpus))
        stub("nvidia-smi", cards or "exit 9")
        told.unlink(missing_ok=True)
        plain = {k: v for k, v in os.environ.items() if k not in OWN_WORDS}
        path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [DOCKER / "entrypoint.sh", *words],
            env={**plain, "PATH": path, "RUNS": str(tmp_path / "runs"), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        started = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
        return Answer(done.returncode, started, done.stderr)

    return begin


def test_a_job_is_launched_on_all_gpus(enter: Callable[..., Answer], tmp_path: Path) -> None:
    answer = enter("nursery", "seed=2", gpus=4)
    assert answer == Answer(
        0,
        [
            *("deepspeed", "--quiet", "--num_gpus", "4", str(ROOT / "launcher" / "run.py")),
            *("--runs", str(tmp_path / "runs"), "nursery", "seed=2", "DS_ACCELERATOR="),
        ],
        "",
    )
    assert list((tmp_path / "runs").iterdir()) == []


def test_without_gpus_there_are_two_cpu_ranks(enter: Callable[..., Answer]) -> None:
    answer = enter("nursery")
    assert answer.started[2:4] == ["--num_gpus", "2"]
    assert answer.started[-1] == "DS_ACCELERATOR=cpu"
    assert answer.err == ""
    assert enter("nursery", NPROC="1").started[2:4] == ["--num_gpus", "1"]
    assert enter("nursery", gpus=8, NPROC="3").started[2:4] == ["--num_gpus", "3"]


def test_ranks_meet_where_they_are_told(enter: Callable[..., Answer]) -> None:
    assert enter("nursery", MASTER_PORT="4711").started[2:6] == [
        *("--num_gpus", "2", "--master_port", "4711")
    ]


def test_an_image_for_cuda_says_that_it_was_given_no_gpu(enter: Callable[..., Answer]) -> None:
    answer = enter("nursery", BABYLLAMA_DS_FORM="cuda")
    assert answer.err == "no GPU in this container (docker run --gpus all): 2 CPU ranks\n"
    assert enter("nursery", gpus=1, BABYLLAMA_DS_FORM="cuda").err == ""


@pytest.mark.parametrize("command", ["check", "doctor", "plan", "generate"])
def test_commands_are_passed_on(command: str, enter: Callable[..., Answer]) -> None:
    assert enter(command, "a", "b=c d").started[:-1] == ["babyllama-ds", command, "a", "b=c d"]


def test_commands_may_have_the_programs_name_before_them(enter: Callable[..., Answer]) -> None:
    assert enter("babyllama-ds", "doctor").started[:-1] == ["babyllama-ds", "doctor"]
    assert enter().started[:-1] == ["babyllama-ds", "--help"]
    assert enter("--version").started[:-1] == ["babyllama-ds", "--version"]


def test_the_launchers_status_is_the_containers(enter: Callable[..., Answer]) -> None:
    assert enter("nursery", STUB_STATUS="2").code == 2


def test_a_folder_of_runs_that_cannot_be_made_is_refused(
    enter: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file")
    answer = enter("nursery")
    assert answer.code == 2
    assert answer.started == []
    user = f"user {os.getuid()} and group {os.getgid()}"
    assert answer.err.startswith(
        f"error: {tmp_path / 'runs'}: got Not a directory, for {user}, expected a folder that can "
        "be written\n    hint: mount a folder of that user there"
    )
    # What writes nothing there, or elsewhere, need not write there.
    assert enter("nursery", "--check").started[0] == "deepspeed"
    assert enter("nursery", "--runs", str(tmp_path / "other")).started[0] == "deepspeed"
    assert enter("doctor").started[0] == "babyllama-ds"


def test_being_told_to_stop_it_waits_for_the_ranks(tmp_path: Path) -> None:
    """As `docker stop` does. The launcher here dies at once, as DeepSpeed's does. Its rank notices,
    and takes a while to save what it has; what is between them would end it, told to stop."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    rank = f"echo >{tmp_path}/up\nwhile kill -0 $1; do sleep 0.1; done\nsleep 1\n"
    rank += f"echo >{tmp_path}/saved"
    between = "rank $1 &\nrank=$!\ntrap 'kill -9 $rank' TERM\nwait"
    for name, body in (("rank", rank), ("between", between), ("deepspeed", "between $$ &\nwait")):
        (stubs / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (stubs / name).chmod(0o755)
    path = f"{stubs}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "RUNS": str(tmp_path / "runs"), "NPROC": "1"}
    entry = subprocess.Popen([DOCKER / "entrypoint.sh", "nursery"], env=env)
    try:
        wait_for(tmp_path / "up")
        entry.terminate()
        assert entry.wait(timeout=20) == 143
        assert (tmp_path / "saved").exists()
    finally:
        entry.kill()
        entry.wait()


def wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline_s, path
        time.sleep(0.02)


# -- building --------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """A step of the build with a pip that only tells what it was asked for, and with what."""
    told = tmp_path / "told.txt"
    stub = tmp_path / "pip"
    variables = '"NVCC_APPEND_FLAGS=$NVCC_APPEND_FLAGS NVCC_THREADS=$NVCC_THREADS"'
    tell = f'printf "%s\\n" "$*" {variables} >>{told}'
    stub.write_text(f"#!/bin/sh\n{tell}\n", encoding="utf-8")
    stub.chmod(0o755)

    def run(step: str, **arguments: str) -> tuple[int, list[str], str]:
        told.unlink(missing_ok=True)
        done = subprocess.run(
            [DOCKER / "install.sh", step],
            env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **arguments},
            capture_output=True,
            text=True,
            check=False,
        )
        asked = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
        return done.returncode, asked, done.stderr

    return run


@pytest.mark.parametrize("archs", ["80;90;100", "90"])
def test_flash_attention_is_built_as_torch_and_the_builders_memory_need(
    archs: str, install: Callable[..., tuple[int, list[str], str]]
) -> None:
    code, asked, _ = install("flash", FORM="cuda", FLASH_ATTN_CUDA_ARCHS=archs)
    assert code == 0
    (line, flags) = asked
    assert line.endswith("--require-hashes -r docker/flash.lock")
    assert "--no-build-isolation" in line  # against the image's torch, not another
    assert flags == "NVCC_APPEND_FLAGS=-std=c++20 NVCC_THREADS=1"


def test_flash_attention_can_be_left_out(
    install: Callable[..., tuple[int, list[str], str]],
) -> None:
    code, asked, _ = install("flash", FORM="cuda", FLASH_ATTN_CUDA_ARCHS="none")
    assert (code, asked) == (0, [])
    code, asked, _ = install("flash", FORM="cpu", FLASH_ATTN_CUDA_ARCHS="80")
    assert (code, asked) == (0, [])
    # All else of the form for GPUs is still there.
    _, asked, _ = install("torch", FORM="cuda", FLASH_ATTN_CUDA_ARCHS="none")
    assert [line.split()[-1] for line in asked[::2]] == ["docker/build.lock", "docker/cuda.lock"]


@pytest.mark.parametrize("archs", ["", "9.0", "80,90", "80;", "None"])
def test_architectures_that_flash_attention_would_misread_are_refused(
    archs: str, install: Callable[..., tuple[int, list[str], str]]
) -> None:
    code, asked, err = install("flash", FORM="cuda", FLASH_ATTN_CUDA_ARCHS=archs)
    assert (code, asked) == (2, [])
    assert f"FLASH_ATTN_CUDA_ARCHS: got '{archs}', expected 80;90;100, some of them, or none" in err


def test_kernels_are_built_for_other_hosts_and_for_torchs_headers(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    words = ["-O3", "-march=native", "-D__AVX512__", "-std=c++17", "-std=c++20", "a b.cpp"]
    done = subprocess.run(
        [DOCKER / "c++.sh", *words],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        *("-O3", "-march=x86-64-v3", "-D__AVX256__", "-std=c++20", "-std=c++20", "a b.cpp")
    ]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_deepspeeds_host_kernels_ask_for_what_the_compiler_replaces() -> None:
    """So that another release, which asks for it in other words, is noticed."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    class Op(OpBuilder):
        def absolute_name(self) -> str:
            return ""

        def sources(self) -> list[Any]:
            return []

    assert Op("op").cpu_arch() == "-march=native"
    assert Op("op").simd_width() in ("-D__AVX512__", "-D__AVX256__", "-D__SCALAR__")
