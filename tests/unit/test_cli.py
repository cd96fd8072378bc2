"""Words in, an exit status out; what went wrong is told once, on stderr, by rank 0."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import babyllama_ds
from babyllama_ds import cli
from babyllama_ds.errors import (
    DataError,
    JobError,
    MeetingError,
    NoRoomError,
    Problem,
    RunError,
    Stopped,
)
from babyllama_ds.ranks import RemoteError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


TOO_LONG = 300 * "x"


# -- how it ends -----------------------------------------------------------------------------------

TWO_PROBLEMS = RunError(
    Problem(where="a", got="1", expected="2"), Problem(where="b", got="3", expected="4", hint="h")
)
ENDS: list[tuple[BaseException, int, str]] = [
    (JobError.of("seed", got=-1, expected=">= 0"), 2, "error: seed: got -1, expected >= 0\n"),
    (
        DataError.of("x", got=1, expected=2, hint="do"),
        2,
        "error: x: got 1, expected 2\n    hint: do\n",
    ),
    (TWO_PROBLEMS, 2, "error: a: got 1, expected 2\nb: got 3, expected 4\n    hint: h\n"),
    (Stopped("SIGTERM"), 143, "stopped (SIGTERM); the same command goes on from here\n"),
    (
        Stopped("SIGINT", 130, at="student, step 7"),
        130,
        "stopped (SIGINT, at student, step 7); the same command goes on from here\n",
    ),
]


@pytest.mark.parametrize(("error", "code", "text"), ENDS)
def test_an_expected_end_is_told_once(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.exit_code_of(raising(error)) == code
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize(("error", "code", "text"), ENDS)
def test_the_other_ranks_end_alike_and_silently(
    error: BaseException,
    code: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.exit_code_of(raising(error)) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("local_rank", "told"), [("0", True), ("1", False)])
def test_ranks_that_do_not_meet_are_heard_on_every_node(
    local_rank: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 may not be there to speak for them."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    error = MeetingError.of("port 1", got="nobody", expected="rank 0")
    assert cli.exit_code_of(raising(error)) == 2
    assert ("port 1: got nobody" in capsys.readouterr().err) == told


def test_a_rank_that_has_no_memory_left_speaks_for_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are at work, and know of nothing."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    error = NoRoomError.of("student.training.micro_batch", got="no memory left", expected="some")
    assert cli.exit_code_of(raising(error)) == 2
    assert "micro_batch: got no memory left" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_our_own_mistake_has_its_trace_from_where_it_happened(
    rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert cli.exit_code_of(raising(ZeroDivisionError("oops"))) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "ZeroDivisionError: oops" in told


@pytest.mark.parametrize(
    "words",
    [
        ["check", TOO_LONG],
        ["check", f"{TOO_LONG}/job.yaml"],
        ["plan", "nursery", f"deepspeed.config={TOO_LONG}"],
        ["plan", "nursery", f"student.model={{kind: pretrained, path: {TOO_LONG}}}"],
        ["export", TOO_LONG, "--to", "x"],
        ["export", TOO_LONG, "--results", "x"],
        ["store", "--runs", TOO_LONG],
        ["evaluate", TOO_LONG, "--text", "x"],
        ["generate", TOO_LONG, "a prompt"],
        ["gains", TOO_LONG],
    ],
    ids=lambda words: words[0],
)
def test_a_path_that_the_system_refuses_is_told_as_one(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As one in another's folder is, which tests that run as root do not see refused."""
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert TOO_LONG in told
    assert "file name too long, expected" in told.lower()


