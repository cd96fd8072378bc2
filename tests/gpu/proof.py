"""`make gpu-proof`: what this project says of itself, tried on a real GPU; numbers leave.

    python tests/gpu/proof.py --out DIR [--only PART …] [--seconds N] [--jobs N] [--device cpu]

Parts run in order, each in a process of its own, so that a kernel that takes the card's context
with it takes no other part along. With `--jobs` several share the card, those aside whose numbers
are rates: most of a part's time is starting and compiling. A measure is written as soon as it is
there, a part's end before the next one begins; `DIR/table.md` is whole after every part. Started
again with the same folder, parts that have ended are passed over, failed ones too (`--only PART`
runs one again); one that was cut off, by `--seconds` say, or interrupted (SIGINT, SIGTERM), begins
anew, and the experiment goes on where it was.

    DIR/results.jsonl   a line for the machine, and one for each beginning, measure and end
    DIR/table.md        the same, for people
    DIR/log.txt         all that the parts wrote
    DIR/bench/          the bench's own files

`--device cpu` is the rehearsal, at small sizes: it shows that every part runs, and no more.

The exit code is 0 if every part that has ended has passed, 1 if not, 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from babyllama_ds import files  # noqa: E402 - found by the line above
from babyllama_ds.report.formatting import table  # noqa: E402

LEAST_S = 10.0
"""A part is not begun with less time than this."""
GRACE_S = 5.0
UNTIL, OUT = "GPU_PROOF_UNTIL", "GPU_PROOF_OUT"
"""Variables that tell a part's process when it is ended, in seconds since the epoch, and in which
folder what it brings along stays."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to prove."""

    name: str
    budget_s: float
    """It is ended after so long, and what it has measured stands."""
    alone: bool = False
    """Whether the machine is to do nothing else meanwhile: a rate is measured."""
    command: Callable[[str], Sequence[str]] | None = None
    """What is started, for a device; none: the module `gpu.parts.NAME`."""
    goes_on: bool = False
    """Whether one that did not come to its end goes on where it was: it has not ended then."""

    def words(self, device: str) -> Sequence[str]:
        """The command line of the part's process."""
        if self.command is not None:
            return self.command(device)
        return [sys.executable, str(Path(__file__)), "--part", self.name, "--device", device]


PARTS = (
    Part(name="environment", budget_s=60, alone=True),
    Part(name="doctor", budget_s=420),
    Part(name="losses", budget_s=180),
    Part(name="modules", budget_s=120),
    Part(name="tests", budget_s=300),
    Part(name="attention", budget_s=240),
    Part(name="compiled", budget_s=300),
    Part(name="zero2", budget_s=120),
    Part(name="teachers", budget_s=180),
    Part(name="resume", budget_s=300),
    Part(name="cache", budget_s=300),
    Part(name="memory", budget_s=420),
    Part(name="bench", budget_s=590, alone=True),
    Part(name="experiment", budget_s=590, alone=True, goes_on=True),
)


# -- the record ------------------------------------------------------------------------------------


