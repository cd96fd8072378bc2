"""Gains over several runs: run directories enter, a table of means and standard errors leaves.

One run has one seed, and a difference of one run says little; this is what is quoted.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama_ds import files
from babyllama_ds.errors import DataError, Problem
from babyllama_ds.report.fine_tuning import BEST_EPOCH, TASK_FACTS
from babyllama_ds.report.formatting import number, percent
from babyllama_ds.rundir import differing_keys, with_defaults

_SEEDS = re.compile(r"name|(.*\.)?seed")
"""Keys in which the runs of one experiment may differ."""

HOW_MEASURED = ("max_pairs_per_task", "dev_windows", "leading_space", "prefix")
"""Of `evaluation`, how finished models are measured, and milestones but for limits of their own."""

Measured = Mapping[str, Any]
"""A model or a milestone, as a report has it."""


@dataclass(frozen=True)
class Gain:
    """Student minus another model, over runs."""

    other: str
    measure: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return statistics.fmean(self.values)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; none for a single run."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) / math.sqrt(len(self.values))


def render_gains(run_dirs: Sequence[Path]) -> str:
    """Two Markdown tables: every run's models, and the student's mean gains; and what the runs
    differ in beside their seeds, where they do.

    Raises:
        DataError: a run directory without a report, or of a run with models that are not measured;
            two runs with the same student.
    """
    reports = [_read(run_dir) for run_dir in run_dirs]
    _check_measured(run_dirs, reports)
    _check_independent(run_dirs, reports)
    names = _names(run_dirs, reports)
    tables = [*_runs_table(names, reports), "", *_gains_table(collect_gains(reports))]
    notes = [
        *_suites(reports),
        *_milestones(reports),
        *_other_measurements(reports),
        *_other_jobs(reports),
    ]
    return "\n".join([*tables, *notes, ""])


def collect_gains(reports: Sequence[dict[str, Any]]) -> list[Gain]:
    """The student's gains over each model that all reports hold, by each measure that all hold."""
    shared = [set(report["models"]) for report in reports]
    others = [name for name in reports[0]["models"] if all(name in names for names in shared)]
    of_models = [report["models"] for report in reports]
    found: list[Gain] = []
    for other in others:
        if other != "student":
            found += _gains_over(other, [(each["student"], each[other]) for each in of_models])
            found += _gains_in_suites(other, reports)
    return [*found, *_gains_on_the_way(reports)]


def _gains_over(other: str, of_runs: Sequence[tuple[Measured, Measured]]) -> Iterator[Gain]:
    """Student and other of each run."""
    differences = tuple(student["dev_ce"] - than["dev_ce"] for student, than in of_runs)
    yield Gain(other, "dev CE (nats/token)", differences)
    pairs = [(student["minimal_pairs"], than["minimal_pairs"]) for student, than in of_runs]
    for benchmark in pairs[0][0]:
        if all(benchmark in student for student, _ in pairs):
            points = tuple(100 * (s[benchmark] - t[benchmark]) for s, t in pairs)
            yield Gain(other, f"{benchmark} (points)", points)


def _gains_on_the_way(reports: Sequence[dict[str, Any]]) -> Iterator[Gain]:
    """Over the control, of each milestone that both have in every run, measured alike."""
    of_runs = [_twins(report) for report in reports]
    for name in [] if _measured_otherwise(reports) else of_runs[0]:
        if all(name in twins for twins in of_runs):
            yield from _gains_over(f"control at {name}", [twins[name] for twins in of_runs])


def _twins(report: dict[str, Any]) -> dict[str, tuple[Measured, Measured]]:
    """Student and control by milestone; nothing of a report of before there were any."""
    student, control = (
        {one["name"]: one for one in (report.get("milestones") or {}).get(model, ())}
        for model in ("student", "control")
    )
    return {name: (student[name], control[name]) for name in student if name in control}