def test_a_mistake_on_another_rank_has_no_second_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code_of(raising(RemoteError(1, "ZeroDivisionError", "oops"))) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EACCES, "`namei -l PATH` shows where the right to it is lacking"),
        (errno.EPERM, "`namei -l PATH` shows where the right to it is lacking"),
        (errno.EROFS, "choose a place that can be written to"),
        (errno.ENAMETOOLONG, "is a word missing before it?"),
    ],
)
def test_a_path_that_the_system_refuses_is_told_in_words(
    number: int, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.exit_code_of(raising(OSError(number, os.strerror(number), "/some/path"))) == 2
    assert capsys.readouterr().err == (
        f"error: /some/path: got {os.strerror(number)}, expected a path that this user may use\n"
        f"    hint: {hint}\n"
    )


def test_other_failures_of_the_system_have_their_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code_of(raising(OSError(errno.EIO, "Input/output error", "/some/path"))) == 1
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(("rank", "told"), [("0", "stopped (SIGINT)\n"), ("1", "")])
def test_an_interrupt_is_an_end_without_a_trace(
    rank: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert cli.exit_code_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize("words", ["schema", "check nursery"])
def test_whoever_reads_may_go(words: str) -> None:
    """`babyllama-ds schema | head -n 1`"""
    command = f'"{sys.executable}" -m babyllama_ds.cli {words} | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_done_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code_of(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


# -- check -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["check", "nursery", "seed=7", "student.training.epochs=2"],
        ["check", "nursery", "--runs", "there", "seed=7", "student.training.epochs=2"],
        ["check", "nursery", "seed=7", "--runs", "there", "student.training.epochs=2"],
        ["check", "--runs", "there", "nursery", "seed=7", "student.training.epochs=2"],
        ["check", "--runs=there", "nursery", "student.training.epochs=2", "seed=7"],
    ],
    ids=" ".join,
)
def test_overrides_stand_anywhere_among_the_options(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    resolved = yaml.safe_load(out)
    assert resolved["seed"] == 7
    assert resolved["student"]["training"]["epochs"] == 2
    assert resolved["student"]["training"]["betas"] == [0.9, 0.999]  # a default, spelled out
    assert err == ""


def test_the_later_override_wins(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "nursery", "seed=7", "--runs", "there", "seed=8"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 8


def test_only_rank_zero_prints_the_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["check", "nursery"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "no-such-job"], "no-such-job: got no such file"),
        (["check", "nursery", "seed=x"], "command line: seed=x: seed: got 'x'"),
        (["check", "nursery", "sead=1"], "did you mean `seed`?"),
        (["check", "nursery", "word"], "expected KEY=VALUE"),
        (["check", "nursery", "--runs", "there", "word"], "expected KEY=VALUE"),
        (["run", "nursery", "sead=1"], "did you mean `seed`?"),
        (["report", "no/such/run"], "no/such/run"),
        (["plan", "nursery", "sead=1"], "did you mean `seed`?"),
        (["plan", "nursery", "--gpu", "V1000"], "--gpu: got 'V1000', expected one of A10"),
        (["plan", "nursery", "--rate", "fast"], "--rate: got 'fast'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_can_mend_is_an_error_of_the_family(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "COMMAND"),
        (["chekc", "nursery"], "chekc"),
        (["check"], "required: JOB\n"),  # and nothing that may be left out
        (["check", "nursery", "--bogus"], "--bogus"),
        (["check", "nursery", "seed=1", "--bogus"], "--bogus"),
        (["check", "nursery", "--seed=1"], "--seed=1"),
        (["schema", "seed=1"], "seed=1"),
        (["schema", "word"], "word"),
        (["plan", "nursery", "--ranks", "1,0"], "--ranks"),
        (["plan", "nursery", "--tokens", "few"], "--tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_words_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chekc", "nursery"], "unknown COMMAND 'chekc'; did you mean `check`?"),
        (["exprot", "runs/nursery-1"], "unknown COMMAND 'exprot'; did you mean `export`?"),
        (["Run", "nursery"], "unknown COMMAND 'Run'; did you mean `run`?"),
        (["zzz"], "unknown COMMAND 'zzz'; there are: check, doctor, evaluate, "),
        (["run", "nursery", "--rnus", "there"], "--rnus; did you mean `--runs`?"),
        (["export", "r", "--privat3", "--to", "d"], "--privat3; did you mean `--private`?"),
        (["generate", "m", "p", "--temprature=1"], "--temprature=1; did you mean `--temperature`?"),
        (["plan", "nursery", "--rank=2", "--gup", "L4"], "did you mean `--gpu`?"),
        (["check", "nursery", "--seed=1"], "a field of the job has no dashes: seed=1"),
        (
            ["check", "nursery", "seed=1", "--student.training.epochs=2"],
            "unrecognized arguments: --student.training.epochs=2; a field of the job has no "
            "dashes: student.training.epochs=2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_misspelt_is_told_with_what_was_meant(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("generate m p --tokens 0", "--tokens: got '0', expected a whole number, 1 or more"),
        ("generate m p --number two", "--number: got 'two', expected a whole number, 1 or more"),
        ("generate m p --top-p 2", "--top-p: got '2', expected a number above 0, at most 1"),
        ("generate m p --temperature=-1", "got '-1', expected a number, 0 or more"),
        ("generate m p --temperature hot", "got 'hot', expected a number, 0 or more"),
        ("generate m p --seed -1", "--seed: got '-1', expected a whole number, 0 or more"),
        (f"generate m p --seed {1 << 63}", "expected a whole number below 2**63"),
        ("generate m \udcff", r"PROMPT: got '\udcff', expected text in UTF-8"),
        ("evaluate m --length 1", "--length: got '1', expected a whole number, 2 or more"),
        ("evaluate m --pairs blimp", "--pairs: got 'blimp', expected NAME=DIR, for instance"),
        ("plan nursery --ranks 2,x", "--ranks: got 'x', expected a whole number, 1 or more"),
        ("plan nursery --within inf", "--within: got 'inf', expected a number above 0"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_told_with_those_it_can(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_the_launchers_script_suggests_too(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "nursery", "--chekc", "seed=7"])
    with pytest.raises(SystemExit):
        script.main()
    assert "unrecognized arguments: --chekc; did you mean `--check`?" in capsys.readouterr().err


def test_version_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == babyllama_ds.__version__
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "student" in schema["properties"]
    assert cli.main(["schema", "--reference"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")


# -- run -------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    """What the pipeline was started with."""
    from babyllama_ds import console, pipeline

    calls: list[tuple[Any, Path]] = []
    monkeypatch.setattr(pipeline, "run_job", lambda job, *, runs: calls.append((job, runs)))
    # Logging is set up for a whole process, which this is not.
    monkeypatch.setattr(console, "configure_logging", lambda **_: None)
    return calls


def test_run_starts_the_pipeline_with_the_resolved_job(started: list[tuple[Any, Path]]) -> None:
    assert cli.main(["run", "nursery", "seed=7", "--runs", "there"]) == 0
    ((job, runs),) = started
    assert job.seed == 7
    assert runs == Path("there")
    assert cli.main(["run", "nursery"]) == 0
    assert started[1][1] == Path("runs")


def test_a_wrong_job_starts_nothing(started: list[tuple[Any, Path]]) -> None:
    assert cli.main(["run", "nursery", "seed=x"]) == 2
    assert started == []


@pytest.mark.parametrize(
    ("words", "lacking"),
    [
        (["job.yaml"], "job.yaml"),
        (["nursery", "deepspeed.device=cuda"], "0 CUDA devices for 2 ranks on host"),
        (["nursery", "deepspeed.device=cpu", "deepspeed.config=own.json"], "own.json"),
    ],
)
@pytest.mark.parametrize(("local_rank", "told"), [("0", True), ("1", False)])
def test_what_one_node_lacks_before_ranks_have_met_is_told_there(
    words: list[str],
    lacking: str,
    local_rank: str,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 0, on another node, has what these lack, and would wait for them without a word."""
    import torch

    from babyllama_ds import console

    monkeypatch.setattr(console, "configure_logging", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", *words, "--runs", "runs"]) == 2
    assert (lacking in capsys.readouterr().err) == told


# -- plan ------------------------------------------------------------------------------------------

LARGE = (
    "student.model={kind: llama, hidden_size: 8192, num_layers: 32, num_heads: 64, "
    "intermediate_size: 28672}"
)


def test_a_plan_is_printed_as_text_or_as_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["plan", "nursery", "--runs", str(tmp_path), "--gpu", "L4", "--ranks", "2,1", "seed=7"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("plan of nursery-7 on cuda, bf16, L4 (24 GiB)\n")
    assert err == ""
    assert cli.main([*words, "--json", "--rate", "20000", "--tokens", "65000"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["ranks"]) == ["1", "2"]
    assert data["corpus"]["train_tokens"] == 65_000
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_a_plan_that_is_told_the_tokens_needs_no_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BABYLM_DATA", raising=False)
    words = ["plan", "babylm_tiny", "--runs", str(tmp_path), "--ranks", "1"]
    assert cli.main([*words, "--tokens", "650000"]) == 0
    assert "650 k training tokens" in capsys.readouterr().out
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "${BABYLM_DATA}/train/*.train" in err
    assert "--tokens N" in err
    assert cli.main([*words, "--measure"]) == 2  # which reads it
    assert "corpus.train[0]: got ${BABYLM_DATA}, which is not set" in capsys.readouterr().err


def test_a_plan_that_cannot_fit_is_printed_and_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["plan", "nursery", LARGE, "--runs", str(tmp_path), "--gpu", "L4", "--ranks", "1"]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert "  NO\n" in out
    assert err.startswith("error: nursery-1 on 1 rank of L4: got peaks of student ")
    assert cli.main([*words[:-4], "--ranks", "1"]) == 0  # no card was named


# -- doctor ----------------------------------------------------------------------------------------


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the doctor was asked, and what it is to find: to be filled."""
    from babyllama_ds.doctor import examine

    asked: list[Any] = []

    def stand_in(
        runs: Path, device: str, *, compiled: bool, hostfile: Path | None, ssh_port: int | None
    ) -> list[Any]:
        findings = asked.pop()
        asked.append((runs, device, compiled, hostfile, ssh_port))
        return findings

    monkeypatch.setattr(examine, "examine", stand_in)
    return asked


def test_the_doctor_says_what_it_found_and_how_it_ends(
    examined: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from babyllama_ds.doctor.findings import failure, ok, warning

    well = [ok("host", "2 cores"), warning("disk", "2 GiB free", remedy="free some")]
    examined.append(well)
    assert cli.main(["doctor", "--device", "cpu", "--runs", "there"]) == 0
    assert examined == [(Path("there"), "cpu", False, None, None)]
    out, err = capsys.readouterr()
    assert "remedy: free some" in out
    assert "1 ok, 1 warning, 0 failures" in out
    assert err == "examining this machine ...\n"

    hosts = ["--hostfile", "file", "--ssh-port", "2222"]
    examined[:] = [[*well, failure("locks", "none", remedy="mount it with them")]]
    assert cli.main(["doctor", "--device", "cpu", "--compile", "--json", *hosts]) == 2
    assert examined == [(Path("runs"), "cpu", True, Path("file"), 2222)]
    out, err = capsys.readouterr()
    assert json.loads(out)["counts"]["failure"] == 1
    assert "error: doctor: got 1 failure: locks, expected none" in err


def test_a_port_for_no_hosts_is_refused(
    examined: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--device", "cpu", "--ssh-port", "2222"]) == 2
    assert "doctor --ssh-port: got no --hostfile, expected" in capsys.readouterr().err


def test_the_doctor_in_a_hurry(
    monkeypatch: pytest.MonkeyPatch, examined: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from babyllama_ds.doctor import examine
    from babyllama_ds.doctor.findings import ok

    monkeypatch.setattr(examine, "glance", lambda runs, device: [ok("host", f"{runs} {device}")])
    assert cli.main(["doctor", "--quick", "--device", "cpu", "--runs", "there"]) == 0
    assert examined == []
    assert "there cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--quick", "--compile"])
    assert "not allowed with argument" in capsys.readouterr().err
    assert cli.main(["doctor", "--quick", "--hostfile", "hosts"]) == 2
    assert "got --hostfile beside it, expected one of the two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--quik"])
    assert "did you mean `--quick`?" in capsys.readouterr().err


# -- the launcher's script -------------------------------------------------------------------------


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run", ROOT / "launcher" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_launchers_script_runs_a_job(
    script: ModuleType, started: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run.py", "--local_rank=1", "nursery", "--runs", "there", "seed=7"]
    monkeypatch.setattr(sys, "argv", words)
    assert script.main() == 0
    ((job, runs),) = started
    assert (job.seed, runs) == (7, Path("there"))


def test_the_launchers_script_checks_a_job(
    script: ModuleType,
    started: list[tuple[Any, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--local_rank=0", "nursery", "--check", "seed=7"])
    assert script.main() == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert started == []
    monkeypatch.setattr(sys, "argv", ["run.py", "nursery", "--check", "seed=x"])
    assert script.main() == 2


COMMAND_LINE = "import sys; from babyllama_ds.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    "words",
    [["launcher/run.py", "--check"], ["-c", COMMAND_LINE, "check"]],
    ids=["launcher", "command line"],
)
def test_the_exit_status_is_the_processs(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *words, "nursery", "seed=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: command line: seed=x")


def test_as_a_module_it_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "babyllama_ds.cli", "check", "nursary"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean `nursery`" in done.stderr
