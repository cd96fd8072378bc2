"""A run killed in every way a machine can, and started again with the same command each time.

It must end with the models of the undisturbed run, bit for bit. The strokes fall one after
another on the same run, each in the middle of another training.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

# A checkpoint stands at step 5, the next would at 10. The student was best at step 8: from then on
# its best weights live in the checkpoint only.
STRIKE_AFTER_STEP = 9
STAGES = ("teachers/gpt2", "teachers/llama", "student", "control")
TIMES = ("seconds", "tokens_per_s", "flops_per_s", "mfu")
STATES = "states.json"


def kill_a_rank(running: Any) -> Callable[[], None]:
    pid = running.pid_of("--local_rank=1")
    return lambda: os.kill(pid, signal.SIGKILL)


def kill_the_command(running: Any) -> Callable[[], None]:
    return lambda: os.kill(running.pid, signal.SIGKILL)


def kill_the_launcher(running: Any) -> Callable[[], None]:
    pid = running.pid_of("deepspeed.launcher.launch")
    return lambda: os.kill(pid, signal.SIGKILL)


def terminate_the_command(running: Any) -> Callable[[], None]:
    return lambda: os.kill(running.pid, signal.SIGTERM)


STROKES = dict(
    zip(
        STAGES,
        # GPT-2 has dropout: its random numbers must come back too.
        (kill_a_rank, kill_the_command, kill_the_launcher, terminate_the_command),
        strict=True,
    )
)


@pytest.fixture(scope="module")
def struck(
    once: Any,
    tiny_job: Callable[..., Path],
    start_launcher: Callable[..., Any],
    launch: Callable[..., Any],
    metrics: Callable[[Path], list[dict[str, Any]]],
) -> Any:
    """The starts in order: one for each stroke, then one that is left in peace."""

    def steps(scene: Any, stage: str) -> int:
        lines = (line for line in metrics(scene.run_dir) if line["stage"] == stage)
        return max((line["step"] for line in lines), default=0)

    def checkpoints(scene: Any, stage: str) -> Iterator[Path]:
        if stage.startswith("teachers/"):  # only the one in training has any
            return scene.runs.glob("store/teachers/.building-*/step-*")
        return (scene.run_dir / "checkpoints" / stage).glob("step-*")

    def make(scene: Any) -> list[Any]:
        words = (tiny_job(scene.folder), "--runs", scene.runs)
        ended, states = [], []
        for stage, stroke in STROKES.items():
            running = start_launcher(*words)
            running.wait_until(lambda at=stage: steps(scene, at) > 0, f"a step of {stage}")
            strike = stroke(running)
            running.wait_until(
                lambda at=stage: steps(scene, at) >= STRIKE_AFTER_STEP,
                f"step {STRIKE_AFTER_STEP} of {stage}",
            )
            strike()
            ended.append(running.end())
            states.append(
                {
                    "state": json.loads((scene.run_dir / "state.json").read_text()),
                    "checkpoints": sorted(path.name for path in checkpoints(scene, stage)),
                }
            )
        (scene.folder / STATES).write_text(json.dumps(states))
        return [*ended, launch(*words)]

    return once("struck", make)


@pytest.fixture(scope="module")
def states(struck: Any) -> dict[str, dict[str, Any]]:
    """After each stroke: `state.json`, and the names of the stage's checkpoints."""
    return dict(zip(STAGES, json.loads((struck.folder / STATES).read_text()), strict=True))


def resumed_from(ended: Any) -> int | None:
    found = re.findall(r"going on from .*step-(\d+)", ended.err)
    return int(found[0]) if found else None


# -- each stroke ----------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_launch(struck: Any, states: dict[str, dict[str, Any]]) -> None:
    assert struck.ended[0].code != 0
    assert states["teachers/gpt2"]["state"]["status"] != "done"
    assert states["teachers/gpt2"]["checkpoints"][0] == "step-00000005"


@pytest.mark.parametrize("stage", STAGES[1:])
def test_ranks_notice_that_the_launcher_is_gone(
    struck: Any, states: dict[str, dict[str, Any]], stage: str
) -> None:
    found = states[stage]
    assert found["state"]["status"] == "stopped"
    assert found["state"]["reason"] == "launcher gone"
    assert "Traceback" not in struck.ended[STAGES.index(stage)].err
    # They wrote a checkpoint before they left: at the step where they noticed.
    newest = int(found["checkpoints"][-1].removeprefix("step-"))
    assert newest >= STRIKE_AFTER_STEP
    assert found["state"]["at"] == f"{stage}, step {newest}"


def test_a_terminated_command_says_so_by_its_exit_status(struck: Any) -> None:
    assert struck.ended[3].code == -signal.SIGTERM


@pytest.mark.parametrize("stage", STAGES)
def test_the_next_start_goes_on_from_the_newest_checkpoint(
    struck: Any, states: dict[str, dict[str, Any]], stage: str
) -> None:
    newest = int(states[stage]["checkpoints"][-1].removeprefix("step-"))
    assert resumed_from(struck.ended[STAGES.index(stage) + 1]) == newest


# -- the end --------------------------------------------------------------------------------------


def test_it_ends_as_if_nothing_had_happened(struck: Any) -> None:
    struck.ended[-1].assert_done()
    assert json.loads((struck.run_dir / "state.json").read_text()) == {"status": "done"}
    assert not list(struck.run_dir.glob("checkpoints/**/*.safetensors"))
    names = [path.name for path in struck.runs.rglob("*")]
    leftovers = [name for name in names if ".tmp" in name or ".building" in name]
    assert leftovers == []


@pytest.mark.parametrize("stage", STAGES)
def test_same_weights_bit_for_bit(struck: Any, finished: Any, stage: str) -> None:
    mine, theirs = (
        (scene.run_dir / stage / "model.safetensors").read_bytes() for scene in (struck, finished)
    )
    assert mine == theirs


def test_same_milestones(struck: Any, finished: Any) -> None:
    """The second was reached before the student was struck, behind its checkpoint."""

    def weights(scene: Any) -> dict[str, bytes]:
        folder = scene.run_dir / "milestones"
        found = sorted(folder.glob("*/*/model.safetensors"))
        return {str(path.parent.relative_to(folder)): path.read_bytes() for path in found}

    assert list(weights(finished)) == [
        "control/chck_1K",
        "student/chck_2150",
        "student/chck_400",
        "student/chck_700",
    ]
    assert weights(struck) == weights(finished)


@pytest.mark.parametrize("stage", STAGES)
def test_same_curves(
    struck: Any, finished: Any, metrics: Callable[[Path], list[dict[str, Any]]], stage: str
) -> None:
    def curve(scene: Any) -> list[dict[str, Any]]:
        lines = [line for line in metrics(scene.run_dir) if line["stage"] == stage]
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]

    assert curve(struck) == curve(finished)


def test_same_report(struck: Any, finished: Any) -> None:
    def measured(scene: Any) -> dict[str, dict[str, Any]]:
        report = json.loads((scene.run_dir / "report" / "report.json").read_text())
        return {
            name: {key: value for key, value in model.items() if key not in TIMES}
            for name, model in report["models"].items()
        }

    assert measured(struck) == measured(finished)
