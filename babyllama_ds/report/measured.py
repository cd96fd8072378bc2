"""One model's measurement (the object of `evaluation/<model>.json`) enters, tables leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from babyllama_ds.report.fine_tuning import METRICS, notes
from babyllama_ds.report.formatting import (
    MISSING,
    count,
    duration,
    estimate,
    number,
    percent,
    table,
)
from babyllama_ds.report.uncertainty import accuracy_error, fine_tuning_error
from babyllama_ds.report.words import guessing


def render_measured(result: Mapping[str, Any]) -> str:
    """Text for a terminal: the model, the texts, the benchmarks by term and by task, the suites of
    fine-tuning by task."""
    sections = [
        f"{result['model']}: {count(result['params'])} parameters, {result['dtype']}, on "
        f"{result['device']}, attention {result['attention']}, {duration(result['seconds'])}"
    ]
    if result["dev"] is not None:
        sections += _texts(result["dev"])
    for name, benchmark in result["minimal_pairs"].items():
        sections += _benchmark(name, benchmark)
    for name, suite in (result.get("fine_tuning") or {}).items():
        sections += _suite(name, suite)
    return "\n\n".join(sections) + "\n"


def _texts(dev: Mapping[str, Any]) -> list[str]:
    length = dev["tokens"] // dev["windows"] + 1  # a window's first token is context
    rows = [
        [
            name,
            number(score["tokens"], 0),
            number(score["ce"], 4),
            number(score["perplexity"], 2),
            number(score["bits_per_byte"], 4),
        ]
        for name, score in (*dev["domains"].items(), ("whole", dev))
    ]
    return [
        f"Text, in {dev['windows']:,} windows of {length} tokens",
        table(["text", "tokens", "CE (nats/token)", "perplexity", "bits/byte"], rows),
    ]


def _benchmark(name: str, benchmark: Mapping[str, Any]) -> list[str]:
    tasks, terms = benchmark["tasks"], benchmark["terms"]
    pairs = sum(task["pairs"] for task in tasks.values())
    ties = sum(task["ties"] for task in tasks.values())
    space = "a leading space" if benchmark["leading_space"] else "no leading space"
    scored = (
        "no prefix token, so a sentence's first token is not scored"
        if benchmark["prefix"] is None
        else f"behind {benchmark['prefix']}"
    )
    accuracy = estimate(benchmark["accuracy"], accuracy_error(benchmark))
    whole = [
        ["mean over tasks", "", number(pairs, 0), percent(benchmark["accuracy"])],
        ["share of all pairs", "", number(pairs, 0), percent(benchmark["pooled_accuracy"])],
    ]
    by_term = [
        [term, number(score["tasks"], 0), number(score["pairs"], 0), percent(score["accuracy"])]
        for term, score in terms.items()
    ]
    by_task = [
        [task, score["term"] or MISSING, number(score["pairs"], 0), percent(score["accuracy"])]
        for task, score in tasks.items()
    ]
    return [
        f"{name}: {accuracy} % (mean over {_tasks(tasks)}; guessing gives "
        f"{guessing(benchmark):.4g} %; {space}; {scored}; ties: {ties}, which count as wrong)",
        *([table(["term", "tasks", "pairs", "accuracy (%)"], by_term)] if terms else []),
        table(["task", "term", "pairs", "accuracy (%)"], [*by_task, *whole], left=2),
    ]


def _suite(name: str, suite: Mapping[str, Any]) -> list[str]:
    tasks, several = suite["tasks"], suite["settings"]["seeds"] > 1
    rows = [
        [
            task,
            METRICS[scores["metric"]],
            number(scores["train_examples"], 0),
            number(scores["examples"], 0),
            percent(scores["majority"]),
            percent(scores["score"]),
            *([", ".join(map(percent, scores["scores"]))] if several else []),
            ", ".join(map(str, scores["epochs"])),
        ]
        for task, scores in tasks.items()
    ]
    by_seed = ["by seed"] if several else []
    mean = ["mean over tasks", *[""] * 4, percent(suite["score"]), *[""] * (1 + several)]
    counts = ["training examples", "validation examples"]
    return [
        f"{name}: {estimate(suite['score'], fine_tuning_error(suite))} (mean over "
        f"{_tasks(tasks)} of their scores, times 100)",
        *notes(suite["settings"]),
        table(
            ["task", "metric", *counts, "majority", "score", *by_seed, "epoch"],
            [*rows, mean],
            left=2,
        ),
    ]


def _tasks(tasks: Mapping[str, Any]) -> str:
    return f"{len(tasks)} task{'s' * (len(tasks) != 1)}"
