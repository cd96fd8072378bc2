"""The report's tables: its dictionary enters, headers and rows of text leave.

`markdown` and `html` lay them out; neither makes a number of its own. What is missing is a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from babyllama_ds.report.fine_tuning import METRICS, tasks_lacking
from babyllama_ds.report.formatting import (
    MISSING,
    count,
    duration,
    flat,
    number,
    percent,
    points,
)
from babyllama_ds.report.loss import in_words, name_of_divergence, weights_in_words
from babyllama_ds.report.milestones import benchmarks_of

Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row; its first cell heads it."""

    cells: Sequence[str]
    role: str = ""
    """A model's role; `total` sums up the rows above."""
    best: frozenset[int] = frozenset()
    """Cells that are the best of their measure."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; all columns but the first `left` are numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Row]
    left: int = 1


# -- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Quality:
    """A measure by which models are compared."""

    title: str
    of: Callable[[Mapping[str, Any]], float | None]
    shown: Callable[[float | None], str]
    better: Callable[[list[float]], float]
    """`min` or `max`."""
    comparable: bool = True
    """Whether it is of the same tasks for every model that has it."""


def models(report: Report) -> Table:
    """Models side by side; the best of each measure is known where several have it.

    What they reach stands before what they cost: a narrow page cuts off the last columns.
    """
    qualities = _qualities(report)
    costs = ["tokens seen", "training time", "tokens/s"]
    best = [_best(quality, report["models"].values()) for quality in qualities]
    return Table(
        caption="The models of this run. A star marks the best of a measure.",
        header=["model", "role", "parameters", *(each.title for each in qualities), *costs],
        rows=[
            Row(
                role=model["role"],
                cells=[
                    name,
                    model["role"],
                    count(model["params"]),
                    *(quality.shown(quality.of(model)) for quality in qualities),
                    count(model["train_tokens"]),
                    duration(model["seconds"]),
                    number(model["tokens_per_s"], 0),
                ],
                best=frozenset(
                    3 + place
                    for place, quality in enumerate(qualities)
                    if best[place] is not None and quality.of(model) == best[place]
                ),
            )
            for name, model in report["models"].items()
        ],
        left=2,
    )


def _qualities(report: Report) -> list[_Quality]:
    def of_key(key: str, title: str, digits: int) -> _Quality:
        return _Quality(
            title=title, of=lambda m: m[key], shown=lambda v: number(v, digits), better=min
        )

    def of_benchmark(name: str) -> _Quality:
        return _Quality(
            title=f"{name} (%)",
            of=lambda m: m["minimal_pairs"].get(name),
            shown=percent,
            better=max,
        )

    def of_suite(name: str) -> _Quality:
        return _Quality(
            title=f"{name} (score)",
            of=lambda m: m["fine_tuning"].get(name),
            shown=percent,
            better=max,
            comparable=not tasks_lacking(report["fine_tuning"][name]),
        )

    return [
        of_key("dev_ce", "dev CE (nats/token)", 4),
        of_key("perplexity", "perplexity", 2),
        of_key("bits_per_byte", "bits/byte", 4),
        *map(of_benchmark, report["minimal_pairs"]),
        *map(of_suite, report["fine_tuning"]),
    ]


def _best(quality: _Quality, models: Any) -> float | None:
    values = [value for model in models if (value := quality.of(model)) is not None]
    return quality.better(values) if len(values) > 1 and quality.comparable else None


def gains(report: Report) -> Table:
    """The student's difference from every other model."""
    benchmarks, suites = list(report["minimal_pairs"]), list(report["fine_tuning"])
    titles = [f"{name} (points)" for name in benchmarks]
    titles += [f"{name} (score, points)" for name in suites]
    return Table(
        caption="The student's difference from every other model.",
        header=["student minus", "dev CE (nats/token)", *titles],
        rows=[
            Row(
                role=report["models"][name]["role"],
                cells=[
                    name,
                    number(gain["dev_ce"], 4, sign=True),
                    *(
                        points(
                            gain["minimal_pairs_points"].get(benchmark),
                            gain["minimal_pairs_points_standard_error"].get(benchmark),
                        )
                        for benchmark in benchmarks
                    ),
                    *(
                        points(
                            gain["fine_tuning_points"].get(suite),
                            gain["fine_tuning_points_standard_error"].get(suite),
                        )
                        for suite in suites
                    ),
                ],
            )
            for name, gain in report["gains"]["student_minus"].items()
        ],
    )


# -- measurements ---------------------------------------------------------------------------------


