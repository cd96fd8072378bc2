"""What the tests of the whole project share: a tiny job, the real launcher, one finished run.

Every start has a time limit and a process group of its own, which is killed at the end, so that no
test leaves ranks behind. Work that several test files read is done once, also where pytest runs
in several processes (`once`).
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LAUNCH_LIMIT_S = 180.0

# Read once, when torch is imported. Threads of one process wait for each other by spinning: beside
# another process that computes, two took three times as long as one, on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes is a matter of who else has the machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

STEPS = 24
TRAINING: dict[str, Any] = {
    "batch_windows": 8,
    "epochs": 100,
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "evaluate_every_steps": 8,
    "evaluate_windows": 16,
    "checkpoint_every_steps": 5,
    "log_every_steps": 1,
}
LLAMA = {
    "kind": "llama",
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "max_positions": 64,
}
GPT2 = {
    "kind": "gpt2",
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "max_positions": 64,
    "dropout": 0.1,
}


# -- the job --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_job() -> Callable[..., Path]:
    """Write a job of seconds, and its text, into a folder; keywords replace its sections.

    A teacher has dropout and tied embeddings; the other one and the student are grouped-query
    LLaMAs, tied and untied.
    """

    def make(folder: Path, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "town.train", num_lines=210, seed=1)
        write_text(folder / "town.dev", num_lines=60, seed=2)
        job = {
            "name": "tiny-{seed}",
            "corpus": {
                "kind": "files",
                "train": [str(folder / "*.train")],
                "split": {"kind": "held_out", "dev": [str(folder / "*.dev")]},
                "cleaning": "none",
            },
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
            "windows": {"length": 32},
            "teachers": [
                {"name": "gpt2", "model": GPT2, "training": TRAINING},
                {
                    "name": "llama",
                    "model": {**LLAMA, "num_layers": 1, "tied_embeddings": True},
                    "training": TRAINING,
                },
            ],
            "student": {
                "model": {**LLAMA, "num_layers": 2},
                # So fast that it is best at its first evaluation: the weights that leave are not
                # the last ones.
                "training": {**TRAINING, "learning_rate": 1.5e-2},
                # In 24 steps of 87 words: with a checkpoint, between two, and at the end.
                "milestones": [400, 700, 2_150],
            },
            "control": {"milestones": [1_000]},
            "evaluation": {"samples": 2},
            **changes,
        }
        kept = any((job[model] or {}).get("milestones") for model in ("student", "control"))
        if kept and "evaluation" not in changes:
            job["evaluation"]["milestones"] = {}
        path = folder / "job.yaml"
        plain = json.loads(json.dumps(job))  # nothing shared, which YAML would write as an alias
        path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        return path

    return make


def write_text(path: Path, *, num_lines: int, seed: int) -> None:
    """Sentences with a little grammar in them, so that there is something to learn."""
    draw = random.Random(seed)
    people = ("mara", "the baker", "old tim", "my aunt")
    acts = ("paints", "carries", "wants", "mends", "hides")
    things = ("a blue boat", "the long ladder", "two small bells", "a paper crown")
    ends = (".", "before noon.", "and laughs.", "— again!")
    lines = (
        f"{draw.choice(people)} {draw.choice(acts)} {draw.choice(things)} {draw.choice(ends)}\n"
        for _ in range(num_lines)
    )
    path.write_text("".join(lines), encoding="utf-8")


# -- starting -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended, or several ranks, with the same exit status `code`."""

    code: int
    out: str
    err: str

    def assert_done(self) -> None:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"