def _measured_otherwise(reports: Sequence[dict[str, Any]]) -> bool:
    """Whether milestones of several runs were measured on more or less than those of another, or
    in another way: what is not said of milestones alone, they take over from finished models."""
    ways = []
    for evaluation in (report["job"]["evaluation"] for report in reports if _twins(report)):
        own = {key: value for key, value in evaluation["milestones"].items() if value is not None}
        ways.append({key: evaluation.get(key) for key in HOW_MEASURED} | own)
    return any(way != ways[0] for way in ways)


def _gains_in_suites(other: str, reports: Sequence[dict[str, Any]]) -> Iterator[Gain]:
    """Of fine-tuning suites that are the same in every run, and in which both models have scores
    of the same tasks: such differences are in the reports themselves."""
    of_runs = [_points_of_suites(report, other) for report in reports]
    for suite in of_runs[0]:
        if all(suite in each for each in of_runs) and suite not in _changed_suites(reports):
            values = tuple(each[suite] for each in of_runs)
            yield Gain(other, f"{suite} (score, points)", values)


def _points_of_suites(report: dict[str, Any], other: str) -> dict[str, float]:
    """None of a report of before these were measured."""
    minus: dict[str, Any] = (report.get("gains") or {}).get("student_minus") or {}
    points: dict[str, float] = (minus.get(other) or {}).get("fine_tuning_points") or {}
    return points