class Record:
    """What is known so far, in a folder: lines are added and never changed."""

    def __init__(self, folder: Path, facts: dict[str, str]) -> None:
        """Raises SystemExit (2): the folder holds the proof of another machine or commit."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "results.jsonl"
        self._lock = threading.Lock()  # parts may run at the same time
        self.lines = _whole_lines(self._path)
        if not self.lines:
            self.add({"machine": facts})
        elif self.lines[0]["machine"] != facts:
            print(
                f"{self._path}: a proof of {self.lines[0]['machine']}, and this is {facts}: "
                "give another folder (--out)",
                file=sys.stderr,
            )
            raise SystemExit(2)

    def add(self, line: dict[str, Any]) -> None:
        """One line more, on the disk when this returns."""
        with self._lock, self._path.open("a", encoding="utf-8") as stream:
            self.lines.append(line)
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def ended(self, part: str) -> str | None:
        """How a part ended the last time that it was begun; none: it did not."""
        return next((line["ended"] for line in reversed(self._of(part)) if "ended" in line), None)

    def measures(self, part: str) -> list[dict[str, Any]]:
        """Those of the last time that a part was begun."""
        return [line["measure"] for line in self._of(part) if "measure" in line]

    def why(self, part: str) -> str:
        """What was said at its end."""
        return next((line["why"] for line in reversed(self._of(part)) if "why" in line), "")

    def cut_off(self, part: str) -> str:
        """Why the last start of a part that goes on did not come to its end."""
        return next((line["cut_off"] for line in reversed(self._of(part)) if "cut_off" in line), "")

    def _of(self, part: str) -> list[dict[str, Any]]:
        with self._lock:
            mine = [line for line in self.lines if line.get("part") == part]
        begun = [number for number, line in enumerate(mine) if "begun" in line]
        return mine[begun[-1] :] if begun else []


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; half a one, which a cut-off may have left, is taken out of it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        files.write_atomic(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


def write_table(record: Record, parts: Iterable[Part]) -> None:
    """`table.md`, whole or as it was."""
    rows, summary = [], []
    for part in parts:
        measures, ended = record.measures(part.name), record.ended(part.name)
        wrong = sum(not measure["passed"] for measure in measures)
        begun = measures or record.cut_off(part.name)
        told = ended or ("cut off" if begun else "not begun")
        why = record.why(part.name) or record.cut_off(part.name)
        summary.append([part.name, told, str(len(measures)), str(wrong), why])
        for each in measures:
            verdict = ("ok" if each["passed"] else "**WRONG**") if each["allowed"] else ""
            rows.append([part.name, each["check"], each["found"], each["allowed"], verdict])
    machine = ", ".join(f"{key} {value}" for key, value in record.lines[0]["machine"].items())
    text = "\n\n".join(
        [
            "# Proof on one machine",
            machine,
            table(["part", "ended", "measures", "wrong", ""], summary, left=2),
            table(["part", "check", "found", "allowed", ""], rows, left=5),
        ]
    )
    files.write_atomic(record.folder / "table.md", text + "\n")


# -- running ---------------------------------------------------------------------------------------


def prove(
    parts: Sequence[Part],
    record: Record,
    *,
    device: str,
    again: Sequence[str] = (),
    seconds: float | None = None,
    jobs: int = 1,
) -> int:
    """Run the parts that have not ended, and those of `again`, so many at once; the exit code."""
    deadline = None if seconds is None else time.monotonic() + seconds
    shown = PARTS if set(parts) <= set(PARTS) else parts
    shows, live = threading.Lock(), _Live()

    def run(part: Part) -> None:
        left = math.inf if deadline is None else deadline - time.monotonic()
        if left < LEAST_S:
            print(f"{part.name}: no time left; start again to go on", flush=True)
            return
        run_part(part, record, device=device, budget_s=min(part.budget_s, left), live=live)
        with shows:
            write_table(record, shown)

    waiting = []
    for part in parts:
        if part.name not in again and (ended := record.ended(part.name)) is not None:
            print(f"{part.name}: done before ({ended})", flush=True)
        else:
            waiting.append(part)
    for alone, together in itertools.groupby(waiting, lambda part: part.alone):
        with ThreadPoolExecutor(1 if alone else jobs) as pool, live:
            live.wait([pool.submit(run, part) for part in together])
    write_table(record, shown)
    ends = [record.ended(part.name) for part in parts]
    return int(any(end not in ("passed", "skipped", None) for end in ends))


class _Live:
    """The processes of the parts that are running; whatever interrupts us ends them all."""

    def __init__(self) -> None:
        self.interrupted = False
        """Whether parts end because we do: nothing is known of them then."""
        self._processes = set[subprocess.Popen[bytes]]()
        self._waiting: Sequence[Future[None]] = ()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        self._processes.add(process)

    def wait(self, futures: Sequence[Future[None]]) -> None:
        """Until all have ended; raises what one of them has raised."""
        self._waiting = futures
        for future in futures:
            future.result()

    def __enter__(self) -> None:
        self._processes.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.interrupted = True
            for future in self._waiting:
                future.cancel()
            for process in tuple(self._processes):
                _end(process)


def run_part(part: Part, record: Record, *, device: str, budget_s: float, live: _Live) -> None:
    """One part in a process of its own, to its end or its time's; whatever it does, we go on."""
    print(f"\n== {part.name} (at most {budget_s:.0f} s)", flush=True)
    record.add({"part": part.name, "begun": datetime.now(UTC).isoformat(timespec="seconds")})
    started, over_time, skipped = time.monotonic(), False, list[str]()
    with (record.folder / "log.txt").open("ab") as log:
        log.write(f"\n== {part.name}\n".encode())
        process = subprocess.Popen(
            part.words(device),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=TESTS.parent,
            env={
                **os.environ,
                UNTIL: f"{time.time() + budget_s:.3f}",
                OUT: str(record.folder.resolve()),
            },
            start_new_session=True,  # whatever it starts is ended with it
        )
        live.add(process)
        assert process.stdout is not None, "asked for"
        last = _Last()
        reader = threading.Thread(
            target=_read, args=(process.stdout, log, part, record, skipped, last), daemon=True
        )
        reader.start()
        try:
            process.wait(budget_s)
        except subprocess.TimeoutExpired:
            over_time = True
        finally:
            _end(process)
        reader.join(GRACE_S)
    if live.interrupted:
        return
    wrong = [measure for measure in record.measures(part.name) if not measure["passed"]]
    seconds = round(time.monotonic() - started, 1)
    # With time of its own left it would have come further: nothing is known of its end.
    by_us = over_time and budget_s < part.budget_s
    if by_us or (part.goes_on and (over_time or last.unfinished)):
        why = last.unfinished or f"ended after {budget_s:.0f} s"
        record.add({"part": part.name, "cut_off": why, "seconds": seconds})
        print(f"== {part.name}: cut off ({why}); start again to go on", flush=True)
        return
    if over_time:
        ended, why = "over time", f"ended after {budget_s:.0f} s"
    elif process.returncode != 0:
        ended, why = "broken", f"status {process.returncode}: {last.line}"
    elif skipped:
        ended, why = "skipped", skipped[0]
    else:
        ended, why = ("failed", f"{len(wrong)} wrong") if wrong else ("passed", "")
    record.add({"part": part.name, "ended": ended, "seconds": seconds, "why": why})
    print(f"== {part.name}: {ended} after {seconds:.0f} s {why}", flush=True)


