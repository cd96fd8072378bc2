"""Two nodes with a runs folder each, or with one that they share, or do not share as promised.

A node is a rank with a working folder of its own: the same relative `--runs` is another folder. The
run that all others are compared with has two ranks on one node.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.files import sha256_file, verify_manifest

pytestmark = pytest.mark.launch

STRIKE_AFTER_STEP = 9
"""A checkpoint stands at step 5, the next would at 10."""
CACHED = ("distillation.cache=hidden",)
PHASES = {"length": 32, "offsets": {"phases": 2}}
NODE = ("--runs", "runs", "deepspeed.storage=node", *CACHED)
ENTRIES = {"tokenizers": 1, "tokens": 1, "teachers": 2}


@pytest.fixture(scope="module")
def undisturbed(once: Any, tiny_job: Callable[..., Path], run_ranks: Callable[..., Any]) -> Any:
    """Two ranks on one node."""

    def make(scene: Any) -> list[Any]:
        return [run_ranks(tiny_job(scene.folder, windows=PHASES), "--runs", scene.runs, *CACHED)]

    scene = once("storage_undisturbed", make)
    scene.ended[0].assert_done()
    return scene


def folders_of(scene: Any) -> list[Path]:
    return [scene.folder / "node 0", scene.folder / "node 1"]


def weights(run_dir: Path) -> dict[str, str]:
    models = ("teachers/gpt2", "teachers/llama", "student", "control")
    kept = ("student/chck_400", "student/chck_700", "student/chck_2150", "control/chck_1K")
    names = [*models, *(f"milestones/{name}" for name in kept)]
    return {name: sha256_file(run_dir / name / "model.safetensors") for name in names}


# -- a storage on each node ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def struck(
    once: Any,
    tiny_job: Callable[..., Path],
    start_nodes: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> Any:
    """Killed in the trainings of a teacher, the student and the control, a node lost each time.

    The first one leads; the second has copies.
    """

    def make(scene: Any) -> list[Any]:
        words = (tiny_job(scene.folder, windows=PHASES), *NODE)
        nodes = folders_of(scene)
        ended = []
        for stage, lost in (("teachers/llama", 0), ("student", 1), ("control", 0)):

            def steps(stage: str = stage) -> int:
                lines = metrics(nodes[0] / "runs" / "tiny-1")
                return max((line["step"] for line in lines if line["stage"] == stage), default=0)

            running = start_nodes(nodes, *words)
            running.wait_until(lambda steps=steps: steps() >= STRIKE_AFTER_STEP, f"step of {stage}")
            running.signal_all(signal.SIGKILL)
            ended.append(running.end())
            shutil.rmtree(nodes[lost])
        ended.append(start_nodes(nodes, *words).end())
        return ended

    scene = once("storage_struck", make)
    scene.ended[-1].assert_done()
    return scene


@pytest.mark.parametrize("node", [0, 1])
def test_each_node_ends_with_the_models_of_an_undisturbed_run(
    struck: Any, undisturbed: Any, node: int
) -> None:
    run_dir = folders_of(struck)[node] / "runs" / "tiny-1"
    assert weights(run_dir) == weights(undisturbed.run_dir)


def test_it_went_on_with_what_the_other_node_had(struck: Any) -> None:
    _, second, third, fourth = (ended.err for ended in struck.ended)
    for said in (second, third, fourth):
        assert said.count("teachers/gpt2: done before") == 1
    for said in (third, fourth):
        assert said.count("teachers/llama: done before") == 1
    (place,) = re.findall(r"going on from (.*)", second)
    assert re.fullmatch(r"runs/store/teachers/\.building-\w+/step-00000005", place)
    assert "going on from runs/tiny-1/checkpoints/student/step-00000005" in third
    assert "student: done before" in fourth
    assert "going on from runs/tiny-1/checkpoints/control/step-00000005" in fourth
    for said in (second, fourth):
        assert "step-00000005: sent to node 0" in said


def test_every_node_holds_whole_entries_and_nothing_unfinished(struck: Any) -> None:
    one, two = (node / "runs" for node in folders_of(struck))
    for kind, number in ENTRIES.items():
        mine, theirs = (
            {
                path.parent.name: verify_manifest(path.parent).files
                for path in (runs / "store" / kind).glob("*/manifest.json")
            }
            for runs in (one, two)
        )
        assert len(mine) == number
        assert mine == theirs
    # Nobody asked for the caches after the first node was replaced: the student stood.
    caches = list((two / "store" / "teacher_cache").glob("*/manifest.json"))
    assert len([verify_manifest(path.parent) for path in caches]) == 2
    for runs in (one, two):
        names = [path.name for path in runs.rglob("*")]
        assert [name for name in names if "tmp" in name or name.endswith(".lock.json")] == []
        assert not list(runs.glob("tiny-1/checkpoints/**/*.safetensors"))
        assert [name for name in names if ".building" in name] == []


def test_both_nodes_tell_how_the_run_stands_and_the_first_reports(
    struck: Any, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    one, two = (node / "runs" / "tiny-1" for node in folders_of(struck))
    for run_dir in (one, two):
        assert json.loads((run_dir / "state.json").read_text()) == {"status": "done"}
        for name in ("job.yaml", "stages.json", "settled.json", "environment.json"):
            assert (run_dir / name).read_bytes() == (one / name).read_bytes()
    assert (one / "report" / "report.html").is_file()
    assert not (two / "report").exists()
    steps = [(line["stage"], line["step"]) for line in metrics(one) if "loss" in line]
    assert len(steps) == len(set(steps)) == 4 * 24


# -- refusals --------------------------------------------------------------------------------------


def test_a_runs_folder_that_is_not_shared_is_refused_before_anything_is_made(
    tmp_path: Path, tiny_job: Callable[..., Path], start_nodes: Callable[..., Any]
) -> None:
    """By both ranks, with the same exit status (which `end` asserts)."""
    nodes = [tmp_path / "node 0", tmp_path / "node 1"]
    ended = start_nodes(nodes, tiny_job(tmp_path), "--runs", "runs").end()
    assert ended.code == 2
    assert "\nerror: node 1, host " in f"\n{ended.err}"
    assert "got no such file, expected what node 0, host " in ended.err
    assert (
        "hint: mount it there, or keep runs on each node with deepspeed.storage=node" in ended.err
    )
    assert ended.err.count("error:") == 1
    assert "Traceback" not in ended.err
    assert [path.name for node in nodes for path in node.rglob("*")] == ["runs"]
