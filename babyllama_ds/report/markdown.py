"""`report.md`: the report's dictionary enters, a readable page leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from babyllama_ds.report.formatting import (
    MISSING,
    count,
    duration,
    flat,
    number,
    percent,
    table,
)
from babyllama_ds.report.loss import in_words, name_of_divergence, weights_in_words

MOST_TASKS_SHOWN = 20
"""A longer table of tasks is folded away."""


def render_markdown(report: Mapping[str, Any]) -> str:
    """The page: the result in a sentence, then the tables it rests on."""
    sections = [
        f"# {report['name']}",
        headline(report),
        provenance(report),
        "## Models",
        models_table(report),
        *trainings(report),
        *_gains(report),
        *_loss(report),
        *_ensemble(report),
        *_last_logged(report),
        *_speed(report),
        *_domains(report),
        *_tasks(report),
        *_environment(report),
        *_loading(),
        *_job(report),
    ]
    return "\n\n".join(sections) + "\n"


# -- parts that the model card shares -----------------------------------------------------------


def headline(report: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    student = report["models"]["student"]
    size = f" ({count(student['params'])} parameters)" if student["params"] is not None else ""
    if student["dev_ce"] is None and not student["minimal_pairs"]:
        return f"The student{size} has not been evaluated."
    sentences = []
    if student["dev_ce"] is not None:
        sentences.append(
            f"**The student{size} reaches a dev cross-entropy of {student['dev_ce']:.4f} "
            f"nats/token{_compared(report)}.**"
        )
    for benchmark, accuracy in student["minimal_pairs"].items():
        points = _points_over_control(report, benchmark)
        sentences.append(f"It is right on {100 * accuracy:.2f} % of {benchmark}{points}.")
    return " ".join(sentences)


def models_table(report: Mapping[str, Any]) -> str:
    """Models side by side."""
    models = report["models"]
    benchmarks = list(report["minimal_pairs"])
    header = [
        "model",
        "role",
        "parameters",
        "tokens seen",
        "training time",
        "tokens/s",
        "dev CE (nats/token)",
        "perplexity",
        "bits/byte",
        *(f"{name} (%)" for name in benchmarks),
    ]
    rows = [
        [
            name,
            model["role"],
            count(model["params"]),
            count(model["train_tokens"]),
            duration(model["seconds"]),
            number(model["tokens_per_s"], 0),
            number(model["dev_ce"], 4),
            number(model["perplexity"], 2),
            number(model["bits_per_byte"], 4),
            *(percent(model["minimal_pairs"].get(benchmark)) for benchmark in benchmarks),
        ]
        for name, model in models.items()
    ]
    return table(header, rows, left=2)


ENDED = {"early_stopping": "early stopping", "max_minutes": "max_minutes"}


def trainings(report: Mapping[str, Any]) -> list[str]:
    """What the table does not show: trainings that ended early, weights that are an average."""
    models = report["models"].items()
    sentences = [
        f"The training of {name} ended after {model['steps']:,} of {model['planned_steps']:,} "
        f"planned steps: {ENDED[model['ended_by']]}."
        for name, model in models
        if model["ended_by"] in ENDED
    ]
    sentences += [
        f"The weights of {name} are a moving average (decay {model['averaged']:g})."
        for name, model in models
        if model["averaged"] is not None
    ]
    return [" ".join(sentences)] if sentences else []


def gains_table(report: Mapping[str, Any]) -> str:
    """The student's difference from every other model."""
    benchmarks = list(report["minimal_pairs"])
    rows = [
        [
            name,
            number(gain["dev_ce"], 4, sign=True),
            *(number(gain["minimal_pairs_points"].get(b), 2, sign=True) for b in benchmarks),
        ]
        for name, gain in report["gains"]["student_minus"].items()
    ]
    header = ["student minus", "dev CE (nats/token)", *(f"{name} (points)" for name in benchmarks)]
    return table(header, rows)


