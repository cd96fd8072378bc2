"""The proof's orchestrator: order, what is written when, and going on after whatever happens.

Its parts are made up here, except that one real part is rehearsed on the CPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from gpu import proof, test_syncs
from gpu.measures import at_most, holds, told
from gpu.parts import environment, experiment
from gpu.proof import Part, Record, prove

FACTS = {"device": "made up", "torch": "0", "commit": "0"}


def part(name: str, script: str, *, budget_s: float = 60, alone: bool = False) -> Part:
    command = [sys.executable, "-u", "-c", script]
    return Part(name=name, budget_s=budget_s, alone=alone, command=lambda _: command)


def says(*measures: Any, then: str = "") -> str:
    lines = "".join(f"print({measure.as_line()!r})\n" for measure in measures)
    return f"print('some noise')\n{lines}{then}"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def ends_of(folder: Path) -> dict[str, str]:
    return {line["part"]: line["ended"] for line in lines_of(folder) if "ended" in line}


def test_parts_in_order_each_with_its_measures(tmp_path: Path) -> None:
    parts = [
        part("one", says(at_most("error", 0.5, 1.0), told("speed", 3.0))),
        part("two", says(at_most("error", 2.0, 1.0), holds("sound", True, "yes"))),
        part("three", says(at_most("error", float("nan"), 1.0))),
        part("four", says(told("said", "words"))),
    ]
    assert prove(parts, Record(tmp_path, FACTS), device="cpu") == 1
    kinds = [
        (line["part"], *({"begun", "measure", "ended"} & line.keys()))
        for line in lines_of(tmp_path)[1:]
    ]
    assert kinds == [
        ("one", "begun"), ("one", "measure"), ("one", "measure"), ("one", "ended"),
        ("two", "begun"), ("two", "measure"), ("two", "measure"), ("two", "ended"),
        ("three", "begun"), ("three", "measure"), ("three", "ended"),
        ("four", "begun"), ("four", "measure"), ("four", "ended"),
    ]  # fmt: skip
    assert ends_of(tmp_path) == {
        "one": "passed", "two": "failed", "three": "failed", "four": "passed"
    }  # fmt: skip
    shown = (tmp_path / "table.md").read_text()
    assert "made up" in shown
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert ["one", "error", "0.5", "≤ 1", "ok"] in rows
    assert ["one", "speed", "3", "", ""] in rows
    assert ["two", "error", "2", "≤ 1", "**WRONG**"] in rows
    assert ["two", "failed", "2", "1", "1 wrong"] in rows
    assert "some noise" in (tmp_path / "log.txt").read_text()


def test_what_breaks_or_takes_too_long_stops_no_other_part(tmp_path: Path) -> None:
    """What it has measured before stands; whatever it has started is ended with it."""
    pid = tmp_path / "pid"
    started = (
        f"import subprocess, time, pathlib\n"
        "p = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(p.pid))\ntime.sleep(60)\n"
    )
    parts = [
        part("raises", says(told("a", 1.0), then="raise RuntimeError('no kernel image')")),
        part("dies", says(told("b", 2.0), then="import os; os.kill(os.getpid(), 11)")),
        part("hangs", says(told("c", 3.0), then=started), budget_s=3),
        part("last", says(told("d", 4.0))),
    ]
    record = Record(tmp_path / "out", FACTS)
    assert prove(parts, record, device="cpu") == 1
    assert ends_of(tmp_path / "out") == {
        "raises": "broken", "dies": "broken", "hangs": "over time", "last": "passed"
    }  # fmt: skip
    assert record.why("raises") == "status 1: RuntimeError: no kernel image"
    assert record.why("dies").startswith("status -11")
    measured = [
        line["measure"]["check"] for line in lines_of(tmp_path / "out") if "measure" in line
    ]
    assert measured == ["a", "b", "c", "d"]
    until = time.monotonic() + 10
    while _lives(int(pid.read_text())) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _lives(int(pid.read_text()))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_started_again_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts that have ended are passed over, wrong ones too; `again` runs one all the same."""
    parts = [
        part("one", says(told("a", 1.0))),
        part("two", says(at_most("b", 2.0, 1.0))),
        part("three", says(told("c", 3.0))),
    ]
    out = tmp_path / "out"
    prove(parts[:2], Record(out, FACTS), device="cpu")
    before = lines_of(out)
    assert prove(parts, Record(out, FACTS), device="cpu") == 1
    assert lines_of(out)[: len(before)] == before
    assert [line["part"] for line in lines_of(out)[len(before) :]] == ["three"] * 3
    assert "one: done before (passed)" in capsys.readouterr().out
    mended = part("two", says(at_most("b", 0.5, 1.0)))
    record = Record(out, FACTS)
    assert prove([parts[0], mended, parts[2]], record, device="cpu", again=["two"]) == 0
    assert [measure["found"] for measure in record.measures("two")] == ["0.5"]
    assert "**WRONG**" not in (out / "table.md").read_text()


