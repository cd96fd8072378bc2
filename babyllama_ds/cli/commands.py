"""What each command does: its options enter, lines for people or JSON leave.

Commands import what they need when they run, so that `check` answers at once and needs neither
torch nor a device.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from babyllama_ds.errors import DataError, JobError, MachineError, Problem, told_by_each_node
from babyllama_ds.slurm import describe_task
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.resolved import dump_job
from babyllama_ds.spec.shipped import find_job

if TYPE_CHECKING:
    from babyllama_ds.spec.evaluation import FineTuning
    from babyllama_ds.spec.job import JobSpec
    from babyllama_ds.training.pace import JobPace

_BEGAN_S = time.monotonic()
"""When this process was about to import what takes seconds."""
TRIAL_S = 60
"""Seconds of steps that `plan --measure` takes."""


def check(job: str, overrides: Sequence[str]) -> None:
    """Validate a job and print it with every default spelled out; on rank 0 only."""
    describe_task()
    resolved = load_job(find_job(job), overrides)
    if is_lead():
        print(dump_job(resolved), end="")


def run(job: str, overrides: Sequence[str], *, runs: Path) -> None:
    """Run a job on the ranks that the launcher or srun started (one, without them)."""
    describe_task()
    with told_by_each_node():
        resolved = load_job(find_job(job), overrides)
    from babyllama_ds.console import configure_logging
    from babyllama_ds.pipeline import run_job

    configure_logging(rank=int(os.environ.get("RANK", "0")))
    run_job(resolved, runs=runs)


def plan(job: str, overrides: Sequence[str], options: argparse.Namespace) -> None:
    """Print what a job will cost; a job that fits nowhere it was planned for is an error."""
    environment = os.environ if options.measure else _AsWritten()

    def load(more: Sequence[str] = ()) -> JobSpec:
        return load_job(find_job(job), [*overrides, *more], environment)

    resolved = load()
    from babyllama_ds.plan.measured import check_within
    from babyllama_ds.plan.planned import Question
    from babyllama_ds.plan.planner import plan_job
    from babyllama_ds.plan.rates import read_rate
    from babyllama_ds.plan.remedies import check_fits
    from babyllama_ds.plan.text import render_json, render_plan

    _check_measuring(options)
    question = Question(
        ranks=options.ranks or ((1,) if options.measure else (1, 2, 4, 8)),
        gpu="here" if options.measure else options.gpu,
        rate=None if options.rate is None else read_rate(options.rate),
        tokens=options.tokens,
        runs=options.runs,
    )
    began_s = time.monotonic() - _BEGAN_S
    planned = plan_job(resolved, question)
    if options.measure:
        check_fits(planned, load)
        pace = _tried(resolved, options, began_s)
        planned = plan_job(resolved, replace(question, pace=pace))
    print(render_json(planned) if options.json else render_plan(planned), end="", flush=True)
    check_fits(planned, load)
    if options.within is not None and planned.measured is not None:
        check_within(planned.measured, options.within, name=resolved.run_name)


class _AsWritten(Mapping[str, str]):
    """The environment, in which a variable that is not set stands for itself.

    A plan that is told the number of tokens reads no text: it needs not know where it would lie.
    """

    def __getitem__(self, name: str) -> str:
        return os.environ.get(name) or f"${{{name}}}"

    def __iter__(self) -> Iterator[str]:
        return iter(os.environ)

    def __len__(self) -> int:
        return len(os.environ)


def _check_measuring(options: argparse.Namespace) -> None:
    """What goes with --measure, and what does not."""
    needs = {"--seconds": options.seconds, "--within": options.within}
    if not options.measure:
        missing = [name for name, value in needs.items() if value is not None]
        problems = [
            Problem(where=name, got="no --measure", expected="--measure beside it")
            for name in missing
        ]
    else:
        instead = "the rates, tokens and memory of this machine are measured"
        given = {"--rate": options.rate, "--tokens": options.tokens}
        given["--gpu"] = options.gpu if options.gpu != "here" else None
        problems = [
            Problem(
                where=name,
                got=f"{value} beside --measure",
                expected="one of them",
                hint=f"leave out {name}: {instead}",
            )
            for name, value in given.items()
            if value is not None
        ]
        if options.ranks not in (None, (1,)):
            problems.append(
                Problem(
                    where="--ranks",
                    got=f"{','.join(map(str, options.ranks))} beside --measure",
                    expected="1: one rank is measured",
                    hint="give --rate with what was measured, to plan for several",
                )
            )
    if problems:
        raise JobError.all_of(problems)


def _tried(job: JobSpec, options: argparse.Namespace, began_s: float) -> JobPace:
    """The job's pace here; `began_s`: what this process took before it planned."""
    importing_s = time.monotonic()
    from babyllama_ds.console import configure_logging
    from babyllama_ds.pipeline.trial import try_job

    began_s += time.monotonic() - importing_s
    configure_logging(rank=0)
    seconds = options.seconds or TRIAL_S
    return try_job(job, runs=options.runs, seconds=seconds, began_s=began_s)


def doctor(options: argparse.Namespace) -> None:
    """Examine this machine and print what was found; a failed check is an error."""
    from babyllama_ds.doctor.examine import examine, glance
    from babyllama_ds.doctor.findings import refuse_failures
    from babyllama_ds.doctor.table import as_json, as_table
    from babyllama_ds.engine.distributed import resolve_device

    print("examining this machine ...", file=sys.stderr)
    start_s = time.monotonic()
    device = resolve_device(options.device)
    if options.ssh_port is not None and options.hostfile is None:
        raise MachineError.of(
            "doctor --ssh-port",
            got="no --hostfile",
            expected="--hostfile beside it",
            hint="it is for the hosts that a hostfile names",
        )
    if options.quick:
        if options.hostfile is not None:
            raise MachineError.of(
                "doctor --quick",
                got="--hostfile beside it",
                expected="one of the two",
                hint="leave out --quick: looking at hosts takes starting something on them",
            )
        findings = glance(options.runs, device)
    else:
        findings = examine(
            options.runs,
            device,
            compiled=options.compile,
            hostfile=options.hostfile,
            ssh_port=options.ssh_port,
        )
    show = as_json if options.json else as_table
    print(show(findings, seconds=time.monotonic() - start_s), end="")
    refuse_failures(findings)


