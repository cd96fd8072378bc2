"""What the documents tell people to type is typed: commands, Python, and parts of jobs.

A command that takes minutes, or changes the machine, is asked for what can be asked: `make` whether
the target is there, the job whether it is valid with these overrides, a script for its options.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from babyllama_ds.cli.parser import command_line
from babyllama_ds.errors import JobError
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LIMIT_S = 180
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docker/README.md")
NOT_TYPED = {
    "export": "changes the shell",
    "pip": "changes the environment",
    "apt-get": "changes the machine",
    "tensorboard": "serves until it is stopped",
    "scp": "wants another machine",
    "rsync": "wants another machine",
    "sbatch": "wants a cluster",
}


@dataclass(frozen=True)
class Block:
    """A fenced part of a document."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    pages = [*map(ROOT.joinpath, PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
            if found[1] in languages:
                line = text.count("\n", 0, found.start()) + 1
                yield Block(path, line, found[1], found[2])


@dataclass(frozen=True)
class Command:
    """What is typed after a `$`, and the error that follows, up to what was got; none: it works.

    The same on another page is the same.
    """

    where: str = field(compare=False)
    words: tuple[str, ...]
    error: str | None
    with_data: bool
    """Whether its page has said before where the text of BabyLM lies; `doctor` reads none."""


def commands() -> Iterator[Command]:
    told: set[Path] = set()
    for block in blocks("console"):
        joined = block.text.replace("\\\n", " ")
        for typed, answer in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", joined, re.M):
            words = tuple(shlex.split(typed, comments=True))
            error = re.search(r"^error: .*?: got ", answer, re.M)
            if words[0] == "export" and words[1].startswith("BABYLM_DATA="):
                told.add(block.path)
            with_data = block.path in told and words[1:] != ("doctor",)
            yield Command(str(block), words, error and error[0], with_data)


COMMANDS = list(dict.fromkeys(commands()))


