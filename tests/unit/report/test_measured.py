"""Tables of one measurement, for a terminal."""

from __future__ import annotations

from typing import Any

from babyllama_ds.report.measured import render_measured

RESULT: dict[str, Any] = {
    "model": "runs/one/student",
    "params": 58_343_936,
    "dtype": "bfloat16",
    "device": "cpu",
    "attention": "sdpa",
    "dev": {
        "ce": 2.5,
        "perplexity": 12.18,
        "bits_per_byte": None,
        "tokens": 1270,
        "windows": 10,
        "domains": {
            "tales": {"ce": 2.25, "perplexity": 9.49, "bits_per_byte": 1.5, "tokens": 1000},
            "talk": {"ce": 3.4, "perplexity": 29.96, "bits_per_byte": 1.25, "tokens": 270},
        },
    },
    "minimal_pairs": {
        "blimp": {
            "accuracy": 0.625,
            "pooled_accuracy": 0.6,
            "terms": {"binding": {"accuracy": 0.75, "tasks": 1, "pairs": 1000}},
            "tasks": {
                "c_command": {"accuracy": 0.75, "pairs": 1000, "ties": 2, "term": "binding"},
                "odd": {"accuracy": 0.5, "pairs": 1500, "ties": 1, "term": None},
            },
            "prefix": None,
            "leading_space": True,
        }
    },
    "seconds": 12.34,
}


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    ]


def test_every_number_stands_in_its_row() -> None:
    text = render_measured(RESULT)
    assert text.startswith(
        "runs/one/student: 58.3 M parameters, bfloat16, on cpu, attention sdpa, 12.3 s\n"
    )
    assert "in 10 windows of 128 tokens" in text
    assert (
        "blimp: 62.50 % (mean over 2 tasks; guessing gives 50 %; a leading space; no prefix token, "
        "so a sentence's first token is not scored; ties: 3, which count as wrong)" in text
    )
    assert rows(text) == [
        ["text", "tokens", "CE (nats/token)", "perplexity", "bits/byte"],
        ["tales", "1,000", "2.2500", "9.49", "1.5000"],
        ["talk", "270", "3.4000", "29.96", "1.2500"],
        ["whole", "1,270", "2.5000", "12.18", "–"],
        ["term", "tasks", "pairs", "accuracy (%)"],
        ["binding", "1", "1,000", "75.00"],
        ["task", "term", "pairs", "accuracy (%)"],
        ["c_command", "binding", "1,000", "75.00"],
        ["odd", "–", "1,500", "50.00"],
        ["mean over tasks", "", "2,500", "62.50"],
        ["share of all pairs", "", "2,500", "60.00"],
    ]


def test_what_was_not_measured_is_not_told() -> None:
    text = render_measured({**RESULT, "dev": None})
    assert "windows" not in text
    text = render_measured({**RESULT, "minimal_pairs": {}})
    assert "%" not in text


def test_one_task_is_no_plural() -> None:
    blimp = RESULT["minimal_pairs"]["blimp"]
    one = {**blimp, "tasks": {"odd": blimp["tasks"]["odd"]}}
    assert "(mean over 1 task; " in render_measured({**RESULT, "minimal_pairs": {"blimp": one}})


def test_a_benchmark_behind_a_prefix_token() -> None:
    blimp = {**RESULT["minimal_pairs"]["blimp"], "prefix": "<s>", "leading_space": False}
    text = render_measured({**RESULT, "minimal_pairs": {"blimp": {**blimp, "terms": {}}}})
    assert "; no leading space; behind <s>; ties: 3" in text
    assert ["term", "tasks", "pairs", "accuracy (%)"] not in rows(text)


def test_an_accuracy_stands_with_its_standard_error() -> None:
    tasks = {"one": "1110", "two": "10=1"}
    kept = {
        name: {**RESULT["minimal_pairs"]["blimp"]["tasks"]["odd"], "outcomes": outcomes}
        for name, outcomes in tasks.items()
    }
    blimp = {**RESULT["minimal_pairs"]["blimp"], "tasks": kept}
    # Sample variances of four pairs each: 1/4 and 1/3.
    assert "blimp: 62.50 ± 19.09 % (mean" in render_measured(
        {**RESULT, "minimal_pairs": {"blimp": blimp}}
    )