def tasks(benchmark: Mapping[str, Any], models: Sequence[str]) -> Table:
    """Each task's accuracy by model, the unweighted mean over tasks, and the share of all pairs."""
    measured = [model for model in models if model in benchmark["pooled_accuracy"]]
    of_task = benchmark["tasks"]
    num_pairs = number(sum(scores["pairs"] for scores in of_task.values()), 0)
    means = [
        sum(scores["accuracy"][model] for scores in of_task.values()) / len(of_task)
        for model in measured
    ]
    pooled = [benchmark["pooled_accuracy"][model] for model in measured]
    rows = [
        Row(
            cells=[
                task,
                scores["term"] or MISSING,
                number(scores["pairs"], 0),
                *(percent(scores["accuracy"].get(model)) for model in measured),
            ]
        )
        for task, scores in of_task.items()
    ]
    sums = {"mean over tasks": means, "share of all pairs": pooled}
    return Table(
        caption="Accuracy on each task (%).",
        header=["task", "term", "pairs", *measured],
        rows=[
            *rows,
            *(
                Row(role="total", cells=[title, "", num_pairs, *map(percent, shares)])
                for title, shares in sums.items()
            ),
        ],
        left=2,
    )


def terms(benchmark: Mapping[str, Any], models: Sequence[str]) -> Table:
    """Each linguistic term's accuracy by model, the unweighted mean over its tasks."""
    measured = [model for model in models if model in benchmark["pooled_accuracy"]]
    return Table(
        caption="Accuracy on each linguistic term (%).",
        header=["term", "tasks", "pairs", *measured],
        rows=[
            Row(
                cells=[
                    term,
                    number(scores["tasks"], 0),
                    number(scores["pairs"], 0),
                    *(percent(scores["accuracy"].get(model)) for model in measured),
                ]
            )
            for term, scores in benchmark["terms"].items()
        ],
    )


def milestones(report: Report) -> Table:
    """What models measured at on their way."""
    of_models = report["milestones"]
    benchmarks = benchmarks_of(of_models)
    titles = [f"{name} (%)" for name in benchmarks]
    return Table(
        caption="What models measured at on their way.",
        header=["milestone", "model", "words seen", "step", "dev CE (nats/token)", *titles],
        rows=[
            Row(
                role=report["models"][model]["role"],
                cells=[
                    one["name"],
                    model,
                    number(one["words"], 0),
                    number(one["steps"], 0),
                    number(one["dev_ce"], 4),
                    *(percent(one["minimal_pairs"].get(name)) for name in benchmarks),
                ],
            )
            for model, of_model in of_models.items()
            for one in of_model
        ],
        left=2,
    )


def fine_tuning(report: Report, name: str) -> Table:
    """A suite's tasks by model, the best of each known where several have it; and the means."""
    suite = report["fine_tuning"][name]
    measured = [model for model in report["models"] if model in suite["score"]]
    errors = [report["models"][model]["fine_tuning_standard_error"][name] for model in measured]
    blank = [""] * 3
    sums = [
        Row(
            role="total",
            cells=["mean over tasks", *blank, *(percent(suite["score"][m]) for m in measured)],
            best=frozenset() if tasks_lacking(suite) else _best_scores(suite["score"], measured),
        ),
        Row(role="total", cells=["its standard error", *blank, *map(percent, errors)]),
    ]
    return Table(
        caption="Score of each task, times 100. A star marks the best.",
        header=["task", "metric", "validation examples", "majority", *measured],
        rows=[
            *(
                Row(
                    cells=[
                        task,
                        METRICS[facts["metric"]],
                        number(facts["examples"], 0),
                        percent(facts["majority"]),
                        *(percent(facts["score"].get(model)) for model in measured),
                    ],
                    best=_best_scores(facts["score"], measured),
                )
                for task, facts in suite["tasks"].items()
            ),
            *sums,
        ],
        left=2,
    )


def _best_scores(scores: Mapping[str, float], measured: Sequence[str]) -> frozenset[int]:
    """The cells of the best models' scores, of two or more."""
    if len(scores) < 2:
        return frozenset()
    best = max(scores.values())
    return frozenset(4 + place for place, model in enumerate(measured) if scores.get(model) == best)


