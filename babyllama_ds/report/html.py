"""`report.html`: the report's dictionary and curves enter; a page and its figures leave.

`view_of` draws the figures and gathers words and tables, `templates/report.html` puts them into
place. Every word that is not the template's own is escaped (jinja2's autoescape); the figures
alone, which matplotlib has escaped, go in as they are. The page fetches nothing and has no scripts,
and tells the browser so (its Content-Security-Policy).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from babyllama_ds import __version__
from babyllama_ds.report import milestones, tables, words
from babyllama_ds.report.figures import (
    Figure,
    Style,
    draw_curves,
    draw_dots,
    leaves_out,
    styles_of,
    variables,
)
from babyllama_ds.report.fine_tuning import METRICS
from babyllama_ds.report.loss import in_words
from babyllama_ds.report.metrics import Curve
from babyllama_ds.report.tables import Table
from babyllama_ds.spec.resolved import dump_values

Report = Mapping[str, Any]

CURVES = {
    "ce": ("Training cross-entropy", "nats/token"),
    "dev_ce": ("Development cross-entropy", "nats/token"),
    "kl": ("KL divergence from the teachers", "nats/token"),
    "reverse_kl": ("Reverse KL divergence to the teachers", "nats/token"),
    "jensen_shannon": ("Jensen–Shannon divergence from the teachers", "nats/token"),
    "skewed_forward_kl": ("Skewed KL divergence from the teachers", "nats/token"),
    "skewed_reverse_kl": ("Skewed reverse KL divergence to the teachers", "nats/token"),
    "student_agreement": ("Agreement with the ensemble", "share of positions"),
}
"""Title and unit of each measure that is drawn against tokens, in the order of the page."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of minimal pairs: its figure, its tasks, how they were scored."""

    name: str
    figure: Figure
    tasks: Table
    presentation: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite of fine-tuning tasks: its figure, its scores, how they came about."""

    name: str
    figure: Figure
    tasks: Table
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class View:
    """What the page shows beside the report itself; the template leaves out what is empty."""

    report: Report
    curves: Sequence[Figure]
    curves_notes: Sequence[str]
    benchmarks: Sequence[Benchmark]
    milestones: Sequence[Figure]
    suites: Sequence[Suite]
    domains: Figure | None

    @property
    def figures(self) -> list[Figure]:
        """All of the page's."""
        of_domains = [self.domains] if self.domains else []
        of_suites = [one.figure for one in self.suites]
        of_benchmarks = [one.figure for one in self.benchmarks]
        return [*self.curves, *of_benchmarks, *self.milestones, *of_suites, *of_domains]


def view_of(report: Report, curves: Mapping[str, Mapping[str, Curve]]) -> View:
    """The page's content, its figures drawn; `curves` by measure and model."""
    styles = styles_of(report["models"])
    drawn = {measure: curves[measure] for measure in CURVES if curves.get(measure)}
    return View(
        report=report,
        curves=[_curves(measure, of_model, styles) for measure, of_model in drawn.items()],
        curves_notes=_curves_notes(report, drawn),
        benchmarks=_benchmarks(report, styles),
        milestones=_milestones(report, styles),
        suites=_suites(report, styles),
        domains=_domains(report, styles),
    )


def render_html(view: View) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("babyllama_ds.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        report=view.report,
        view=view,
        words=words,
        tables=tables,
        milestones=milestones,
        colours=variables(),
        job=dump_values(view.report["job"]),
        version=__version__,
    )


# -- curves ---------------------------------------------------------------------------------------


def _curves(measure: str, of_model: Mapping[str, Curve], styles: Mapping[str, Style]) -> Figure:
    title, unit = CURVES[measure]
    # Evaluations are few: each is shown as the point that it is.
    return draw_curves(measure, title, of_model, styles, unit=unit, markers=measure == "dev_ce")