def test_half_a_line_of_a_cut_off_is_taken_out(tmp_path: Path) -> None:
    record = Record(tmp_path, FACTS)
    record.add({"part": "one", "begun": "now"})
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"part": "one", "mea')
    again = Record(tmp_path, FACTS)
    assert again.ended("one") is None
    again.add({"part": "one", "begun": "later"})
    assert [line.get("begun") for line in lines_of(tmp_path)] == [None, "now", "later"]


def test_a_proof_of_another_machine_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Record(tmp_path, FACTS)
    with pytest.raises(SystemExit) as caught:
        Record(tmp_path, FACTS | {"commit": "1"})
    assert caught.value.code == 2
    assert "give another folder (--out)" in capsys.readouterr().err


def test_no_part_is_begun_without_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part("one", says(told("a", 1.0))), part("two", says(told("b", 1.0)))]
    record = Record(tmp_path, FACTS)
    assert prove(parts, record, device="cpu", seconds=proof.LEAST_S - 1) == 0
    assert record.ended("one") is None
    assert "one: no time left; start again to go on" in capsys.readouterr().out
    assert "not begun" in (tmp_path / "table.md").read_text()


def test_a_part_that_the_sitting_cuts_off_begins_anew(tmp_path: Path) -> None:
    """Its own time was not over: the next sitting gives it the rest."""
    came = tmp_path / "came"
    script = (
        f"import pathlib, time\ncame = pathlib.Path({str(came)!r})\n"
        "if not came.exists():\n    came.touch()\n    time.sleep(60)\n" + says(told("a", 1.0))
    )
    parts, record = [part("one", script, budget_s=50)], Record(tmp_path / "out", FACTS)
    assert prove(parts, record, device="cpu", seconds=proof.LEAST_S + 0.5) == 0
    assert came.exists()
    assert record.ended("one") is None
    assert record.cut_off("one").startswith("ended after")
    assert " cut off " in (record.folder / "table.md").read_text()
    assert prove(parts, record, device="cpu") == 0
    assert record.ended("one") == "passed"


# -- several at once -------------------------------------------------------------------------------


def meets(folder: Path, name: str, other: str) -> str:
    """Ends well only if the other runs at the same time."""
    return (
        "import pathlib, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        f"(folder / {name!r}).touch()\n"
        f"while not (folder / {other!r}).exists():\n    time.sleep(0.01)\n" + says(told("met", 1.0))
    )


def finds_no_other(folder: Path, name: str) -> str:
    """Ends well only if none of its like runs at the same time."""
    return (
        "import pathlib, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "assert not list(folder.glob('*.runs'))\n"
        f"mine = folder / '{name}.runs'\nmine.touch()\ntime.sleep(0.3)\nmine.unlink()\n"
    )


def test_parts_share_the_card_but_for_those_that_are_alone(tmp_path: Path) -> None:
    parts = [
        part("rate", finds_no_other(tmp_path, "rate"), alone=True),
        part("one", meets(tmp_path, "one", "two"), budget_s=20),
        part("two", meets(tmp_path, "two", "one"), budget_s=20),
        part("bench", finds_no_other(tmp_path, "bench"), alone=True),
        part("last", finds_no_other(tmp_path, "last"), alone=True),
    ]
    out = tmp_path / "out"
    assert prove(parts, Record(out, FACTS), device="cpu", jobs=2) == 0
    assert ends_of(out) == dict.fromkeys(("rate", "one", "two", "bench", "last"), "passed")
    order = [line["part"] for line in lines_of(out) if "begun" in line]
    assert order[0] == "rate"
    assert order[3:] == ["bench", "last"]
    assert "one: some noise" in (out / "log.txt").read_text()
    alone = [part("one", meets(tmp_path / "nowhere", "one", "two"), budget_s=1)]
    assert prove(alone, Record(tmp_path / "alone", FACTS), device="cpu", jobs=1) == 1