def provenance(report: Mapping[str, Any]) -> str:
    """What the numbers belong to: commit, job, tokenizer, text (as tokens), seed, hardware."""
    environment = report["environment"]
    made_from = environment.get("fingerprints") or {}
    hashes = {"job": report["job_sha256"], **{k: made_from.get(k) for k in ("tokenizer", "tokens")}}
    return (
        f"commit {environment.get('commit') or MISSING} · "
        + "".join(f"{what} sha256 {(h or MISSING)[:12]} · " for what, h in hashes.items())
        + f"seed {report['job']['seed']} · {_hardware(environment.get('hardware'))}"
    )


# -- sections -----------------------------------------------------------------------------------


def _gains(report: Mapping[str, Any]) -> list[str]:
    return ["## Gains", gains_table(report), report["gains"]["note"]]


def _loss(report: Mapping[str, Any]) -> list[str]:
    loss = report["loss"]
    rows = [
        ["alpha", in_words(loss["alpha"])],
        ["temperature", in_words(loss["temperature"])],
        ["soft_reduction", loss["soft_reduction"]],
        ["mean of the teachers'", loss["mean_of"]],
        ["weight of a token's CE", weights_in_words(loss, "ce")],
        [f"weight of a token's {name_of_divergence(loss)}", weights_in_words(loss, "kl")],
    ]
    formula = f"`{loss['formula']}`"
    sections = ["## Loss", formula, table(["setting", "value"], rows), loss["explanation"]]
    return [*sections, *_topk(report.get("topk"))]


def _topk(error: Mapping[str, Any] | None) -> list[str]:
    """What it cost to keep the teachers' most likely tokens only."""
    if error is None:
        return []
    return [
        f"The teachers' targets are approximate, the top-k of their mixture (k {error['k']}, all "
        f"other tokens one bucket). With the student's final weights, on {error['windows']} "
        f"windows of the training text, the KL is {error['topk_kl']:.4g} nats/token instead of "
        f"{error['exact_kl']:.4g} (relative error {error['relative_kl_error']:.2g}), and its "
        "gradient with respect to the student's hidden states has a cosine of "
        f"{error['gradient_cosine']:.4f} with the exact one."
    ]


def _ensemble(report: Mapping[str, Any]) -> list[str]:
    ensemble = report["ensemble"]
    if not ensemble:
        return []
    rows = [
        [name, number(own["ce"], 4), number(own["kl"], 4), percent(own["agreement"])]
        for name, own in ensemble["teachers"].items()
    ]
    header = ["teacher", "own CE (nats/token)", "KL(teacher ‖ ensemble)", "same choice (%)"]
    chance = ensemble["chance_ce"]
    sentences = [
        f"Means over steps {ensemble['first_step']} to {ensemble['last_step']} of the "
        f"distillation ({ensemble['logged_steps']} logged), on its training windows, at T = 1"
        + (f"; a uniform guess has a CE of {chance:.4f}." if chance is not None else "."),
        f"The targets' entropy is {number(ensemble['target_entropy'], 4)} nats/token.",
        f"The student's likeliest token is the ensemble's at "
        f"{percent(ensemble['student_agreement'])} % of positions; KL(ensemble ‖ student) is "
        f"{number(ensemble['student_kl'], 4)} nats/token.",
        *(
            f"{pair.replace('/', ' and ')} are {number(distance, 4)} apart (total variation, "
            "0 to 1)."
            for pair, distance in ensemble["distances"].items()
        ),
    ]
    warnings = [f"**Warning: {warning}.**" for warning in ensemble["warnings"]]
    return ["## The ensemble", *warnings, table(header, rows), " ".join(sentences)]


def _last_logged(report: Mapping[str, Any]) -> list[str]:
    name, kind = name_of_divergence(report["loss"]), report["loss"]["divergence"]["kind"]
    soft = "kl" if kind == "forward_kl" else kind
    columns = {"loss": 4, "ce": 4, soft: 4, "grad_norm": 3, "tokens_per_s": 0}
    header = ["stage", "step", "loss", "CE (nats)", f"{name} (nats)", "gradient norm", "tokens/s"]
    rows = [
        [stage, number(line.get("step"), 0), *(number(line.get(k), d) for k, d in columns.items())]
        for stage, line in report["last_logged_step"].items()
    ]
    note = (
        "Training loss; with teachers it is the weighted sum of the section above, so compare "
        "models by CE, not by loss."
    )
    return ["## Last logged training step", table(header, rows), note] if rows else []


