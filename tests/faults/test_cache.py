"""A cache whose building is killed and stopped, whose shards are damaged: the same student always.

One run is left in peace. The others have a store of their own with the same teachers in it, and
windows enough that the building takes a while: one window a forward pass, eight phases.
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

pytestmark = pytest.mark.launch

WINDOWS = {"length": 32, "offsets": {"phases": 8}}
OVERRIDES = (
    "distillation.cache=hidden",
    "distillation.cache_tier=disk",
    "student.training.micro_batch=1",
    "student.training.keep=last",
)


@pytest.fixture(scope="module")
def peaceful(once: Any, tiny_job: Callable[..., Path], run_ranks: Callable[..., Any]) -> Any:
    """The run that nothing happens to; not to be changed."""

    def make(scene: Any) -> list[Any]:
        job = tiny_job(scene.folder, windows=WINDOWS, control=None)
        return [run_ranks(job, *OVERRIDES, "--runs", scene.runs)]

    scene = once("peaceful_cache", make)
    scene.ended[0].assert_done()
    return scene


@pytest.fixture(scope="module")
def struck(
    once: Any,
    peaceful: Any,
    start_ranks: Callable[..., Any],
    run_ranks: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> Any:
    """Killed while the first teacher's cache is built, stopped while the second's is, killed while
    the student learns from them, and left in peace the fourth time."""

    def steps(scene: Any) -> int:
        lines = (line for line in metrics(scene.run_dir) if line["stage"] == "student")
        return max((line["step"] for line in lines), default=0)

    def make(scene: Any) -> list[Any]:
        copy_without_cache(peaceful, scene)
        words = (scene.job, *OVERRIDES, "--runs", scene.runs)
        killed = start_ranks(*words)
        killed.wait_until(lambda: some_shards(scene, caches=0), "shards of the first cache")
        killed.signal_all(signal.SIGKILL)
        ended = [killed.end()]
        left = sum(len(list(place.glob("shard-*"))) for place in places(scene))
        stopped = start_ranks(*words)
        stopped.wait_until(lambda: some_shards(scene, caches=1), "shards of the second cache")
        stopped.signal_all(signal.SIGTERM)
        ended.append(stopped.end())
        state = json.loads((scene.run_dir / "state.json").read_text())
        (scene.folder / "found.json").write_text(json.dumps({"left": left, "state": state}))
        killed = start_ranks(*words)
        # A checkpoint stands at step 5. What the peaceful run has logged was copied too, and is
        # taken back when the student's training begins.
        killed.wait_until(lambda: steps(scene) < 9, "first steps of the student")
        killed.wait_until(lambda: steps(scene) >= 9, "step 9 of the student")
        killed.signal_all(signal.SIGKILL)
        ended.append(killed.end())
        return [*ended, run_ranks(*words)]

    return once("struck_cache", make)


def copy_without_cache(source: Any, scene: Any) -> None:
    shutil.copytree(source.runs, scene.runs, symlinks=True)
    shutil.copy(source.job, scene.job)
    shutil.rmtree(scene.run_dir / "student")
    shutil.rmtree(scene.runs / "store" / "teacher_cache")


def places(scene: Any) -> list[Path]:
    return sorted((scene.runs / "store" / "teacher_cache").glob(".building-*"))


def some_shards(scene: Any, *, caches: int) -> bool:
    """So many caches are finished, and another has its first shards."""
    finished = list((scene.runs / "store" / "teacher_cache").glob("[!.]*/manifest.json"))
    begun = [place for place in places(scene) if len(list(place.glob("shard-*.bin"))) >= 2]
    return len(finished) >= caches and bool(begun)


def student(scene: Any, name: str = "tiny-1") -> bytes:
    path: Path = scene.runs / name / "student" / "model.safetensors"
    return path.read_bytes()


# -- killed and stopped ----------------------------------------------------------------------------


def computed(ended: Any) -> list[tuple[str, int, int]]:
    """(teacher, shards computed, shards in all) of each cache that a start had work with."""
    found = re.findall(r"cache of teachers/(\w+): computing (\d+) of (\d+) shards", ended.err)
    return [(name, int(part), int(whole)) for name, part, whole in found]


def test_after_a_kill_the_whole_shards_are_kept(struck: Any) -> None:
    left = json.loads((struck.folder / "found.json").read_text())["left"]
    (_, part, whole), *_ = computed(struck.ended[1])
    assert 2 <= left < whole
    assert part == whole - left


def test_a_stop_request_is_obeyed_in_the_middle_of_building(struck: Any) -> None:
    state = json.loads((struck.folder / "found.json").read_text())["state"]
    assert struck.ended[1].code == 128 + signal.SIGTERM
    assert state["status"] == "stopped"
    assert state["reason"] == "SIGTERM"
    assert "Traceback" not in struck.ended[1].err


def test_the_next_start_computes_only_what_is_missing(struck: Any) -> None:
    ((name, part, whole),) = computed(struck.ended[2])
    assert name == "llama"
    assert 0 < part < whole
    assert "damaged" not in struck.ended[2].err


def test_a_student_resumes_with_the_cache_that_stands(struck: Any) -> None:
    assert computed(struck.ended[3]) == []
    assert re.search(r"going on from .*step-0000000[5-9]", struck.ended[3].err)


def test_the_student_is_that_of_the_peaceful_run(struck: Any, peaceful: Any) -> None:
    struck.ended[3].assert_done()
    assert student(struck) == student(peaceful)
    assert places(struck) == []


# -- damaged ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(once: Any, peaceful: Any, run_ranks: Callable[..., Any]) -> Any:
    """A byte flipped in a shard of one cache, half a shard of the other; another run reads them."""

    def make(scene: Any) -> list[Any]:
        shutil.copytree(peaceful.runs, scene.runs, symlinks=True)
        shutil.copy(peaceful.job, scene.job)
        one, other = entries(scene)
        content = bytearray((one / "shard-00003.bin").read_bytes())
        content[1234] ^= 16
        (one / "shard-00003.bin").write_bytes(content)
        (other / "shard-00005.bin").write_bytes((other / "shard-00005.bin").read_bytes()[:777])
        words = (scene.job, "name=other-{seed}", *OVERRIDES, "--runs", scene.runs)
        return [run_ranks(*words)]

    scene = once("damaged_cache", make)
    scene.ended[0].assert_done()
    return scene


def entries(scene: Any) -> list[Path]:
    return sorted(path.parent for path in scene.runs.glob("store/teacher_cache/*/manifest.json"))


def test_damaged_shards_are_told_by_name_and_computed_anew(damaged: Any) -> None:
    one, other = entries(damaged)
    text = damaged.ended[0].err
    assert f"{one / 'shard-00003.bin'} is damaged (its checksum does not hold)" in text
    assert re.search(rf"{other / 'shard-00005.bin'} is damaged \(777 bytes instead of \d+\)", text)
    assert sorted(part for _, part, _ in computed(damaged.ended[0])) == [1, 1]


def test_and_the_student_is_that_of_the_peaceful_run(damaged: Any, peaceful: Any) -> None:
    assert student(damaged, "other-1") == student(peaceful)


def test_and_the_cache_is_whole_again(damaged: Any, peaceful: Any) -> None:
    for mended, whole in zip(entries(damaged), entries(peaceful), strict=True):
        for path in whole.iterdir():
            assert (mended / path.name).read_bytes() == path.read_bytes()
