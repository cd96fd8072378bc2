"""What is kept on the way: at which steps, of which weights, and what a resumed training finds."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from babyllama_ds import files
from babyllama_ds.errors import JobError, RunError, Stopped
from babyllama_ds.spec.training import Milestones, MovingAverage, TrainingSpec
from babyllama_ds.storages import Storages
from babyllama_ds.training.milestones import (
    BABYLM,
    Milestone,
    MilestoneFolder,
    TextSize,
    milestones_of,
    share_milestones,
)
from trainings import LENGTH, WINDOWS, Run

# -- at which steps -------------------------------------------------------------------------------


def planned(
    asked: Milestones, *, words: int, tokens: int, windows: int, length: int = 10, **changes: Any
) -> list[Milestone]:
    training = TrainingSpec(**{"batch_windows": 4, "epochs": 2, "learning_rate": 1e-3} | changes)
    return milestones_of(
        asked,
        training,
        text=TextSize(words=words, tokens=tokens),
        num_windows=windows,
        length=length,
        where="student.milestones",
    )


def words_after_each_step(words: int, tokens: int, windows: int, length: int, steps: int) -> list:
    """By visiting the windows one after another."""
    seen, after = 0, []
    while len(after) < steps:
        for first in range(0, windows, 4):
            seen += length * len(range(first, min(first + 4, windows)))
            after.append(seen * words / tokens)
    return after[:steps]


@pytest.mark.parametrize("windows", [13, 14, 16])
@pytest.mark.parametrize(("words", "tokens"), [(100, 141), (141, 141), (97, 205)])
def test_a_milestone_is_the_first_step_that_has_shown_as_many(
    windows: int, words: int, tokens: int
) -> None:
    after = words_after_each_step(words, tokens, windows, 10, steps=8)
    asked = tuple(range(5, int(after[-1]), 7))
    found = planned(asked, words=words, tokens=tokens, windows=windows)
    assert [one.words for one in found] == list(asked)
    for one in found:
        assert after[one.step - 1] >= one.words
        assert one.step == 1 or after[one.step - 2] < one.words
        assert one.seen == int(after[one.step - 1])


def test_the_last_step_stands_for_a_little_more_than_it_has_shown() -> None:
    # Ten epochs of 9.95 million words.
    text = {"words": 9_950_000, "tokens": 12_800_000, "windows": 100_000, "length": 128}
    found = planned("babylm", **text, batch_windows=128, epochs=10)
    assert [one.name for one in found] == [
        *(f"chck_{number}M" for number in range(1, 11)),
        *(f"chck_{number}M" for number in range(20, 101, 10)),
    ]
    assert (found[-1].step, found[-1].seen) == (7820, 99_500_000)
    assert planned("babylm", **text, batch_windows=128, epochs=9.4)[-1].name == "chck_90M"


def test_the_challenges_milestones() -> None:
    assert len(BABYLM) == len(set(BABYLM)) == 28
    assert BABYLM[9:11] == (10_000_000, 20_000_000)
    assert BABYLM[18:20] == (100_000_000, 200_000_000)
    assert BABYLM[-1] == 1_000_000_000


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (3_000_000, "chck_3M"),
        (500_000, "chck_500K"),
        (1_500_000, "chck_1500K"),
        (12_345, "chck_12345"),
    ],
)
def test_names(words: int, name: str) -> None:
    assert Milestone(words=words, seen=words, step=1).name == name


def test_what_is_never_reached_is_refused() -> None:
    with pytest.raises(JobError) as caught:
        planned((50, 100, 300, 400), words=100, tokens=140, windows=14)
    (problem,) = caught.value.problems
    assert problem.where == "student.milestones[2]"
    assert (problem.got, problem.expected) == (
        "300 words",
        "at most 200, all that this training shows",
    )
    with pytest.raises(JobError) as caught:
        planned("babylm", words=100, tokens=140, windows=14)
    (problem,) = caught.value.problems
    assert problem.where == "student.milestones"
    assert "1,000,000 words: this one shows 200" in problem.expected


STEPS_1_2_4 = [Milestone(words=10 * step, seen=10 * step, step=step) for step in (1, 2, 4)]

# -- in a training --------------------------------------------------------------------------------

TEXT = TextSize(words=WINDOWS * LENGTH, tokens=WINDOWS * LENGTH)  # a word a token


class Kept:
    """Milestones of a run of eight steps of 40 words (the fourth and eighth have 20)."""

    def __init__(self, run: Run, *words: int) -> None:
        self.directory = run.directory / "milestones" / "student"
        milestones = milestones_of(
            words, run.training, text=TEXT, num_windows=WINDOWS, length=LENGTH, where="here"
        )
        run.milestones = MilestoneFolder(self.directory, milestones, self._write)
        self.written: list[str] = []

    def _write(self, model: nn.Module, directory: Path, summary: Mapping[str, Any]) -> None:
        self.written.append(summary["milestone"])
        weights = {name: one.detach().clone() for name, one in model.named_parameters()}
        save_file(weights, directory / "model.safetensors")
        files.write_json(directory / "training.json", dict(summary))
        files.write_manifest(directory, fingerprint="f")

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.directory / name / "model.safetensors")

    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


def weights_after(run: Run, steps: int, state: str) -> dict[str, torch.Tensor]:
    """A checkpoint's masters, or their moving average, as bf16 parameters of the model."""
    with pytest.raises(Stopped):
        run.train(stop_after=steps)
    saved = load_file(run.folder.directory / f"step-{steps:08d}" / "state.safetensors")
    return {
        name: next(
            tensor for key, tensor in saved.items() if key.startswith(state) and key.endswith(name)
        ).bfloat16()
        for name in run.weights()
    }