def _changed_suites(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Suites that several runs have, with other tasks, examples or settings."""
    found: dict[str, list[object]] = {}
    for report in reports:
        for name, suite in (report.get("fine_tuning") or {}).items():
            tasks = {
                task: [facts[key] for key in TASK_FACTS] for task, facts in suite["tasks"].items()
            }
            found.setdefault(name, []).append([suite["settings"], tasks])
    return [name for name, kinds in found.items() if any(kind != kinds[0] for kind in kinds)]


def _names(run_dirs: Sequence[Path], reports: Sequence[dict[str, Any]]) -> list[str]:
    """What each run is called; of several of one name, by the directories given."""
    names = [report["name"] for report in reports]
    return [
        name if names.count(name) == 1 else str(run_dir)
        for name, run_dir in zip(names, run_dirs, strict=True)
    ]


def _runs_table(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    benchmarks = list(
        dict.fromkeys(name for one in reports for name in one["models"]["student"]["minimal_pairs"])
    )
    suites = list(dict.fromkeys(name for one in reports for name in one.get("fine_tuning") or ()))
    titles = [*(f"{name} (%)" for name in benchmarks), *(f"{name} (score)" for name in suites)]
    yield "| " + " | ".join(["run", "model", "dev CE (nats/token)", *titles]) + " |"
    yield "|---|---|" + "---:|" * (1 + len(titles))
    for run_name, report in zip(names, reports, strict=True):
        for name, model in report["models"].items():
            scores = [percent(model["minimal_pairs"].get(name)) for name in benchmarks]
            of_suite = model.get("fine_tuning") or {}  # a report of before has none
            scores += [percent(of_suite.get(name)) for name in suites]
            row = [run_name, name, f"{model['dev_ce']:.4f}", *scores]
            yield "| " + " | ".join(row) + " |"


def _gains_table(gains: Sequence[Gain]) -> Iterator[str]:
    yield "| student minus | measure | mean | standard error | min | max | runs |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for gain in gains:
        error = number(gain.standard_error, 4)
        low, high = min(gain.values), max(gain.values)
        yield (
            f"| {gain.other} | {gain.measure} | {gain.mean:+.4f} | {error} "
            f"| {low:+.4f} | {high:+.4f} | {len(gain.values)} |"
        )


def _suites(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What scores of fine-tuning are, and which do not compare between these runs."""
    if any(report.get("fine_tuning") for report in reports):
        yield ""
        yield (
            "Scores of fine-tuning (times 100) are means over tasks, each on its validation "
            f"examples. {BEST_EPOCH}"
        )
    if changed := _changed_suites(reports):
        yield ""
        yield (
            f"No gain is told in {', '.join(changed)}: its tasks, examples or settings are not the "
            "same in these runs."
        )


def _milestones(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Which gains on the way do not compare between these runs."""
    if _measured_otherwise(reports):
        yield ""
        yield (
            "No gain is told of milestones: evaluation.milestones, or what they take over from "
            "evaluation, is not the same in these runs."
        )


def _other_measurements(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """In what finished models were not measured alike, which no model tells."""
    asked = [(report.get("job") or {}).get("evaluation") or {} for report in reports]
    keys = [
        f"evaluation.{key}"
        for key in HOW_MEASURED
        if len({evaluation[key] for evaluation in asked if key in evaluation}) > 1
    ]
    if keys:
        yield ""
        yield f"These runs were not measured alike: {', '.join(keys)}."


def _other_jobs(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the runs differ in beside their seeds, as far as it changes a model."""
    first, *others = reports
    found = {key for other in others for key in _differing(first, other)}
    if keys := sorted(key for key in found if not _SEEDS.fullmatch(key)):
        yield ""
        yield f"These runs differ in more than their seeds: {', '.join(keys)}."
    elif _made_of_several_texts(reports):
        yield ""
        yield (
            "The text or the tokenizer is not the same in these runs (tokens sha256 in their "
            "reports), so their nats per token are not of the same tokens."
        )


def _differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Keys of the jobs of two reports; one may be of before an option that the other has."""
    jobs = [with_defaults(report.get("job") or {}) for report in (one, other)]
    return {key for key, _, _ in differing_keys(*jobs)}


def _made_of_several_texts(reports: Sequence[dict[str, Any]]) -> bool:
    """Whether the files changed beneath the same job; the nursery writes each seed its own."""
    made_from = [(report.get("environment") or {}).get("fingerprints") or {} for report in reports]
    corpora = [(report.get("job") or {}).get("corpus") or {} for report in reports]
    written_here = any(corpus.get("kind") == "nursery" for corpus in corpora)
    return not written_here and len({each.get("tokens") for each in made_from} - {None}) > 1


def _read(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "report" / "report.json"
    if not path.exists():
        raise DataError.of(
            run_dir,
            got="no report/report.json",
            expected="the directory of a finished run",
            hint=f"run the job first; of one that is done, babyllama-ds report {run_dir} writes it",
        )
    report: dict[str, Any] = files.read_json(path)
    return report


def _check_measured(run_dirs: Sequence[Path], reports: Sequence[dict[str, Any]]) -> None:
    problems = [
        Problem(
            where=str(run_dir),
            got=f"a report without a measurement of {', '.join(lacking)}",
            expected="the report of a finished run",
            hint="start the run again: it goes on from where it was",
        )
        for run_dir, report in zip(run_dirs, reports, strict=True)
        if (lacking := [name for name, one in report["models"].items() if one["dev_ce"] is None])
    ]
    if problems:
        raise DataError.all_of(problems)


def _check_independent(run_dirs: Sequence[Path], reports: Sequence[dict[str, Any]]) -> None:
    """The standard error is of runs that have nothing of chance in common: no run counts twice."""
    problems = []
    for place, run_dir in enumerate(run_dirs):
        for before in range(place):
            if what := _in_common(run_dirs, reports, before, place):
                problems.append(
                    Problem(
                        where=str(run_dir),
                        got=f"the same {what} as {run_dirs[before]}",
                        expected="runs of different seeds",
                        hint="leave one out: counted twice, it makes the standard error too small",
                    )
                )
                break
    if problems:
        raise DataError.all_of(problems)


def _in_common(
    run_dirs: Sequence[Path], reports: Sequence[dict[str, Any]], one: int, other: int
) -> str | None:
    """What makes two runs one: its weights, or all that they came of but for the machine."""
    weights = [(reports[place].get("weights") or {}).get("student") for place in (one, other)]
    if run_dirs[one].resolve() == run_dirs[other].resolve() or (
        weights[0] and weights[0] == weights[1]
    ):
        return "student"
    pair = (reports[one], reports[other])
    seeded = all("seed" in (report.get("job") or {}) for report in pair)
    alike = not _differing(*pair) - {"name"} and not _made_of_several_texts(pair)
    return "job and seed" if seeded and alike else None