def test_interrupted_it_ends_all_that_run_and_says_nothing_of_them(tmp_path: Path) -> None:
    sleeps = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))"
    script = (
        "import signal, sys\nfrom pathlib import Path\nfrom gpu.proof import Part, Record, prove\n"
        # Ignored where the tests run in the background of a shell, and inherited.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def part(name):\n"
        f"    words = [sys.executable, '-c', {sleeps + '; time.sleep(60)'!r}, name]\n"
        "    return Part(name=name, budget_s=60, command=lambda _: words)\n"
        f"names = [{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]\n"
        f"prove([part(n) for n in names], Record(Path({str(tmp_path / 'out')!r}), {FACTS!r}), "
        "device='cpu', jobs=2)\n"
    )
    tests = str(Path(proof.__file__).resolve().parents[1])
    running = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    pids = [tmp_path / "a", tmp_path / "b"]
    until = time.monotonic() + 60
    while not all(p.exists() and p.read_text() for p in pids) and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    assert running.wait(20) != 0
    assert not any(_lives(int(path.read_text())) for path in pids)
    assert ends_of(tmp_path / "out") == {}


# -- a part that goes on ---------------------------------------------------------------------------


def test_a_part_that_goes_on_has_not_ended_when_its_time_is_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it says so itself or had to be ended; every start's seconds stand in the record."""
    mark = tmp_path / "mark"
    script = (
        f"import json, os, pathlib, time\nmark = pathlib.Path({str(mark)!r})\n"
        "assert 0 < float(os.environ['GPU_PROOF_UNTIL']) - time.time() <= 4\n"
        "starts = mark.read_text() if mark.exists() else ''\nmark.write_text(starts + 'x')\n"
        "if starts == '':\n    print(json.dumps({'unfinished': 'at step 3'}))\n"
        "if starts == 'x':\n    time.sleep(60)\n"
        f"if starts == 'xx':\n    print({holds('end', True, 'yes').as_line()!r})\n"
    )
    out = tmp_path / "out"
    plain = part("run", script, budget_s=4)
    goes_on = Part(name="run", budget_s=4, command=plain.command, goes_on=True)
    for why in ("at step 3", "ended after 4 s"):
        record = Record(out, FACTS)
        assert prove([goes_on], record, device="cpu") == 0
        assert record.ended("run") is None
        assert f"run: cut off ({why}); start again to go on" in capsys.readouterr().out
        assert f"| run  | cut off |        0 |     0 | {why} |" in (out / "table.md").read_text()
    record = Record(out, FACTS)
    assert prove([goes_on], record, device="cpu") == 0
    assert record.ended("run") == "passed"
    assert "cut off" not in (out / "table.md").read_text()
    assert len([line for line in lines_of(out) if "seconds" in line]) == 3
    assert mark.read_text() == "xxx"


def test_a_run_that_was_killed_before_it_was_asked_to_stop_has_failed() -> None:
    killed = -signal.SIGKILL
    assert experiment.is_to_go_on(killed, asked=True)
    assert not experiment.is_to_go_on(killed, asked=False)
    assert experiment.is_to_go_on(experiment.STOPPED, asked=False)
    assert not experiment.is_to_go_on(1, asked=True)


