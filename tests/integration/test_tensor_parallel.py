"""A teacher split over two ranks makes the student that it makes whole, but for rounding.

In fp32 and in a job that does not amplify rounding. The runs share a store: the teachers are
trained by the first of them, whole, as all are; split they teach and are measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

STEPS = 24
SPLIT = "teachers.llama.tensor_parallel=2"
BY_LAUNCHER = "split"
CASES: dict[str, tuple[str, ...]] = {
    "whole": (),
    BY_LAUNCHER: (SPLIT,),
    "hidden-split": ("distillation.cache=hidden", SPLIT),
}
WHOLE = {BY_LAUNCHER: "whole", "hidden-split": "whole"}
"""What each is to be like."""


@pytest.fixture(scope="module")
def ran(
    once: Any,
    tiny_job: Callable[..., Path],
    run_ranks: Callable[..., Any],
    launch: Callable[..., Any],
) -> Any:
    def make(scene: Any) -> list[Any]:
        windows = {"length": 32, "offsets": {"phases": 2}}
        evaluation = {
            "samples": 2,
            "milestones": {},
            "batch_tokens": 96,  # several batches, which ranks by themselves would deal out
            "minimal_pairs": [{"name": "order", "path": str(pairs_of_words(scene.folder))}],
        }
        job = tiny_job(scene.folder, windows=windows, control=None, evaluation=evaluation)
        ended = []
        for name, overrides in CASES.items():
            words = (
                *(job, f"name={name}", "student.training.keep=last"),
                *("deepspeed.config=zero2_cpu_fp32", "distillation.soft_reduction=token"),
                *("student.training.learning_rate=2e-3", "student.training.batch_windows=24"),
                *("student.training.micro_batch=4", *overrides, "--runs", scene.runs),
            )
            ended.append((launch if name == BY_LAUNCHER else run_ranks)(*words))
        return ended

    scene = once("tensor_parallel", make)
    for ended in scene.ended:
        ended.assert_done()
    return scene


def pairs_of_words(folder: Path) -> Path:
    """Sentences of the text, and the same from behind."""
    folder = folder / "pairs"
    folder.mkdir()
    lines = []
    for person in ("mara", "the baker", "old tim", "my aunt"):
        for act in ("paints", "carries", "wants", "mends", "hides"):
            words = f"{person} {act} a blue boat".split()
            good, bad = " ".join(words), " ".join(reversed(words))
            lines.append(json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n")
    (folder / "order.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("split", WHOLE)
@pytest.mark.parametrize("key", ["loss", "ce", "kl", "grad_norm", "dev_ce"])
def test_the_students_curve(
    ran: Any, split: str, key: str, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    def curve(name: str) -> list[float]:
        lines = metrics(ran.runs / name)
        return [line[key] for line in lines if line["stage"] == "student" and key in line]

    expected = curve(WHOLE[split])
    assert len(expected) == (3 if key == "dev_ce" else STEPS)
    # A KL is a small difference of log-probabilities, of which fp32 keeps 5e-7 each.
    tolerance = 1e-6 if key == "kl" else 0
    assert curve(split) == pytest.approx(expected, rel=1e-5, abs=tolerance)


@pytest.mark.parametrize("split", WHOLE)
def test_it_was_split(ran: Any, split: str) -> None:
    """Sums in another order leave traces, in this curve of fp32 too."""
    weights = [ran.runs / name / "student" / "model.safetensors" for name in (split, WHOLE[split])]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_it_is_measured_as_it_is_whole(ran: Any) -> None:
    """In its group: nothing dropped or counted twice, and the texts that it writes are the same."""
    split, whole = (
        json.loads((ran.runs / name / "evaluation" / "llama.json").read_text())
        for name in (BY_LAUNCHER, "whole")
    )
    dropped = ("seconds", "dev")
    assert {k: v for k, v in split.items() if k not in dropped} == {
        k: v for k, v in whole.items() if k not in dropped
    }
    assert len(split["samples"]) == 2
    assert split["minimal_pairs"]["order"]["tasks"]["order"]["pairs"] == 20
    of_split, of_whole = split["dev"], whole["dev"]
    assert of_split["ce"] == pytest.approx(of_whole["ce"], rel=1e-6)
    assert of_split["ce"] != of_whole["ce"], "the whole model's measurement was taken for it"
    for key in ("tokens", "windows"):
        assert of_split[key] == of_whole[key]


def test_split_teachers_are_trained_as_whole_ones(ran: Any) -> None:
    teachers = {(ran.runs / name / "teachers" / "llama").resolve() for name in CASES}
    assert len(teachers) == 1
    assert (ran.runs / BY_LAUNCHER / "report" / "report.json").exists()


def test_remembered_states_are_those_of_the_split_teacher_to_the_bit(ran: Any) -> None:
    live, remembered = (
        (ran.runs / name / "student" / "model.safetensors").read_bytes() for name in WHOLE
    )
    assert remembered == live
    told = ran.ended[list(CASES).index("hidden-split")].err
    assert "cache of teachers/llama: computing" in told


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("teachers.gpt2.tensor_parallel=2",),
            "teachers[0].tensor_parallel: got 2 for a gpt2, expected 1",
        ),
        (
            ("teachers.llama.tensor_parallel=3",),
            "teachers[1].tensor_parallel: got 3 for a model whose num_heads is 4",
        ),
        (
            (SPLIT, "student.training.micro_batch=auto"),
            "student.training.micro_batch: got auto, expected a number, since teachers.llama",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_by_check(
    tiny_job: Callable[..., Path],
    run_alone: Callable[..., Any],
    tmp_path: Path,
    overrides: tuple[str, ...],
    expected: str,
) -> None:
    ended = run_alone("check", tiny_job(tmp_path), *overrides)
    assert ended.code == 2
    assert expected in ended.err


def test_one_rank_is_no_group_of_two(
    tiny_job: Callable[..., Path], run_alone: Callable[..., Any], tmp_path: Path
) -> None:
    ended = run_alone("run", tiny_job(tmp_path), SPLIT, "--runs", tmp_path / "runs")
    assert ended.code == 2
    assert "teachers.llama.tensor_parallel: got 2 with 1 rank, expected a divisor" in ended.err
    planned = run_alone("plan", tiny_job(tmp_path), SPLIT, "--runs", tmp_path / "runs")
    assert planned.code == 0, planned.err
    assert "got" not in planned.err
