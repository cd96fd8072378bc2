"""Models and tokenizers of the hub: read at one commit, the same in every start of a run.

The hub is a server on this machine; the library that reads it is the real one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from reading_hub import ReadingHub, reading_hub

ELDER = "someone/elder"


@pytest.fixture(scope="module")
def hub() -> Iterator[ReadingHub]:
    with reading_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(hub: ReadingHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine that knows this hub, and has read nothing of it yet."""
    cache = str(tmp_path_factory.mktemp("home"))
    return {"HF_ENDPOINT": hub.url, "HF_HOME": cache, "HF_HUB_OFFLINE": "0"}


@pytest.fixture(scope="module")
def scene(
    once: Any,
    finished: Any,
    hub: ReadingHub,
    home: Mapping[str, str],
    tiny_job: Callable[..., Path],
    run_alone: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A run with the hub's teacher and tokenizer; the branch moves; it is started again, and
    another one is begun."""
    folder = tmp_path_factory.mktemp("hub_models")
    student = folder / "published"
    shutil.copytree(finished.run_dir / "student", student)
    for ours in ("manifest.json", "README.md"):
        (student / ours).unlink(missing_ok=True)
    later = Path(shutil.copytree(student, folder / "later"))
    weights = load_file(later / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    save_file(
        {**weights, name: weights[name] * 1.5},
        later / "model.safetensors",
        metadata={"format": "pt"},
    )
    job = tiny_job(
        folder / "job",
        tokenizer={"kind": "pretrained", "path": ELDER},
        teachers=[{"name": "elder", "model": {"kind": "pretrained", "path": ELDER}}],
        control=None,
    )
    runs = folder / "runs"

    def run(*overrides: str, **env: str) -> Any:
        return run_alone("run", job, "--runs", runs, *overrides, env={**home, **env})

    first = hub.publish(ELDER, student, "v1")
    ended = {"first": run()}
    second = hub.publish(ELDER, later)
    ended["again"] = run("evaluation.samples=1")
    ended["without a hub"] = run("evaluation.samples=1", HF_ENDPOINT="http://127.0.0.1:9")
    ended["moved"] = run("name=moved", "evaluation.samples=0")
    ended["named"] = run("name=named", "evaluation.samples=0", "teachers.0.model.revision=v1")
    return {"runs": runs, "first": first, "second": second, "ended": ended}


def entry(scene: Mapping[str, Any], run: str) -> Path:
    return (scene["runs"] / run / "teachers" / "elder").resolve()


def test_a_run_says_and_keeps_the_commit(scene: dict[str, Any]) -> None:
    ended = scene["ended"]["first"]
    ended.assert_done()
    told = f"teachers.elder.model: {ELDER} of the hub, at commit {scene['first']}"
    assert told in ended.err
    facts = json.loads((scene["runs"] / "tiny-1" / "environment.json").read_text())
    assert facts["settled"]["hub"] == {ELDER: scene["first"]}


@pytest.mark.parametrize("which", ["again", "without a hub"])
def test_a_later_start_reads_the_same_commit(scene: dict[str, Any], which: str) -> None:
    ended = scene["ended"][which]
    ended.assert_done()
    assert "teachers/elder: done before" in ended.err
    assert "student: done before" in ended.err
    assert scene["second"] not in ended.err


def test_another_run_reads_the_branch_as_it_is(scene: dict[str, Any]) -> None:
    scene["ended"]["moved"].assert_done()
    assert entry(scene, "moved") != entry(scene, "tiny-1")


def test_a_tag_is_the_commit_it_stands_for(scene: dict[str, Any]) -> None:
    scene["ended"]["named"].assert_done()
    assert entry(scene, "named") == entry(scene, "tiny-1")


def test_the_hub_is_asked_once_for_a_commit(scene: dict[str, Any], hub: ReadingHub) -> None:
    asked = [line for line in hub.asked if line == f"GET /api/models/{ELDER}"]
    assert len(asked) == len(("first", "moved", "named's tokenizer"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "teachers.0.model.path=out/elder",
            "teachers.elder.model: got out/elder: no such directory here; as a hub id: there is "
            "none of this name, or it is private",
        ),
        (
            "teachers.0.model.revision=v9",
            f"teachers.elder.model: got {ELDER}: no such directory here; as a hub id: it has no "
            "commit, tag or branch v9",
        ),
        (
            "teachers.0.model.path=/no/such",
            "teachers.elder.model: got /no/such: no such file or directory",
        ),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_read(
    scene: dict[str, Any],
    home: dict[str, str],
    run_alone: Callable[..., Any],
    override: str,
    said: str,
) -> None:
    job = scene["runs"].parent / "job" / "job.yaml"
    ended = run_alone("run", job, "--runs", scene["runs"], "name=no", override, env=home)
    assert ended.code == 2
    assert said in ended.err