def _curves_notes(report: Report, drawn: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """What one has to know to read the curves rightly."""
    if not drawn:
        return ["No metrics are logged in this run, so there are no curves."]
    notes = []
    without = [name for name in report["models"] if all(name not in of for of in drawn.values())]
    if without:
        notes.append(
            f"No curve for {', '.join(without)}: nothing is logged of it here (a teacher may have "
            "been loaded)."
        )
    most = max(curve.per_point for of in drawn.values() for curve in of.values())
    if most > 1:
        notes.append(f"A point of a long curve is the mean of up to {most} logged values.")
    if any(leaves_out(of) for of in drawn.values()):
        notes.append(
            "A frame holds what came after the first tenth of a training, so that its differences "
            "can be seen; what came before may lie outside."
        )
    if "student_agreement" in drawn:
        notes.append(
            "Agreement is the share of positions of a logged batch at which student and ensemble "
            "have the same likeliest token."
        )
    if not {"student_agreement", "ce", "dev_ce"} >= drawn.keys():
        temperature = in_words(report["loss"]["temperature"])
        notes.append(
            f"The divergence is of the student from its teachers' mean at T = {temperature}, "
            "without the factors of the loss."
        )
    return notes


# -- measurements ---------------------------------------------------------------------------------


def _benchmarks(report: Report, styles: Mapping[str, Style]) -> list[Benchmark]:
    benchmarks: list[Benchmark] = []
    for name, benchmark in report["minimal_pairs"].items():
        taken = [other.figure.name for other in benchmarks]
        figure = draw_dots(
            _file_name(f"minimal_pairs-{name}", taken),
            f"{name} by linguistic term",
            _by_term(benchmark),
            styles,
            unit="accuracy (%)",
            chance=_chance(benchmark),
        )
        benchmarks.append(
            Benchmark(
                name=name,
                figure=figure,
                tasks=tables.tasks(benchmark, list(report["models"])),
                presentation=words.presentation(benchmark),
            )
        )
    return benchmarks


def _chance(benchmark: Mapping[str, Any]) -> float | None:
    """Per cent that guessing gets right in every task; none: in one more than in another."""
    # Rounded: each is a mean over its task's items.
    chances = {round(100 * words.chance_of(scores), 6) for scores in benchmark["tasks"].values()}
    return chances.pop() if len(chances) == 1 else None


def _by_term(benchmark: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per cent by term and model: the unweighted mean over a term's tasks.

    A task without a term stands for itself.
    """
    accuracies: dict[str, list[Mapping[str, float]]] = {}
    for task, scores in benchmark["tasks"].items():
        accuracies.setdefault(scores["term"] or task, []).append(scores["accuracy"])
    return {
        term: {
            model: 100 * sum(of_model[model] for of_model in of_tasks) / len(of_tasks)
            for model in of_tasks[0]
            if all(model in of_model for of_model in of_tasks)
        }
        for term, of_tasks in accuracies.items()
    }


def _milestones(report: Report, styles: Mapping[str, Style]) -> list[Figure]:
    """How models learned: cross-entropy, then each benchmark, against words seen."""
    figures: list[Figure] = []
    if on_text := milestones.curves_on_text(report["milestones"]):
        figures.append(
            draw_curves(
                "milestones",
                "Development cross-entropy on the way",
                on_text,
                styles,
                unit="nats/token",
                markers=True,
                against="words",
            )
        )
    for benchmark in milestones.benchmarks_of(report["milestones"]):
        finished = report["minimal_pairs"].get(benchmark)
        figures.append(
            draw_curves(
                _file_name(f"milestones-{benchmark}", [other.name for other in figures]),
                f"{benchmark} on the way",
                milestones.curves_on(report["milestones"], benchmark),
                styles,
                unit="accuracy (%)",
                markers=True,
                against="words",
                chance=words.guessing(finished) if finished else None,
            )
        )
    return figures


def _suites(report: Report, styles: Mapping[str, Style]) -> list[Suite]:
    suites: list[Suite] = []
    for name, suite in report["fine_tuning"].items():
        rows = {
            f"{task} ({METRICS[facts['metric']]})": {
                model: 100 * score for model, score in facts["score"].items()
            }
            for task, facts in suite["tasks"].items()
        }
        figure = draw_dots(
            _file_name(f"fine_tuning-{name}", [other.figure.name for other in suites]),
            f"{name} after fine-tuning",
            rows,
            styles,
            unit="score, times 100",
        )
        scores = tables.fine_tuning(report, name)
        suites.append(Suite(name=name, figure=figure, tasks=scores, notes=words.fine_tuning(suite)))
    return suites


def _domains(report: Report, styles: Mapping[str, Style]) -> Figure | None:
    domains = report.get("domains")
    if not domains or len(domains) < 2:  # one is the whole
        return None
    rows = {
        domain: {model: scores["ce"] for model, scores in by_model.items() if model in styles}
        for domain, by_model in domains.items()
    }
    title = "Development cross-entropy by domain"
    return draw_dots("domains", title, rows, styles, unit="nats/token (lower is better)")


def _file_name(title: str, taken: Collection[str]) -> str:
    """A file's name that is an id too, and none of those taken."""
    name = plain = re.sub(r"[^A-Za-z0-9_-]+", "-", title)
    number_of_it = 1
    while name in taken:
        number_of_it += 1
        name = f"{plain}-{number_of_it}"
    return name