def same(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("ema", [None, MovingAverage(decay=0.9)])
def test_the_weights_of_a_milestone_are_those_of_its_step(
    new_run: Callable[..., Run], ema: MovingAverage | None
) -> None:
    """With a moving average, that one's, as evaluations have them. The training is as without."""
    run = new_run(ema=ema)
    kept = Kept(run, 80, 121)
    summary = run.train()
    assert kept.names() == {"chck_80", "chck_121"}
    assert summary["milestones"] == {
        "chck_80": {"words": 80, "steps": 2},
        "chck_121": {"words": 140, "steps": 4},
    }
    facts = files.read_json(kept.directory / "chck_121" / "training.json")
    assert (facts["words"], facts["steps"], facts["train_tokens"]) == (140, 4, 140)
    assert 0 < facts["seconds"] < summary["seconds"]
    state = "master/" if ema is None else "ema/"
    for name, steps in (("chck_80", 2), ("chck_121", 4)):
        stopped = new_run(name, ema=ema)
        assert same(kept.weights(name), weights_after(stopped, steps, state))
    without = new_run("without", ema=ema)
    without.train()
    assert same(run.weights(), without.weights())


def test_none_are_asked_for(new_run: Callable[..., Run]) -> None:
    assert "milestones" not in new_run().train()


def test_a_training_that_goes_on_keeps_what_it_passed_and_makes_the_rest(
    new_run: Callable[..., Run],
) -> None:
    whole = new_run(checkpoint_every_steps=2, name="whole")
    expected = Kept(whole, 40, 80, 120, 200)
    whole.train()
    run = new_run(checkpoint_every_steps=2)
    kept = Kept(run, 40, 80, 120, 200)
    with pytest.raises(RuntimeError, match="struck"):
        run.train(before=lambda epoch, k: strike(epoch, k))
    assert kept.written == ["chck_40", "chck_80", "chck_120"]
    (kept.directory / f"{files.TEMPORARY_PREFIX}chck_160-1").mkdir()  # the stroke fell in a write
    run.train()
    assert kept.written[3:] == ["chck_120", "chck_200"]
    assert kept.names() == expected.names()
    for name in kept.names():
        assert same(kept.weights(name), expected.weights(name))


def strike(epoch: int, k: int) -> None:
    """After three steps, of which two are in a checkpoint."""
    if (epoch, k) == (0, 3):
        raise RuntimeError("struck")


def test_a_stop_in_the_step_of_a_milestone_loses_nothing(new_run: Callable[..., Run]) -> None:
    run = new_run()
    kept = Kept(run, 80)
    with pytest.raises(Stopped):
        run.train(stop_after=2)
    assert kept.names() == {"chck_80"}
    run.train()
    assert kept.written == ["chck_80"]


def test_one_that_cannot_be_written_is_not_there_by_half(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    kept = Kept(run, 80)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", full)
        with pytest.raises(RunError, match=r"chck_80: got No space left on device"):
            run.train()
    assert kept.names() == set()


def test_only_the_steps_of_milestones_are_held_up(tmp_path: Path) -> None:
    folder = MilestoneFolder(tmp_path, STEPS_1_2_4, lambda *_: None)
    assert [step for step in range(7) if folder.due(step)] == [1, 2, 4]


def test_a_training_from_its_first_step_finds_nothing_of_another(
    new_run: Callable[..., Run],
) -> None:
    run = new_run()
    kept = Kept(run, 80)
    files.write_json(kept.directory / "chck_80" / "training.json", {"of": "another"})
    files.write_json(kept.directory / "chck_160" / "training.json", {"of": "another"})
    (kept.directory / ".DS_Store").touch()  # what a desktop leaves in a folder that one looks at
    run.train()
    assert kept.names() == {"chck_80", ".DS_Store"}
    assert files.read_json(kept.directory / "chck_80" / "training.json")["steps"] == 2


# -- on several nodes -----------------------------------------------------------------------------


class Nodes(Storages):
    """As seen from one of two, which sends what is asked for."""

    def __init__(self) -> None:
        super().__init__(leads=(0, 1), hosts=("a", "b"))
        self.sent: list[str] = []

    def on_each(self, work: Callable[[], Any]) -> list[Any]:
        return [work()]

    def everywhere(self, find: Callable[[], Path | None]) -> Path | None:
        found = find()
        assert found is not None
        self.sent.append(found.name)
        return found


def test_what_a_node_had_not_received_to_the_end_is_not_sent_on(tmp_path: Path) -> None:
    """It died before the milestone, already whole, got its name."""
    for name in ("chck_80", f"{files.TEMPORARY_PREFIX}chck_160@7"):
        files.write_json(tmp_path / name / "training.json", {})
        files.write_manifest(tmp_path / name, fingerprint="f")
    nodes = Nodes()
    share_milestones(tmp_path, nodes)
    assert nodes.sent == ["chck_80"]
    assert [path.name for path in tmp_path.iterdir()] == ["chck_80"]


class Holders:
    """Storages that hold these milestones; what is sent between them is written down."""

    several = True

    def __init__(self, directory: Path, *names: set[str]) -> None:
        self.directory, self.names = directory, list(names)
        self.sent: list[tuple[str, int, list[int]]] = []

    def on_each(self, work: Callable[[], Any]) -> list[Any]:
        """`work` finds each node's milestones in turn; what it leaves is what the node has."""
        found = []
        for number, names in enumerate(self.names):
            shutil.rmtree(self.directory, ignore_errors=True)
            for name in names:
                files.write_json(self.directory / name / files.MANIFEST_NAME, {})
            found.append(work())
            self.names[number] = {path.name for path in self.directory.glob("*")}
        shutil.rmtree(self.directory, ignore_errors=True)
        return found

    def copy(self, milestone: Path, *, source: int, to: list[int]) -> None:
        self.sent.append((milestone.name, source, to))

    def everywhere(self, find: Callable[[], Path | None]) -> None:
        has = [path is not None for path in self.on_each(find)]
        found = next(path for path in self.on_each(find) if path is not None)
        lacking = [node for node, there in enumerate(has) if not there]
        self.sent.append((found.name, has.index(True), lacking))


def three_milestones(nodes: Any) -> MilestoneFolder:
    return MilestoneFolder(nodes.directory, STEPS_1_2_4, lambda *_: None, nodes)


def test_what_was_reached_is_on_the_first_node_and_a_second_and_the_rest_nowhere(
    tmp_path: Path,
) -> None:
    """As after a node was replaced."""
    nodes = Holders(tmp_path / "m", {"chck_40"}, {"chck_20"}, {"chck_20", "chck_40", "chck_70"})
    three_milestones(nodes).go_on_from(3)  # `chck_10` is with nobody
    assert nodes.names == [set(), {"chck_20"}, {"chck_20"}]
    assert nodes.sent == [("chck_20", 1, [0])]
    nodes = Holders(tmp_path / "m", set(), set(), {"chck_10"})
    three_milestones(nodes).go_on_from(1)
    assert nodes.sent == [("chck_10", 2, [0, 1])]


def test_a_second_node_keeps_a_copy(tmp_path: Path) -> None:
    nodes = Holders(tmp_path / "m", {"chck_20"}, set(), set())
    three_milestones(nodes).keep(nn.Linear(1, 1), progress_after(2))
    assert nodes.sent == [("chck_20", 0, [1])]


def progress_after(step: int) -> Any:
    return SimpleNamespace(step=step, tokens=10 * step, seconds=0.0)


def test_at_the_end_every_node_has_all(tmp_path: Path) -> None:
    nodes: Any = Holders(tmp_path / "m", {"chck_20"}, {"chck_10", "chck_20"}, set())
    share_milestones(nodes.directory, nodes)
    assert nodes.sent == [("chck_10", 1, [0, 2]), ("chck_20", 0, [2])]
