"""A model's evaluation enters; what a report says of it leaves, by the report's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from babyllama_ds.report.uncertainty import accuracy_error


def scores_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """On development text and minimal pairs; null or empty where it was not measured."""
    dev = evaluation.get("dev") or {}
    benchmarks = evaluation.get("minimal_pairs") or {}
    return {
        "dev_ce": dev.get("ce"),
        "perplexity": dev.get("perplexity"),
        "bits_per_byte": dev.get("bits_per_byte"),
        "minimal_pairs": {name: scores["accuracy"] for name, scores in benchmarks.items()},
        "minimal_pairs_standard_error": {
            name: accuracy_error(scores) for name, scores in benchmarks.items()
        },
    }