class Running:
    """Commands started together in process groups of their own, with their output in files."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        folder: Path,
        envs: Sequence[Mapping[str, str]],
        limit_s: float,
        places: Sequence[Path],
    ) -> None:
        self._paths = (folder / "out.txt", folder / "err.txt")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._deadline_s = time.monotonic() + limit_s
        folder.mkdir(parents=True)
        with self._paths[0].open("wb") as out, self._paths[1].open("wb") as err:
            for command, env, place in zip(commands, envs, places, strict=True):
                # Files, not pipes: a rank that outlives its launcher must not block us.
                process = subprocess.Popen(
                    command, cwd=place, env=env, stdout=out, stderr=err, start_new_session=True
                )
                self._processes.append(process)

    @property
    def pid(self) -> int:
        """The first command's process."""
        return self._processes[0].pid

    def pid_of(self, words: str) -> int:
        """The one process among those started, however deep, with `words` in its command line."""
        found = [pid for pid in self._members() if words in command_line(pid)]
        assert len(found) == 1, f"{words}: processes {found}"
        return found[0]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Until `condition` holds; fails when the processes end or the time is up before."""
        while not condition():
            assert self._is_anyone_left(), f"ended before {what}:\n{self._read(1)}"
            assert time.monotonic() < self._deadline_s, f"no {what} in time:\n{self._read(1)}"
            time.sleep(0.005)

    def end(self) -> Ended:
        """Wait for the commands and all that they started; kill them when their time is up."""
        while self._members() and time.monotonic() < self._deadline_s:
            self._poll()
            time.sleep(0.05)
        late = self._members()
        self.kill()
        codes = [process.wait() for process in self._processes]
        ended = Ended(code=codes[0], out=self._read(0), err=self._read(1))
        assert not late, f"processes {late} did not end in time:\n{ended.out}\n{ended.err}"
        assert len(set(codes)) == 1, f"ranks ended with {codes}:\n{ended.err}"
        return ended

    def said(self) -> str:
        """What they have written to standard error so far."""
        return self._read(1)

    def signal_all(self, number: signal.Signals) -> None:
        """Signal every process, as a terminal's Ctrl-C or a scheduler does."""
        for process in self._processes:
            os.killpg(process.pid, number)

    def kill(self) -> None:
        """SIGKILL to whatever is left."""
        for process in self._processes:
            if group_members(process.pid):
                os.killpg(process.pid, signal.SIGKILL)

    def _poll(self) -> None:
        for process in self._processes:
            process.poll()

    def _is_anyone_left(self) -> bool:
        """One call for each group: who asks every few milliseconds must not look through /proc."""
        self._poll()  # the dead that nobody has collected count
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 0)
                return True
        return False

    def _members(self) -> list[int]:
        return [pid for process in self._processes for pid in group_members(process.pid)]

    def _read(self, which: int) -> str:
        return self._paths[which].read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Start commands together; what still runs at the end of the session is killed."""
    folder = tmp_path_factory.mktemp("output")
    started: list[Running] = []

    def begin(
        commands: Sequence[Sequence[object]],
        envs: Sequence[Mapping[str, str]] = ({},),
        limit_s: float = LAUNCH_LIMIT_S,
        places: Sequence[Path] | None = None,
    ) -> Running:
        words = [[str(word) for word in command] for command in commands]
        environments = [{**plain_environment(), **env} for env in envs]
        output = folder / str(len(started))
        started.append(Running(words, output, environments, limit_s, places or [ROOT] * len(words)))
        return started[-1]

    yield begin
    for running in started:
        running.kill()


@pytest.fixture(scope="session")
def start_launcher(start: Callable[..., Running]) -> Callable[..., Running]:
    """`deepspeed --num_gpus NUM_RANKS launcher/run.py WORDS`, started; two ranks by default."""

    def begin(*words: object, num_ranks: int = 2) -> Running:
        options = ["--quiet", "--num_gpus", num_ranks, "--master_port", free_port()]
        return start([[BIN / "deepspeed", *options, "launcher/run.py", *words]])

    return begin


@pytest.fixture(scope="session")
def start_ranks(start: Callable[..., Running]) -> Callable[..., Running]:
    """Ranks of `launcher/run.py WORDS`, two by default, as the launcher starts them, without it.

    It takes seconds to start, which only tests of the launcher itself need to spend.
    """

    def begin(*words: object, num_ranks: int = 2) -> Running:
        command = [sys.executable, "-u", "launcher/run.py"]
        commands = [[*command, f"--local_rank={rank}", *words] for rank in range(num_ranks)]
        return start(commands, environments_of_ranks(num_ranks))

    return begin


@pytest.fixture(scope="session")
def start_nodes(start: Callable[..., Running]) -> Callable[..., Running]:
    """`launcher/run.py WORDS` on two nodes of a rank each, which have a working folder each.

    So a relative `--runs` is the same words and two folders, as on two machines' own disks.
    `before` are words in front of each node's command.
    """

    def begin(
        folders: Sequence[Path], *words: object, before: Sequence[Sequence[str]] = ((), ())
    ) -> Running:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        run = [sys.executable, "-u", ROOT / "launcher" / "run.py", "--local_rank=0", *words]
        envs = [
            {**env, "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": env["RANK"]}
            for env in environments_of_ranks()
        ]
        return start([[*first, *run] for first in before], envs, places=folders)

    return begin


@pytest.fixture
def rank_environments() -> list[dict[str, str]]:
    """What the launcher tells two ranks of one world."""
    return environments_of_ranks()


def environments_of_ranks(num_ranks: int = 2) -> list[dict[str, str]]:
    world = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


@pytest.fixture(scope="session")
def launch(start_launcher: Callable[..., Running]) -> Callable[..., Ended]:
    """`deepspeed --num_gpus NUM_RANKS launcher/run.py WORDS`, to its end; two ranks by default."""
    return lambda *words, num_ranks=2: start_launcher(*words, num_ranks=num_ranks).end()


@pytest.fixture(scope="session")
def run_ranks(start_ranks: Callable[..., Running]) -> Callable[..., Ended]:
    """Two ranks without the launcher, to their end."""
    return lambda *words: start_ranks(*words).end()


@pytest.fixture(scope="session")
def run_alone(start: Callable[..., Running]) -> Callable[..., Ended]:
    """`babyllama-ds WORDS`, one process, to its end; `env` is added to the environment."""

    def run(*words: object, env: Mapping[str, str] | None = None) -> Ended:
        return start([[BIN / "babyllama-ds", *words]], [env or {}]).end()

    return run


def plain_environment() -> dict[str, str]:
    """Ours, without a trace of ranks that a test in this process was; computing on the CPU."""
    dropped = ("RANK", "LOCAL_RANK", "CROSS_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    dropped += ("MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def group_members(group: int) -> list[int]:
    """Live processes of a process group; those dead but not yet collected do not count."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # just gone
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def command_line(pid: int) -> str:
    """A process's command line; empty when it has just gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(word.decode() for word in words)


# -- in this process -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Some commands set it up for a process of their own: what later tests see must not depend on
    which of them shared theirs."""
    log = logging.getLogger("babyllama_ds")
    logging_was = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers[:], log.level, log.propagate = logging_was


