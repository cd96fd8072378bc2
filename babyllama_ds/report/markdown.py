"""`report.md`: the report's dictionary enters, a readable page leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from babyllama_ds.report import tables, words
from babyllama_ds.report.formatting import number, table
from babyllama_ds.report.milestones import how_measured
from babyllama_ds.report.tables import Table
from babyllama_ds.spec.resolved import dump_values

MOST_TASKS_SHOWN = 20
"""A longer table of tasks is folded away."""


def render_markdown(report: Mapping[str, Any]) -> str:
    """The page: the result in a sentence, then the tables it rests on."""
    sections = [
        f"# {report['name']}",
        headline(report),
        words.origin(report),
        *words.unfinished(report),
        "## Models",
        models_table(report),
        *words.trainings(report),
        *_gains(report),
        *_loss(report),
        *_ensemble(report),
        *_last_logged(report),
        *_speed(report),
        *_domains(report),
        *_tasks(report),
        *_milestones(report),
        *fine_tuning_sections(report),
        *_environment(report),
        *_loading(),
        *_job(report),
    ]
    return "\n\n".join(sections) + "\n"


# -- parts that the model card shares -----------------------------------------------------------


def headline(report: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    first, *others = words.result(report)
    if report["models"]["student"]["dev_ce"] is not None:
        first = f"**{first}**"
    return " ".join([first, *others])


def models_table(report: Mapping[str, Any]) -> str:
    """Models side by side."""
    return _laid_out(tables.models(report))


def gains_table(report: Mapping[str, Any]) -> str:
    """The student's difference from every other model."""
    return _laid_out(tables.gains(report))


def fine_tuning_sections(report: Mapping[str, Any], heading: str = "##") -> list[str]:
    """Each suite's scores by task, and how they came about."""
    return [
        part
        for name, suite in report["fine_tuning"].items()
        for part in (
            f"{heading} Fine-tuning: {name} (score, times 100)",
            _laid_out(tables.fine_tuning(report, name)),
            *words.fine_tuning(suite),
        )
    ]


# -- sections -----------------------------------------------------------------------------------


def _gains(report: Mapping[str, Any]) -> list[str]:
    return ["## Gains", gains_table(report), report["gains"]["note"]]


def _loss(report: Mapping[str, Any]) -> list[str]:
    loss, topk = report["loss"], report.get("topk")
    sections = [
        "## Loss",
        f"`{loss['formula']}`",
        _laid_out(tables.loss(loss)),
        loss["explanation"],
    ]
    return [*sections, *([words.topk_error(topk)] if topk else [])]


def _ensemble(report: Mapping[str, Any]) -> list[str]:
    ensemble = report["ensemble"]
    if not ensemble:
        return []
    warnings = [f"**Warning: {warning}.**" for warning in ensemble["warnings"]]
    sentences = " ".join(words.ensemble_sentences(ensemble))
    return ["## The ensemble", *warnings, _laid_out(tables.ensemble(ensemble)), sentences]


def _last_logged(report: Mapping[str, Any]) -> list[str]:
    if not report["last_logged_step"]:
        return []
    steps = _laid_out(tables.last_steps(report))
    return ["## Last logged training step", steps, words.LAST_STEP_NOTE]


def _speed(report: Mapping[str, Any]) -> list[str]:
    metered = {name: model for name, model in report["models"].items() if model["mfu"] is not None}
    if not metered:
        return []
    parts = [
        f"A step of {name}, by parts (ms): "
        + ", ".join(f"{part} {number(1e3 * seconds, 1)}" for part, seconds in step_s.items())
        + "."
        for name, model in metered.items()
        if (step_s := model["step_s"])
    ]
    return ["## Speed", _laid_out(tables.speed(report)), words.speed(report), *parts]


def _domains(report: Mapping[str, Any]) -> list[str]:
    if len(report["domains"]) < 2:  # one is the whole
        return []
    title = "## Dev cross-entropy by domain (nats/token)"
    return [title, _laid_out(tables.domains(report)), words.DOMAINS_NOTE]


def _tasks(report: Mapping[str, Any]) -> list[str]:
    sections: list[str] = []
    models = list(report["models"])
    for name, benchmark in report["minimal_pairs"].items():
        tasks = _laid_out(tables.tasks(benchmark, models))
        if len(benchmark["tasks"]) > MOST_TASKS_SHOWN:
            summary = f"{len(benchmark['tasks'])} tasks"
            tasks = f"<details><summary>{summary}</summary>\n\n{tasks}\n\n</details>"
        terms = [_laid_out(tables.terms(benchmark, models))] if benchmark["terms"] else []
        sections += [
            f"## Minimal pairs: {name} (accuracy, %)",
            words.presentation(benchmark),
            *terms,
            tasks,
        ]
    return sections


def _milestones(report: Mapping[str, Any]) -> list[str]:
    if not report["milestones"]:
        return []
    return ["## Milestones", _laid_out(tables.milestones(report)), how_measured(report)]


def _environment(report: Mapping[str, Any]) -> list[str]:
    if not report["environment"]:
        return ["## Environment", "Not recorded."]
    return ["## Environment", _laid_out(tables.environment(report))]


def _loading() -> list[str]:
    return ["## Loading the student", "From this run's directory:", loading_snippet("student")]


def loading_snippet(path: str, *, revision: str | None = None) -> str:
    """Code that loads a model, of a branch of its repository, and lets it write."""
    of_branch = "" if revision is None else f', revision="{revision}"'
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}"{of_branch})
model = AutoModelForCausalLM.from_pretrained("{path}"{of_branch})
ids = tokenizer("The little dog", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_length=60, do_sample=True)[0]))
```"""


def _job(report: Mapping[str, Any]) -> list[str]:
    text = dump_values(report["job"]).rstrip()
    return ["## Job", f"<details><summary>job.yaml</summary>\n\n```yaml\n{text}\n```\n\n</details>"]


def _laid_out(of: Table) -> str:
    return table(of.header, [row.cells for row in of.rows], left=of.left)