def _speed(report: Mapping[str, Any]) -> list[str]:
    metered = {name: model for name, model in report["models"].items() if model["mfu"] is not None}
    if not metered:
        return []
    rows = [
        [
            name,
            number(model["tokens_per_s"], 0),
            number(model["flops_per_s"] / 1e9, 1),
            number(model["mfu"], 3),
        ]
        for name, model in metered.items()
    ]
    note = (
        "GFLOP/s of the matrix products that training has to compute; mfu is their part of what "
        "this machine's bf16 products were measured to reach at the same shapes."
    )
    profiled = [(name, model["step_s"]) for name, model in metered.items() if model["step_s"]]
    parts = [
        f"A step of {name}, by parts (ms): "
        + ", ".join(f"{part} {number(1e3 * seconds, 1)}" for part, seconds in step_s.items())
        + "."
        for name, step_s in profiled
    ]
    return ["## Speed", table(["model", "tokens/s", "GFLOP/s", "mfu"], rows), note, *parts]


def _domains(report: Mapping[str, Any]) -> list[str]:
    domains = report["domains"]
    if len(domains) < 2:  # one is the whole
        return []
    note = (
        "A token belongs to the file that it comes from itself, also where its window began in the "
        "one before. The whole is the mean over tokens."
    )
    title = "## Dev cross-entropy by domain (nats/token)"
    return [title, domains_table(domains, report["models"]), note]


def domains_table(domains: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """Models by domains, the whole last, over the tokens that they were measured on."""
    measured = [name for name in models if any(name in scores for scores in domains.values())]
    # The same text in the same tokens for every model of a run.
    tokens = [max(score["tokens"] for score in scores.values()) for scores in domains.values()]
    rows = [["tokens", *(number(each, 0) for each in (*tokens, sum(tokens)))]]
    for name in measured:
        own = [scores.get(name, {}).get("ce") for scores in domains.values()]
        rows.append([name, *(number(ce, 4) for ce in (*own, models[name]["dev_ce"]))])
    return table(["model", *domains, "whole"], rows)


def _tasks(report: Mapping[str, Any]) -> list[str]:
    sections: list[str] = []
    for name, benchmark in report["minimal_pairs"].items():
        tasks = tasks_table(benchmark, list(report["models"]))
        if len(benchmark["tasks"]) > MOST_TASKS_SHOWN:
            summary = f"{len(benchmark['tasks'])} tasks"
            tasks = f"<details><summary>{summary}</summary>\n\n{tasks}\n\n</details>"
        terms = [terms_table(benchmark, list(report["models"]))] if benchmark["terms"] else []
        title = f"## Minimal pairs: {name} (accuracy, %)"
        sections += [title, _presentation(benchmark), *terms, tasks]
    return sections


def terms_table(benchmark: Mapping[str, Any], models: list[str]) -> str:
    """Each linguistic term's accuracy by model, the unweighted mean over its tasks."""
    measured = [model for model in models if model in benchmark["pooled_accuracy"]]
    rows = [
        [
            term,
            number(scores["tasks"], 0),
            number(scores["pairs"], 0),
            *(percent(scores["accuracy"].get(model)) for model in measured),
        ]
        for term, scores in benchmark["terms"].items()
    ]
    return table(["term", "tasks", "pairs", *measured], rows)


def tasks_table(benchmark: Mapping[str, Any], models: list[str]) -> str:
    """Each task's accuracy by model, the unweighted mean over tasks, and the share of all pairs."""
    measured = [model for model in models if model in benchmark["pooled_accuracy"]]
    tasks = benchmark["tasks"]
    rows = [
        [
            task,
            scores["term"] or MISSING,
            number(scores["pairs"], 0),
            *(percent(scores["accuracy"].get(model)) for model in measured),
        ]
        for task, scores in tasks.items()
    ]
    num_pairs = number(sum(scores["pairs"] for scores in tasks.values()), 0)
    means = [
        sum(scores["accuracy"][model] for scores in tasks.values()) / len(tasks)
        for model in measured
    ]
    pooled = [benchmark["pooled_accuracy"][model] for model in measured]
    rows.append(["mean over tasks", "", num_pairs, *map(percent, means)])
    rows.append(["share of all pairs", "", num_pairs, *map(percent, pooled)])
    return table(["task", "term", "pairs", *measured], rows, left=2)


def _presentation(benchmark: Mapping[str, Any]) -> str:
    scored = (
        "no prefix token, so the first token is not scored"
        if benchmark["prefix"] is None
        else f"behind the prefix token `{benchmark['prefix']}`, every token is scored"
    )
    space = "a leading space" if benchmark["leading_space"] else "no leading space"
    ties: dict[str, int] = {}
    for scores in benchmark["tasks"].values():
        for model, number_of_ties in scores["ties"].items():
            ties[model] = ties.get(model, 0) + number_of_ties
    counted = ", ".join(f"{model} {n}" for model, n in ties.items() if n) or "none"
    return f"Sum of log-probabilities; {scored}; {space}. Ties count as wrong (ties: {counted})."


def _environment(report: Mapping[str, Any]) -> list[str]:
    rows = [[key, value] for key, value in flat(report["environment"])]
    if not rows:
        return ["## Environment", "Not recorded."]
    return ["## Environment", table(["what", "value"], rows, left=2)]


def _loading() -> list[str]:
    return ["## Loading the student", "From this run's directory:", loading_snippet("student")]


def loading_snippet(path: str) -> str:
    """Code that loads a model and lets it write."""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}")