@pytest.fixture
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` owns a process: it sets environment and threads. Give them back."""
    import torch

    environment, threads = dict(os.environ), torch.get_num_threads()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


# -- work done once -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Commands that were run in a folder, for tests to look at."""

    folder: Path
    ended: list[Ended]

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run_dir(self) -> Path:
        return self.runs / "tiny-1"

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Scene]:
    """Do `make(scene)`, which returns how its commands ended, once for all pytest processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def play(name: str, make: Callable[[Scene], list[Ended]]) -> Scene:
        scene = Scene(folder=shared / name, ended=[])
        done = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(scene.folder, ignore_errors=True)
                scene.folder.mkdir()
                done.write_text(json.dumps([asdict(ended) for ended in make(scene)]))
        return replace(scene, ended=[Ended(**ended) for ended in json.loads(done.read_text())])

    return play


@pytest.fixture(scope="session")
def finished(
    once: Callable[..., Scene], tiny_job: Callable[..., Path], launch: Callable[..., Ended]
) -> Scene:
    """The tiny job, run from text to report on two ranks, undisturbed. To be read only."""

    def make(scene: Scene) -> list[Ended]:
        return [launch(tiny_job(scene.folder), "--runs", scene.runs)]

    scene = once("finished", make)
    scene.ended[0].assert_done()
    return scene


@pytest.fixture(scope="session")
def copy_of_finished(finished: Scene) -> Callable[[Scene], None]:
    """Copy the finished run, its store and its job into another scene."""

    def copy(scene: Scene) -> None:
        shutil.copytree(finished.runs, scene.runs, symlinks=True)
        shutil.copy(finished.job, scene.job)

    return copy


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`; none while there is no file."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The reader of `metrics.jsonl`."""
    return read_metrics