@pytest.mark.parametrize(
    ("obeys", "status"), [(True, experiment.STOPPED), (False, -signal.SIGKILL)]
)
def test_an_experiment_is_asked_to_stop_before_it_is_killed(obeys: bool, status: int) -> None:
    answer = f"sys.exit({experiment.STOPPED})" if obeys else "None"
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: {answer})\nprint('up', flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert experiment.end_within(process, 0.1, grace_s=2 if obeys else 0.3) == status


@pytest.mark.parametrize(
    ("state", "killed", "told"),
    [
        ({"status": "stopped", "at": "student, step 3"}, False, "is at student, step 3"),
        ({"status": "stopped", "at": "student, step 3"}, True, "is at student, step 3"),
        ({"status": "running"}, True, "was killed, since it did not stop in time"),
        (None, True, "was killed, since it did not stop in time"),
        ({"status": "stopped"}, False, "was stopped between trainings"),
    ],
)
def test_where_an_experiment_is_left(
    state: dict[str, str] | None, killed: bool, told: str, tmp_path: Path
) -> None:
    if state is not None:
        (tmp_path / "state.json").write_text(json.dumps(state))
    assert experiment._left(tmp_path, killed=killed).startswith(told)


def test_an_experiment_that_ends_in_time_keeps_its_status() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert experiment.end_within(process, 60, grace_s=1) == 3


def test_the_largest_models_checkpoint_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BABYLM_DATA", "/data")
    small, large = (
        experiment.stopping_s(load_job(find_job(name))) for name in ("babyllama97", "babyllama25")
    )
    fixed = experiment.STEP_S + experiment.COLLECT_S
    a_byte_s = 1 / experiment.BYTES_A_SECOND
    assert small == pytest.approx(fixed + 97_540_608 * 14 * a_byte_s)
    assert large == pytest.approx(fixed + 704_928_768 * 14 * a_byte_s)


# -- the script ------------------------------------------------------------------------------------


def words(out: Path, *more: str) -> list[str]:
    return [sys.executable, proof.__file__, "--out", str(out), "--device", "cpu", *more]


@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked to end"])
def test_ended_in_the_middle_of_a_part_it_loses_that_part_alone(
    asked: bool, tmp_path: Path
) -> None:
    """The real script: cut off, then started again with the same words."""
    chosen = words(tmp_path, "--only", "experiment", "environment")
    running = subprocess.Popen(
        chosen, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        until = time.monotonic() + 120
        while not _measured(tmp_path) and time.monotonic() < until:
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            time.sleep(0.02)
        if asked:  # it ends its parts, which are in sessions of their own, as above
            running.terminate()
            assert running.wait(60) == 128 + signal.SIGTERM
        cut_off = ends_of(tmp_path)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert cut_off == {}
    done = subprocess.run(chosen, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # In the proof's order, whatever that of the words is.
    assert ends_of(tmp_path) == {"environment": "passed", "experiment": "skipped"}
    begun = [line["part"] for line in lines_of(tmp_path) if "begun" in line]
    assert begun == ["environment", "environment", "experiment"]
    shown = (tmp_path / "table.md").read_text()
    assert "no job was given" in shown
    assert "long bf16 products, relative error" in shown
    assert shown.count("| environment | torch ") == 1


def _measured(folder: Path) -> bool:
    path = folder / "results.jsonl"
    return path.exists() and '"measure"' in path.read_text()


@pytest.mark.parametrize("num_parts", [2, 8, 64])
def test_long_sums_of_parts_in_bf16_are_told_from_those_in_fp32(num_parts: int) -> None:
    def rounded_parts(left: Tensor, right: Tensor) -> Tensor:
        ones, others = (torch.stack(each.double().chunk(num_parts, 1)) for each in (left, right))
        return (ones @ others.mT).bfloat16().double().sum(0).bfloat16()

    assert environment.long_sums_error(rounded_parts) > environment.BF16_SUM


def test_long_sums_that_a_card_cuts_off_are_allowed() -> None:
    def cut_off(left: Tensor, right: Tensor) -> Tensor:
        sums = torch.zeros(64, 64, dtype=torch.float64)
        pairs = zip(left.double().split(16, 1), right.double().split(16, 1), strict=True)
        for one, other in pairs:
            digits, exponents = torch.frexp(sums + one @ other.T)
            sums = torch.ldexp(torch.floor(digits * 2**24) / 2**24, exponents)
        return sums.bfloat16()

    assert 2**-8 < environment.long_sums_error(cut_off) <= environment.BF16_SUM


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, proof.__file__, "--out", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_part_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    for each in proof.PARTS:
        measure: Callable[..., Any] = importlib.import_module(f"gpu.parts.{each.name}").measure
        assert callable(measure)


SAID = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"  # noqa: E501 - torch's words


@pytest.mark.parametrize(
    ("said", "status"), [(SAID, 0), ("called a synchronizing CUDA operation", 1)]
)
def test_what_torch_says_of_counting_waits_is_no_wait(said: str, status: int) -> None:
    """The step of tests/gpu/test_syncs.py on the CPU, with a stand-in for what torch says."""
    stand_in = f"""
import warnings
import torch
torch.cuda.set_sync_debug_mode = lambda mode: mode == "warn" and warnings.warn({said!r})
"""
    script = stand_in + test_syncs.STEP.replace('"cuda"', '"cpu"')
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in own}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.count("\n") == status


def test_no_part_at_a_time_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        words(tmp_path / "out", "--jobs", "0"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--jobs: got 0, expected how many parts run at once, 1 or more" in done.stderr
    assert not (tmp_path / "out").exists()