def domains(report: Report) -> Table:
    """Development cross-entropy by domain and of the whole, models side by side."""
    of_domain, models = report["domains"], report["models"]
    measured = [name for name in models if any(name in by for by in of_domain.values())]
    # The same text in the same tokens for every model of a run.
    tokens = {
        domain: max(scores["tokens"] for scores in by.values()) for domain, by in of_domain.items()
    }
    return Table(
        caption="Development cross-entropy by domain (nats/token).",
        header=["domain", "tokens", *measured],
        rows=[
            *(
                Row(
                    cells=[
                        domain,
                        number(tokens[domain], 0),
                        *(number(by.get(name, {}).get("ce"), 4) for name in measured),
                    ]
                )
                for domain, by in of_domain.items()
            ),
            Row(
                role="total",
                cells=[
                    "whole",
                    number(sum(tokens.values()), 0),
                    *(number(models[name]["dev_ce"], 4) for name in measured),
                ],
            ),
        ],
    )


# -- teachers and loss ----------------------------------------------------------------------------


def ensemble(watched: Mapping[str, Any]) -> Table:
    """Each teacher beside their ensemble."""
    return Table(
        caption="Each teacher beside their ensemble.",
        header=["teacher", "own CE (nats/token)", "KL(teacher ‖ ensemble)", "same choice (%)"],
        rows=[
            Row(cells=[name, number(own["ce"], 4), number(own["kl"], 4), percent(own["agreement"])])
            for name, own in watched["teachers"].items()
        ],
    )


def loss(settings: Mapping[str, Any]) -> Table:
    """What the loss was made of."""
    name = name_of_divergence(settings)
    return Table(
        caption="What the loss was made of.",
        header=["setting", "value"],
        rows=[
            Row(cells=["alpha", in_words(settings["alpha"])]),
            Row(cells=["temperature", in_words(settings["temperature"])]),
            Row(cells=["soft_reduction", settings["soft_reduction"]]),
            Row(cells=["mean of the teachers'", settings["mean_of"]]),
            Row(cells=["weight of a token's CE", weights_in_words(settings, "ce")]),
            Row(cells=[f"weight of a token's {name}", weights_in_words(settings, "kl")]),
        ],
    )


# -- how it went ----------------------------------------------------------------------------------


def last_steps(report: Report) -> Table:
    """The last logged step of each training."""
    name, kind = name_of_divergence(report["loss"]), report["loss"]["divergence"]["kind"]
    soft = "kl" if kind == "forward_kl" else kind
    columns = {"loss": 4, "ce": 4, soft: 4, "grad_norm": 3, "tokens_per_s": 0}
    return Table(
        caption="The last logged step of each training.",
        header=[
            "stage",
            "step",
            "loss",
            "CE (nats)",
            f"{name} (nats)",
            "gradient norm",
            "tokens/s",
        ],
        rows=[
            Row(
                cells=[
                    stage,
                    number(line.get("step"), 0),
                    *(number(line.get(key), digits) for key, digits in columns.items()),
                ]
            )
            for stage, line in report["last_logged_step"].items()
        ],
    )


def speed(report: Report) -> Table:
    """The rates of models whose training was metered."""
    return Table(
        caption="How fast the models were trained.",
        header=["model", "tokens/s", "GFLOP/s", "mfu"],
        rows=[
            Row(
                role=model["role"],
                cells=[
                    name,
                    number(model["tokens_per_s"], 0),
                    number(model["flops_per_s"] / 1e9, 1),
                    number(model["mfu"], 3),
                ],
            )
            for name, model in report["models"].items()
            if model["mfu"] is not None
        ],
    )


def steps(report: Report) -> Table:
    """Where a step's time went, of every profiled model."""
    models = {name: model["step_s"] for name, model in report["models"].items() if model["step_s"]}
    parts = dict.fromkeys(part for step_s in models.values() for part in step_s)
    timed = [(step_s, sum(step_s.values())) for step_s in models.values()]
    return Table(
        caption="Where a step's time went, in ms; a mean over ranks and profiled steps.",
        header=["part", *models],
        rows=[
            *(
                Row(cells=[part, *(_ms(of.get(part), whole_s) for of, whole_s in timed)])
                for part in parts
            ),
            *(
                [Row(role="total", cells=["step", *(_ms(whole_s) for _, whole_s in timed)])]
                if parts
                else []
            ),
        ],
    )


def _ms(seconds: float | None, whole_s: float = 0.0) -> str:
    """Milliseconds; with `whole_s`, their share of it too."""
    share = f" ({seconds / whole_s:.0%})" if seconds is not None and whole_s else ""
    return number(None if seconds is None else 1e3 * seconds, 1) + share


def environment(report: Report) -> Table:
    """Where it was made, and of what: key paths and values."""
    return Table(
        caption="Where it was made, and of what.",
        header=["what", "value"],
        rows=[Row(cells=pair) for pair in flat(report["environment"])],
        left=2,
    )