ids = tokenizer("The little dog", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_length=60, do_sample=True)[0]))
```"""


def _job(report: Mapping[str, Any]) -> list[str]:
    text = yaml.safe_dump(dict(report["job"]), sort_keys=False, allow_unicode=True).rstrip()
    return ["## Job", f"<details><summary>job.yaml</summary>\n\n```yaml\n{text}\n```\n\n</details>"]


# -- helpers ------------------------------------------------------------------------------------


def _compared(report: Mapping[str, Any]) -> str:
    """The student's dev CE beside the control's and the best teacher's."""
    models = report["models"]
    gains = report["gains"]["student_minus"]
    measured = [name for name, gain in gains.items() if gain["dev_ce"] is not None]
    teachers = [name for name in measured if models[name]["role"] == "teacher"]
    phrases = []
    if "control" in measured and models["control"]["role"] == "control":
        phrases.append(f"{_than(gains['control']['dev_ce'])} its undistilled control")
    if teachers:
        best = min(teachers, key=lambda name: models[name]["dev_ce"])
        role = "the best of its teachers" if len(teachers) > 1 else "its teacher"
        phrases.append(f"{_than(gains[best]['dev_ce'])} {role} ({best})")
    return ", " + " and ".join(phrases) if phrases else ""


def _than(difference: float) -> str:
    if f"{abs(difference):.4f}" == "0.0000":
        return "level with"
    word = "better (lower)" if difference < 0 else "worse (higher)"
    return f"{abs(difference):.4f} {word} than"


def _points_over_control(report: Mapping[str, Any], benchmark: str) -> str:
    gain = report["gains"]["student_minus"].get("control", {})
    points = gain.get("minimal_pairs_points", {}).get(benchmark)
    if points is None:
        return ""
    return f" ({points:+.2f} points against the control)"


def _hardware(hardware: Any) -> str:
    if isinstance(hardware, Mapping):
        return ", ".join(f"{key} {value}" for key, value in flat(hardware))
    return str(hardware) if hardware else f"hardware {MISSING}"
