"""Checkpoints: whole or absent, two at most, checked before they are read, no pickle."""

from __future__ import annotations

import errno
import json
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from babyllama_ds import files
from babyllama_ds.engine import checkpoint
from babyllama_ds.engine.checkpoint import BestWeights, CheckpointFolder, Progress
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.errors import RunError

PROGRESS = Progress(
    step=3,
    tokens=96,
    seconds=1.25,
    best_dev_ce=2.5,
    best_step=2,
    last_dev_ce=2.75,
    runs=["one", "two"],
)


FILES = ("state.safetensors", "progress.json", "best.safetensors", "metrics.jsonl")


class Regression(nn.Module):
    """A loss that needs no data but a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = nn.Linear(7, 5)

    def forward(self, seed: int) -> Tensor:
        inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
        return self.inner(inputs.to(self.inner.weight.dtype)).float().square().mean()


def train(engine: TrainingEngine, steps: range) -> None:
    for step in steps:
        engine.backward(engine.forward(step))
        engine.step(1e-2)


def state_of(engine: TrainingEngine) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in engine.named_state()}


def assert_equal_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


MakeEngine = Callable[..., TrainingEngine]


@pytest.fixture
def new_engine(make_engine: MakeEngine, training_spec: Callable[..., Any]) -> MakeEngine:
    def make(seed: int = 0, precision: str = "bf16") -> TrainingEngine:
        return make_engine(Regression(seed), training_spec(), precision=precision)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints" / "teachers" / "a", fingerprint="f" * 64)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_goes_on_where_it_was(
    precision: str, new_engine: MakeEngine, folder: CheckpointFolder
) -> None:
    engine = new_engine(precision=precision)
    train(engine, range(3))
    folder.save(engine, PROGRESS, BestWeights())
    other = new_engine(seed=9, precision=precision)
    assert folder.resume(other, BestWeights()) == PROGRESS
    assert_equal_states(state_of(other), state_of(engine))
    for one in (engine, other):
        train(one, range(3, 6))
    assert_equal_states(state_of(other), state_of(engine))


def test_without_a_checkpoint_training_starts(
    new_engine: MakeEngine, folder: CheckpointFolder
) -> None:
    engine = new_engine()
    before = state_of(engine)
    assert folder.resume(engine, BestWeights()) == Progress()
    assert_equal_states(state_of(engine), before)
    assert folder.newest_name() == "none yet"
    assert not folder.directory.exists()


def test_best_weights_travel(new_engine: MakeEngine, folder: CheckpointFolder) -> None:
    engine, best = new_engine(), BestWeights()
    train(engine, range(2))
    best.take(engine.module)
    expected = [parameter.detach().clone() for parameter in engine.module.parameters()]
    train(engine, range(2, 3))  # must not touch what was taken
    folder.save(engine, PROGRESS, best)
    other, restored = new_engine(seed=9), BestWeights()
    folder.resume(other, restored)
    restored.put(other.module)
    for ours, theirs in zip(other.module.parameters(), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


def test_without_best_weights_nothing_is_put(new_engine: MakeEngine) -> None:
    module = Regression(3)
    before = module.inner.weight.detach().clone()
    BestWeights().put(module)
    assert torch.equal(module.inner.weight, before)


def test_only_rank_zero_keeps_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint.ranks, "rank", lambda: 1)
    best = BestWeights()
    best.take(Regression(3))
    best.write(tmp_path / "best.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_no_pickle_is_written_or_read(
    new_engine: MakeEngine, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    engine, best = new_engine(), BestWeights()
    best.take(engine.module)
    for module in (torch, pickle):
        for name in ("load", "save", "dump", "dumps", "loads", "Unpickler", "Pickler"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    folder.save(engine, PROGRESS, best)
    folder.resume(engine, BestWeights())
    (written,) = folder.directory.iterdir()
    assert written.name == "step-00000003"
    assert sorted(path.name for path in written.iterdir()) == [
        "best.safetensors",
        "manifest.json",
        "metrics.jsonl",
        "progress.json",
        "state.safetensors",
    ]
    for path in written.glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {
            "F32" if path.name.startswith("state") else "BF16"
        }


def test_the_newest_two_are_kept(new_engine: MakeEngine, folder: CheckpointFolder) -> None:
    engine = new_engine()
    for step in (2, 9, 10, 100):
        folder.save(engine, Progress(step=step), BestWeights())
    assert sorted(path.name for path in folder.directory.iterdir()) == [
        "step-00000010",
        "step-00000100",
    ]
    assert folder.newest_name() == str(folder.directory / "step-00000100")
    assert folder.resume(engine, BestWeights()).step == 100
    folder.remove()
    assert not folder.directory.exists()
    folder.remove()


def test_the_same_step_is_written_once(new_engine: MakeEngine, folder: CheckpointFolder) -> None:
    engine = new_engine()
    folder.save(engine, PROGRESS, BestWeights())
    (written,) = folder.directory.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    folder.save(engine, PROGRESS, BestWeights())
    assert {path.name: path.stat().st_mtime_ns for path in written.iterdir()} == before


def test_what_was_logged_travels(new_engine: MakeEngine, folder: CheckpointFolder) -> None:
    engine = new_engine()
    assert folder.logged() == ""
    for step, lines in ((1, "one\n"), (2, "one\n√2\n")):
        folder.save(engine, Progress(step=step), BestWeights(), lambda lines=lines: lines)
    assert folder.logged() == "one\n√2\n"
    for path in folder.directory.glob("*/metrics.jsonl"):
        path.unlink()  # as in a checkpoint of an earlier version
    assert folder.logged() is None


def test_a_new_one_survives_a_power_cut_before_an_old_one_goes(
    new_engine: MakeEngine, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, synced, sync = new_engine(), [], files.fsync_directory
    for step in (1, 2):
        folder.save(engine, Progress(step=step), BestWeights())

    def watched(directory: Path) -> None:
        sync(directory)
        if directory == folder.directory:
            synced.append(sorted(path.name for path in directory.iterdir()))

    monkeypatch.setattr(files, "fsync_directory", watched)
    folder.save(engine, Progress(step=3), BestWeights())
    assert synced == [["step-00000001", "step-00000002", "step-00000003"]]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_one_before_is_good(
    name: str, new_engine: MakeEngine, folder: CheckpointFolder
) -> None:
    engine, best = new_engine(), BestWeights()
    best.take(engine.module)
    folder.save(engine, Progress(step=1), best, lambda: "a line\n")
    first = state_of(engine)
    train(engine, range(1))
    folder.save(engine, Progress(step=2), best, lambda: "a line\n")
    newest = folder.directory / "step-00000002"
    data = bytearray((newest / name).read_bytes())
    data[-2] ^= 1
    (newest / name).write_bytes(data)
    with pytest.raises(RunError) as caught:
        folder.resume(new_engine(seed=9), BestWeights())
    (problem,) = caught.value.problems
    assert problem.where == str(newest / name)
    assert problem.got.startswith("SHA-256")
    assert str(newest) in (problem.hint or "")
    # What the hint says: without that folder, the one before is taken.
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    other = new_engine(seed=9)
    assert folder.resume(other, BestWeights()).step == 1
    assert_equal_states(state_of(other), first)


def test_another_trainings_checkpoint_is_refused(
    new_engine: MakeEngine, folder: CheckpointFolder
) -> None:
    folder.save(new_engine(), PROGRESS, BestWeights())
    other = CheckpointFolder(folder.directory, fingerprint="0" * 64)
    with pytest.raises(RunError, match="got a checkpoint of another training") as caught:
        other.resume(new_engine(), BestWeights())
    (problem,) = caught.value.problems
    assert problem.where == str(folder.directory / "step-00000003")
    assert "000000000000" in problem.expected
    assert "ffffffffffff" in problem.expected


# -- a disk that refuses ---------------------------------------------------------------------------


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 600])
def test_a_checkpoint_that_does_not_fit_leaves_no_trace(
    num_bytes: int, new_engine: MakeEngine, folder: CheckpointFolder
) -> None:
    engine = new_engine()
    folder.save(engine, Progress(step=1), BestWeights())
    with (
        files_limited_to(num_bytes),
        pytest.raises(RunError, match=r"(?i)file too large|EFBIG") as caught,
    ):
        folder.save(engine, Progress(step=2), BestWeights())
    (problem,) = caught.value.problems
    assert str(folder.directory) in problem.where
    assert [path.name for path in folder.directory.iterdir()] == ["step-00000001"]
    assert folder.resume(engine, BestWeights()).step == 1


@pytest.mark.parametrize("failing", ["write_json", "write_manifest"])
def test_a_checkpoint_that_fails_late_leaves_no_trace(
    failing: str,
    new_engine: MakeEngine,
    folder: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: Path, *_: object, **__: object) -> None:
        raise files.cannot_write(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(files, failing, fail)
    with pytest.raises(RunError, match="No space left on device"):
        folder.save(new_engine(), PROGRESS, BestWeights())
    assert list(folder.directory.iterdir()) == []


def test_room_needed_is_told(
    new_engine: MakeEngine, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left on device while writing a checkpoint"):
        folder.save(new_engine(), PROGRESS, BestWeights())


def test_what_a_killed_writer_left_is_overwritten(
    new_engine: MakeEngine, folder: CheckpointFolder
) -> None:
    leftover = folder.directory / ".tmp-step-00000003"
    leftover.mkdir(parents=True)
    (leftover / "state.safetensors").write_bytes(b"half")
    (leftover / "rubbish").write_bytes(b"")
    engine = new_engine()
    assert folder.resume(engine, BestWeights()) == Progress()
    folder.save(engine, PROGRESS, BestWeights())
    (written,) = folder.directory.iterdir()
    assert sorted(path.name for path in written.iterdir()) == [
        "manifest.json",
        "metrics.jsonl",
        "progress.json",
        "state.safetensors",
    ]


# -- several storages ------------------------------------------------------------------------------


class Nodes:
    """Storages that have these checkpoints, by step; what is sent between them is written down."""

    several = True

    def __init__(self, directory: Path, *steps: list[int]) -> None:
        self.names = [[f"step-{step:08d}" for step in of_node] for of_node in steps]
        self.directory = directory
        self.sent: list[tuple[str, int, list[int]]] = []

    def on_each(self, work: Callable[[], Any]) -> list[Any]:
        """`work` looks at this node's folder, which is given each node's content in turn."""
        found = []
        for names in self.names:
            for name in names:
                (self.directory / name).mkdir(parents=True)
            found.append(work())
            shutil.rmtree(self.directory, ignore_errors=True)
        return found

    def copy(self, checkpoint: Path, *, source: int, to: list[int]) -> None:
        self.sent.append((checkpoint.name, source, to))


@pytest.mark.parametrize(
    ("steps", "sent"),
    [
        (([2, 4], [4]), []),  # the first node has the newest
        (([], [2, 4], []), [("step-00000004", 1, [0])]),  # it was replaced
        (([2, 4], [2], [4, 6]), [("step-00000006", 2, [0])]),
        (([9], [10]), [("step-00000010", 1, [0])]),
        (([], []), []),
    ],
)
def test_the_first_node_gets_the_newest_of_any(
    steps: tuple[list[int], ...], sent: list[Any], tmp_path: Path
) -> None:
    nodes: Any = Nodes(tmp_path / "checkpoints", *steps)
    folder = CheckpointFolder(nodes.directory, fingerprint="f", storages=nodes)
    never: Any = None  # no content is really sent, so there is none to load
    assert folder.resume(never, BestWeights()) == Progress()
    assert nodes.sent == sent


@pytest.mark.parametrize(
    ("steps", "sent"),
    [
        (([2, 4], [2], [2]), [("step-00000004", 0, [1])]),
        (([4], [4], []), [("step-00000004", 0, [])]),
    ],
)
def test_a_second_node_keeps_a_copy(
    steps: tuple[list[int], ...], sent: list[Any], tmp_path: Path
) -> None:
    nodes: Any = Nodes(tmp_path / "checkpoints", *steps)
    folder = CheckpointFolder(nodes.directory, fingerprint="f", storages=nodes)
    folder._copy(nodes.directory / "step-00000004")
    assert nodes.sent == sent


def test_every_node_forgets_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps checkpoints on a disk of its own, which a long training would fill."""
    nodes: Any = Nodes(tmp_path / "checkpoints", [1, 2, 3], [2, 3], [])
    folder = CheckpointFolder(nodes.directory, fingerprint="f", storages=nodes)
    prune, left = folder._prune, []

    def noted() -> None:
        prune()
        left.append(sorted(path.name for path in nodes.directory.glob("*")))

    monkeypatch.setattr(folder, "_prune", noted)
    monkeypatch.setattr(folder, "_write", lambda *_: None)
    engine: Any = SimpleNamespace(named_state=lambda: iter(()))
    folder.save(engine, Progress(step=3), BestWeights())
    newest = ["step-00000002", "step-00000003"]
    assert left == [newest, newest, []]