@pytest.fixture(scope="module")
def home(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout after `make distill`: a finished run, and a job of the reader's own."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("launcher", "ds_configs", "Makefile", "tests", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(finished.runs, folder / "runs", symlinks=True)
    (folder / "runs" / "tiny-1").rename(folder / "runs" / "nursery-1")
    shutil.copy(finished.job, folder / "my.yaml")
    data = folder / "data"
    for part, copies in (("train", 1000), ("dev", 10)):
        (data / part).mkdir(parents=True)
        text = (finished.folder / f"town.{part}").read_text(encoding="utf-8")
        # As long as the published trainings' warm-up needs.
        (data / part / f"childes.{part}").write_text(text * copies, encoding="utf-8")
    for benchmark in ("blimp_filtered", "supplement_filtered"):
        (data / "eval" / benchmark).mkdir(parents=True)
        pair = {"sentence_good": "mara paints a blue boat", "sentence_bad": "mara a paints boat"}
        (data / "eval" / benchmark / "order.jsonl").write_text(json.dumps(pair) + "\n")
    return folder


def ask(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        words,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.words)[:60])
def test_a_command(command: Command, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = command.words
    monkeypatch.delenv("BABYLM_DATA", raising=False)
    in_container = any(word.startswith("BABYLM_DATA=") for word in words)
    if in_container if program == "docker" else command.with_data:
        monkeypatch.setenv("BABYLM_DATA", str(home / "data"))
    typists: Mapping[str, Callable[[list[str], Path], subprocess.CompletedProcess[str]]] = {
        "babyllama-ds": of_ours,
        "deepspeed": of_the_launcher,
        "docker": of_docker,
        "make": of_make,
        "python": of_a_script,
        "tar": lambda words, home: ask(["tar", *words], home),
        "cd": lambda words, home: ask(["bash", "-c", " ".join(["cd", *words])], home),
    }
    name = program.removeprefix(".venv/bin/")
    if name in NOT_TYPED:
        pytest.skip(NOT_TYPED[name])
    if "mix.yaml" in words:
        pytest.skip("the texts of that job are made up")
    assert name in typists, f"{command.where}: nobody knows how to try {program}"
    done = typists[name](words, home)
    told = f"{command.where}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    if command.error is None:
        assert done.returncode == 0, told
    else:
        assert done.returncode == 2, told
        assert command.error in done.stderr, told


def of_ours(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """A usage line, with places to fill in, is asked for its options; all others are run."""
    if any(re.fullmatch(r"\[?[A-Z_/]+\]?", word) or word.startswith("[") for word in words):
        done = ask([str(BIN / "babyllama-ds"), words[0], "--help"], home)
        return knows_options(done, words)
    if "--hostfile" in words:  # nobody is there
        return knows_options(ask([str(BIN / "babyllama-ds"), words[0], "--help"], home), words)
    if words[0] == "generate" and "--tokens" not in words:
        words = [*words, "--tokens", "20"]  # the tiny model has 64 positions
    return ask([str(BIN / "babyllama-ds"), *words], home)


def of_the_launcher(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    by_module = "--module" in words
    script = words.index("babyllama_ds.cli.launch" if by_module else "launcher/run.py")
    job, *overrides = [word for word in words[script + 1 :] if not word.startswith("--")]
    return checked(job, [word for word in overrides if "=" in word], home)


def of_make(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    done = ask(["make", "--dry-run", *words], ROOT)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if done.returncode or "distill" not in words:
        return done
    overrides = [word for word in shlex.split(given.get("ARGS", "")) if "=" in word]
    return checked(given.get("JOB", "launcher/jobs/nursery.yaml"), overrides, home)


def of_docker(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """What a container is given is tried outside; of a build, whether its arguments are known."""
    if words[0] == "build":
        known = re.findall(r"^ARG (\w+)", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
        given = [b.split("=")[0] for a, b in pairwise(words) if a == "--build-arg"]
        return ask(["test", "-z", " ".join(set(given) - set(known))], home)
    first, *rest = words[words.index("babyllama_ds") + 1 :]
    if first not in command_line().commands:
        return checked(first, rest, home)
    return of_ours([first, "--help"] if first == "doctor" else [first, *rest], home)


def of_a_script(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    done = ask([sys.executable, words[0], "--help"], home)
    return knows_options(done, words)


def checked(job: str, overrides: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    return ask([str(BIN / "babyllama-ds"), "check", job, *overrides], home)


def knows_options(
    done: subprocess.CompletedProcess[str], words: list[str]
) -> subprocess.CompletedProcess[str]:
    named = set(re.findall(r"--[a-z-]+", " ".join(words)))
    unknown = named - set(re.findall(r"--[a-z-]+", done.stdout))
    assert not unknown, f"no such options: {unknown}"
    return done


# -- Python ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", list(blocks("python")), ids=str)
def test_python(block: Block, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BABYLM_DATA", str(home / "data"))
    done = ask([sys.executable, "-c", block.text], home)
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    assert done.stdout.strip(), f"{block} shows nothing"


# -- jobs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", list(blocks("yaml")), ids=str)
def test_a_part_of_a_job(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole job is valid; so is a part, put into a shipped job in place of its own."""
    monkeypatch.setenv("BABYLM_DATA", "/path/to/it")
    part = yaml.safe_load(block.text)
    refused = []
    for name in ("nursery", "babylm_tiny"):
        shipped = yaml.safe_load(find_job(name).read_text(encoding="utf-8"))
        whole = part if {"name", "corpus", "student"} <= part.keys() else merged(shipped, part)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
        try:
            load_job(path, [])
        except JobError as error:
            refused.append(str(error))
    assert len(refused) < 2, f"{block} fits no shipped job:\n" + "\n".join(refused)


def merged(base: Any, part: Any) -> Any:
    """`part` laid over `base`, key by key; what is of another kind is replaced whole."""
    both = isinstance(base, dict) and isinstance(part, dict)
    if not both or ("kind" in part and part["kind"] != base.get("kind")):
        return part
    return {**base, **{key: merged(base.get(key), value) for key, value in part.items()}}


def test_the_documents_are_read() -> None:
    assert len(COMMANDS) > 20
    assert any(command.error for command in COMMANDS), "a refusal is shown somewhere"
    assert list(blocks("python"))
    assert list(blocks("yaml"))


def test_a_command_that_fails_is_seen(home: Path) -> None:
    assert of_ours(["check", "nursery", "studnt.seed=1"], home).returncode == 2
    assert of_make(["no-such-target"], home).returncode == 2
    assert of_make(["distill", "ARGS=studnt.seed=1"], home).returncode == 2
    with pytest.raises(AssertionError, match="no-such-option"):
        of_a_script(["tests/benchmarks/loss.py", "--no-such-option"], home)