def report(run_dir: Path) -> None:
    """Write a run's report anew and say where it is."""
    from babyllama_ds.report.write import write_report

    write_report(run_dir)
    for name in ("report.html", "report.md"):
        print(run_dir / "report" / name)


def gains(run_dirs: Sequence[Path]) -> None:
    """Print the gains of several runs."""
    from babyllama_ds.report.gains import render_gains

    print(render_gains(run_dirs), end="")


def generate(options: argparse.Namespace) -> None:
    """Print prompts and how a model goes on from them."""
    import torch

    from babyllama_ds.engine.distributed import resolve_device
    from babyllama_ds.engine.quirks import quiet_known_noise
    from babyllama_ds.evaluation.generate import Sampling
    from babyllama_ds.evaluation.generate import generate as texts_of

    quiet_known_noise()
    sampling = Sampling(
        tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        number=options.number,
        seed=options.seed,
    )
    device = torch.device(resolve_device(options.device))
    between = ""
    for text in texts_of(options.model, options.prompts, sampling, device=device):
        print(between + text, flush=True)
        between = "\n"  # texts have lines of their own: an empty one tells them apart


def export(options: argparse.Namespace) -> None:
    """Export a model or a run and say where it is."""
    from babyllama_ds.export.command import Export, export_run

    for place in export_run(
        Export(
            run_dir=options.run_dir,
            model=options.model,
            to=options.to,
            push=options.push,
            private=options.private,
            replace=options.replace,
            milestones=options.milestones,
            float32=options.float32,
            license_id=options.license,
            language=options.language,
            bundle=options.bundle,
            results=options.results,
        )
    ):
        print(place, flush=True)


def store(options: argparse.Namespace) -> None:
    """Print what lies in the store of a runs folder, or remove some of it and say so."""
    from babyllama_ds.inventory.entries import find_items, open_store
    from babyllama_ds.inventory.removing import named_items, remove
    from babyllama_ds.inventory.text import render_freed, render_items, render_removed
    from babyllama_ds.inventory.uses import read_uses

    opened = open_store(options.runs)
    items, uses = find_items(opened), read_uses(options.runs)
    if options.remove:
        doomed = named_items(items, uses, options.remove)
    elif options.remove_unused:
        doomed = [item for item in items if uses.unused(item)]
    else:
        print(render_items(items, uses, options.runs), end="")
        return
    for item in remove(opened, options.runs, doomed):
        print(render_removed(item), flush=True)
    print(render_freed(doomed), end="")


def evaluate(options: argparse.Namespace) -> None:
    """Measure a model and print what came out."""
    import json

    import torch

    from babyllama_ds.console import BatchBar, configure_logging
    from babyllama_ds.engine.distributed import resolve_device
    from babyllama_ds.engine.quirks import quiet_known_noise
    from babyllama_ds.evaluation.measure import Wanted, measure
    from babyllama_ds.report.measured import render_measured
    from babyllama_ds.store import Store

    configure_logging(rank=0)
    quiet_known_noise()
    wanted = Wanted(
        texts=tuple(options.text),
        benchmarks=_by_name(options.pairs, "--pairs"),
        suites=_suites(options),
        length=options.length,
        cleaning=options.cleaning,
        leading_space=options.leading_space,
        prefix=options.prefix,
        batch_tokens=options.batch_tokens,
    )
    device = torch.device(resolve_device(options.device))
    store = None if options.runs is None else Store(options.runs / "store")
    with BatchBar() as tell:
        result = measure(options.model, wanted, device=device, store=store, on_batch=tell)
    print(json.dumps(result, indent=2) + "\n" if options.json else render_measured(result), end="")


def _by_name(folders: Sequence[tuple[str, Path]], option: str) -> dict[str, Path]:
    names = [name for name, _ in folders]
    for name in names:
        if names.count(name) > 1:
            raise DataError.of(option, got=f"two called {name}", expected="a name for each")
    return dict(folders)


def _suites(options: argparse.Namespace) -> tuple[FineTuning, ...]:
    from babyllama_ds.spec.evaluation import FineTunedTask, FineTuning

    if options.tasks is not None and len(options.fine_tune) != 1:
        raise DataError.of(
            "--tasks",
            got=f"{len(options.fine_tune)} directories by --fine-tune",
            expected="one, whose tasks they are",
        )
    tasks = options.tasks and tuple(
        FineTunedTask(name=name) for name in dict.fromkeys(options.tasks)
    )
    return tuple(
        FineTuning(
            name=name,
            path=str(folder),
            tasks=tasks,
            seeds=options.seeds,
            max_tokens=options.max_tokens,
        )
        for name, folder in _by_name(options.fine_tune, "--fine-tune").items()
    )


def schema(*, in_words: bool) -> None:
    """Print the JSON schema of jobs; with `in_words`, the same as a document."""
    import json

    from babyllama_ds.spec.reference import job_reference
    from babyllama_ds.spec.schema import job_schema

    schema = job_schema()
    print(job_reference(schema) if in_words else json.dumps(schema, indent=2))


def is_lead() -> bool:
    """Whether this rank speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def is_first_of_node() -> bool:
    """Whether this rank speaks for those of its machine, where rank 0 may not be heard."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