@dataclass
class _Last:
    """The last line that was no measure: what a part that breaks says of it."""

    line: str = "without a word"
    unfinished: str = ""
    """Why the part says of itself that it is to be gone on with."""


def _read(
    stream: IO[bytes], log: IO[bytes], part: Part, record: Record, skipped: list[str], last: _Last
) -> None:
    for raw in stream:
        log.write(f"{part.name}: ".encode() + raw)
        log.flush()
        line = raw.decode(errors="replace").strip()
        message = _message(line)
        if message is None:
            last.line = line or last.line
        elif "skipped" in message:
            skipped.append(message["skipped"])
        elif "unfinished" in message:
            last.unfinished = message["unfinished"]
        else:
            record.add({"part": part.name, **message})
            measure = message["measure"]
            sign = "ok   " if measure["passed"] else "WRONG"
            allowed = f"   ({measure['allowed']})" if measure["allowed"] else ""
            shown = f"{part.name}: {measure['check']}: {measure['found']}{allowed}"
            print(sign if allowed else "     ", shown, flush=True)


def _message(line: str) -> dict[str, Any] | None:
    if not line.startswith(('{"measure"', '{"skipped"', '{"unfinished"')):
        return None
    try:
        message: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return message


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it has started, in whatever session (ranks have their own)."""
    below = _descendants(process.pid) if process.poll() is None else []
    process.kill()  # does nothing to one that has ended
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Live processes below a live one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # just gone
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, ahead = list[int](), [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


# -- one part, in its process ----------------------------------------------------------------------


def run_here(name: str, device: str, *, job: Sequence[str]) -> None:
    """Measure, and print each measure as soon as it is there."""
    import torch

    if name == "experiment" and not job:
        print(json.dumps({"skipped": "no job was given (--job JOB KEY=VALUE …)"}), flush=True)
        return
    place = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    module = importlib.import_module(f"gpu.parts.{name}")
    extra = {"job": job} if name == "experiment" else {}
    for measure in module.measure(place, small=device == "cpu", **extra):
        print(measure.as_line(), flush=True)


def machine(device: str) -> dict[str, str]:
    """What a proof is of. Raises SystemExit (2): there is no such device."""
    import torch

    from babyllama_ds.environment import describe_environment

    if device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device: `babyllama-ds doctor` may say why; --device cpu rehearses",
            file=sys.stderr,
        )
        raise SystemExit(2)
    found = describe_environment(torch.device(device))
    return {
        "device": str(found["hardware"]["cuda_device"] or found["hardware"]["host_cpu"]),
        "torch": str(found["versions"]["torch"]),
        "commit": str(found["commit"]),
    }


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """What the module's docstring says."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description="Prove this project on a GPU, part by part.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-proof"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, help="begin no part that would not end by then")
    parser.add_argument(
        "--jobs", type=int, default=1, help="parts that share the card (default: 1)"
    )
    parser.add_argument(
        "--job", nargs="+", default=[], metavar="WORD", help="the experiment: JOB KEY=VALUE …"
    )
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.jobs < 1:
        parser.error(f"--jobs: got {words.jobs}, expected how many parts run at once, 1 or more")
    job = words.job or shlex.split(os.environ.get("GPU_PROOF_JOB", ""))
    if words.part is not None:
        run_here(words.part, words.device, job=job)
        return 0
    os.environ["GPU_PROOF_JOB"] = shlex.join(job)  # for the part's process
    record = Record(words.out, machine(words.device))
    # Asked to end we end what we have started: it is in sessions of its own, and would run on.
    signal.signal(signal.SIGTERM, _leave)
    chosen = [part for part in PARTS if words.only is None or part.name in words.only]
    code = prove(
        chosen,
        record,
        device=words.device,
        again=words.only or (),
        seconds=words.seconds,
        jobs=words.jobs,
    )
    print(f"\n{words.out / 'table.md'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
