"""A run's directory enters, the dictionary that becomes `report.json` leaves.

Cross-entropies are nats per token, accuracies shares in [0, 1], as are the scores of fine-tuning
(Matthews' correlations lie in [−1, 1]); differences of both are points, hundredths. What a run does
not have (yet) is null or absent, never guessed.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from babyllama_ds.errors import RunError
from babyllama_ds.files import hash_json, read_json_if_there, read_manifest
from babyllama_ds.report.fine_tuning import TASK_FACTS
from babyllama_ds.report.loss import loss_facts
from babyllama_ds.report.metrics import read_metrics
from babyllama_ds.report.milestones import collect_milestones, milestones_missing
from babyllama_ds.report.scores import scores_of
from babyllama_ds.report.uncertainty import (
    difference_error,
    fine_tuning_difference_error,
    fine_tuning_error,
)
from babyllama_ds.report.unfinished import how_it_stands, what_is_missing
from babyllama_ds.spec.resolved import read_values
from babyllama_ds.store import STORE_LOST, lost_target
from babyllama_ds.teachers.watch import warnings_of

logger = logging.getLogger(__name__)

JOB_KEYS = ("name", "seed", "windows", "teachers", "student", "distillation")
TRAINING_FACTS = (
    "params",
    "train_tokens",
    "seconds",
    "tokens_per_s",
    "flops_per_s",
    "mfu",
    "step_s",
    "steps",
    "planned_steps",
    "ended_by",
    "kept",
    "averaged",
    "best_step",
    "best_dev_ce",
    "final_dev_ce",
    "runs",
)
TASK_SCORES = ("score", "scores", "epochs")
GAINS_NOTE = (
    "Student minus the other model. In dev cross-entropy (nats per token) negative is better; in "
    "minimal pairs (percentage points) positive is better, and ± is the standard error that the "
    "choice of pairs brings."
)
FINE_TUNING_NOTE = (
    "In scores of fine-tuning (points) positive is better, and ± is the standard error that the "
    "choice of validation examples brings, and that of the fine-tuning's seeds where there are "
    "several."
)
ONE_SEED_NOTE = "One run has one seed: a difference says little before it is seen over several."


def collect_report(run_dir: Path) -> dict[str, Any]:
    """Everything that a run says about itself.

    Raises:
        RunError: `job.yaml` is missing or not a resolved job, or a JSON file is garbled.
    """
    job = _read_job(run_dir / "job.yaml")
    evaluations = _read_evaluations(run_dir / "evaluation")
    made = {
        name: (role, _read_optional(folder / "training.json"))
        for name, role, folder in _models_of(job, run_dir)
    }
    models = {
        name: _model(role, training, evaluations.get(name, {}))
        for name, (role, training) in made.items()
    }
    measured = {name: evaluations.get(name, {}) for name in models}
    logged = _logged_steps(run_dir / "metrics.jsonl")
    last_logged = {line["stage"]: line for line in logged}
    student = made["student"][1]
    trainings = {name: training for name, (_, training) in made.items()}
    asked = (job.get("evaluation") or {}).get("milestones") is not None
    return {
        # Of the job, as `JobSpec.run_name`: the folder may be `.`, or a bundle of another name.
        "name": str(job["name"]).replace("{seed}", str(job["seed"])),
        "job": job,
        "job_sha256": hash_json(job),
        # When the student was finished, in UTC.
        "finished": student.get("finished"),
        "unfinished": how_it_stands(
            _read_optional(run_dir / "state.json"),
            [
                *what_is_missing(made, evaluations, last_logged, _lost(job, run_dir)),
                *(milestones_missing(run_dir, trainings) if asked else []),
            ],
        ),
        "environment": _read_optional(run_dir / "environment.json"),
        "data": _data(_read_optional(run_dir / "tokens" / "shards.json")),
        "loss": loss_facts(job),
        "ensemble": _ensemble(
            [teacher["name"] for teacher in job["teachers"]],
            [line for line in logged if line["stage"] == "student"],
            student.get("vocab_size"),
        ),
        # How far a top-k cache's targets are from the exact ones; none: they are exact.
        "topk": student.get("topk"),
        "models": models,
        "weights": {name: _weights(folder) for name, _, folder in _models_of(job, run_dir)},
        "gains": _gains(models, measured),
        "domains": _domains(measured),
        "minimal_pairs": _benchmarks(measured),
        "milestones": collect_milestones(run_dir, trainings) if asked else {},
        "fine_tuning": _suites(measured),
        "last_logged_step": last_logged,
        "samples": _samples(measured),
    }


# -- reading ------------------------------------------------------------------------------------


def _read_job(path: Path) -> dict[str, Any]:
    expected = "the resolved job that every run directory holds"
    try:
        job = read_values(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError.of(
            path,
            got=error.strerror or str(error),
            expected=expected,
            hint="is this the directory of a run, <runs>/<job name>?",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError.of(path, got="text that is not YAML", expected=expected) from error
    missing = [key for key in JOB_KEYS if not isinstance(job, dict) or key not in job]
    if missing:
        raise RunError.of(path, got=f"no {', '.join(missing)}", expected=expected)
    return dict(job)


def _read_evaluations(directory: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: read_json_if_there(path) for path in sorted(directory.glob("*.json"))}
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def _read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without the file, but not with a garbled one."""
    return dict(read_json_if_there(path) or {})


def _logged_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that log a training step, in their order.

    A line that a kill cut short is left out; a resumed run has written its step again.
    """
    logged: list[dict[str, Any]] = []
    for number, record in read_metrics(path):
        if record is None:
            logger.warning("%s:%d: not a JSON object, left out of the report", path, number)
            continue
        if "stage" in record and "loss" in record:
            logged.append(record)
    return logged


# -- the text -----------------------------------------------------------------------------------


def _data(index: Mapping[str, Any]) -> dict[str, Any]:
    """What the cleaned text comes to, by split: tokens, words, bytes, and tokens by domain."""
    return {
        split: {
            **{key: facts[key] for key in ("tokens", "words", "bytes")},
            "domains": _tokens_by_domain(facts["domains"]),
        }
        for split, facts in index.get("splits", {}).items()
    }


def _tokens_by_domain(spans: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """A domain may have many files."""
    tokens: dict[str, int] = {}
    for span in spans:
        tokens[span["domain"]] = tokens.get(span["domain"], 0) + span["stop"] - span["start"]
    return tokens


# -- models -------------------------------------------------------------------------------------


def _models_of(job: Mapping[str, Any], run_dir: Path) -> list[tuple[str, str, Path]]:
    """Name, role and directory of each model of the job, in the order of their training."""
    teachers = [
        (teacher["name"], "teacher", run_dir / "teachers" / teacher["name"])
        for teacher in job["teachers"]
    ]
    control = [("control", "control", run_dir / "control")] if job.get("control") else []
    return [*teachers, *control, ("student", "student", run_dir / "student")]


def _lost(job: Mapping[str, Any], run_dir: Path) -> dict[str, Path]:
    """Where links lead, by model or `tokens`, whose store is not there."""
    links = {name: folder for name, _, folder in _models_of(job, run_dir)}
    links["tokens"] = run_dir / "tokens"
    lost = {name: target for name, link in links.items() if (target := lost_target(link))}
    for name, target in lost.items():
        logger.warning(
            "%s: a link to %s, which is not there, left out of the report; %s",
            links[name],
            target,
            STORE_LOST,
        )
    return lost


def _model(role: str, training: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    facts = {key: training.get(key) for key in TRAINING_FACTS}
    if facts["params"] is None:  # a loaded teacher was not trained here
        facts["params"] = evaluation.get("params")
    suites = evaluation.get("fine_tuning") or {}
    return {
        "role": role,
        **facts,
        **scores_of(evaluation),
        "fine_tuning": {name: suite["score"] for name, suite in suites.items()},
        "fine_tuning_standard_error": {
            name: fine_tuning_error(suite) for name, suite in suites.items()
        },
    }


def _weights(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model that is done."""
    manifest = read_manifest(folder)
    named = manifest.files.items() if manifest else ()
    return {name: facts.sha256 for name, facts in named if name.endswith(".safetensors")}


def _gains(
    models: Mapping[str, Mapping[str, Any]], evaluations: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    others = {name: model for name, model in models.items() if model["role"] != "student"}
    # The control first: it is the comparison that tells what distillation gave.
    order = sorted(others, key=lambda name: others[name]["role"] != "control")
    fine_tuned = [FINE_TUNING_NOTE] if any(m["fine_tuning"] for m in models.values()) else []
    return {
        "note": " ".join([GAINS_NOTE, *fine_tuned, ONE_SEED_NOTE]),
        "student_minus": {
            name: _difference(models["student"], others[name])
            | _difference_of_pairs(evaluations["student"], evaluations[name])
            | _difference_of_suites(evaluations["student"], evaluations[name])
            for name in order
        },
    }


def _difference(student: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both_measured = student["dev_ce"] is not None and other["dev_ce"] is not None
    return {"dev_ce": student["dev_ce"] - other["dev_ce"] if both_measured else None}


def _difference_of_pairs(student: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    one, two = (evaluation.get("minimal_pairs") or {} for evaluation in (student, other))
    both = [name for name in one if name in two]
    errors = {name: difference_error(one[name], two[name]) for name in both}
    return {
        "minimal_pairs_points": {
            name: 100 * (one[name]["accuracy"] - two[name]["accuracy"]) for name in both
        },
        "minimal_pairs_points_standard_error": {
            name: None if error is None else 100 * error for name, error in errors.items()
        },
    }


def _difference_of_suites(student: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Of suites whose tasks are the same: means over different tasks do not compare."""
    one, two = (evaluation.get("fine_tuning") or {} for evaluation in (student, other))
    both = [
        name
        for name in one
        if name in two and one[name]["tasks"].keys() == two[name]["tasks"].keys()
    ]
    errors = {name: fine_tuning_difference_error(one[name], two[name]) for name in both}
    return {
        "fine_tuning_points": {
            name: 100 * (one[name]["score"] - two[name]["score"]) for name in both
        },
        "fine_tuning_points_standard_error": {
            name: None if error is None else 100 * error for name, error in errors.items()
        },
    }


def _domains(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each domain of the development text: a model's cross-entropy, and the tokens it is of."""
    domains: dict[str, Any] = {}
    for model, evaluation in evaluations.items():
        for domain, score in ((evaluation.get("dev") or {}).get("domains") or {}).items():
            domains.setdefault(domain, {})[model] = {"ce": score["ce"], "tokens": score["tokens"]}
    return domains


def _benchmarks(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Per benchmark: how sentences were presented, each term's and task's accuracy by model."""
    benchmarks: dict[str, Any] = {}
    for model, evaluation in evaluations.items():
        for name, scores in (evaluation.get("minimal_pairs") or {}).items():
            benchmark = benchmarks.setdefault(
                name,
                {
                    "prefix": scores["prefix"],
                    "leading_space": scores["leading_space"],
                    "pooled_accuracy": {},
                    "terms": {},
                    "tasks": {},
                },
            )
            benchmark["pooled_accuracy"][model] = scores["pooled_accuracy"]
            for term, score in (scores.get("terms") or {}).items():
                facts = {"tasks": score["tasks"], "pairs": score["pairs"], "accuracy": {}}
                benchmark["terms"].setdefault(term, facts)["accuracy"][model] = score["accuracy"]
            for task, score in scores["tasks"].items():
                facts = {key: score[key] for key in ("pairs", "term", "chance") if key in score}
                entry = benchmark["tasks"].setdefault(task, {**facts, "accuracy": {}, "ties": {}})
                entry["accuracy"][model] = score["accuracy"]
                entry["ties"][model] = score["ties"]
    return benchmarks


def _suites(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Per suite of fine-tuning: its settings, each task's facts, and the scores by model."""
    suites: dict[str, Any] = {}
    for model, evaluation in evaluations.items():
        for name, measured in (evaluation.get("fine_tuning") or {}).items():
            nothing = {"settings": measured["settings"], "score": {}, "tasks": {}}
            suite = suites.setdefault(name, nothing)
            suite["score"][model] = measured["score"]
            for task, of_model in measured["tasks"].items():
                facts = {key: of_model[key] for key in TASK_FACTS}
                by_model: dict[str, Any] = {key: {} for key in TASK_SCORES}
                entry = suite["tasks"].setdefault(task, facts | by_model)
                for key in TASK_SCORES:
                    entry[key][model] = of_model[key]
    return suites


def _samples(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """What each model wrote, with how its texts began; of models that were asked to write."""
    return {
        name: evaluation["samples"]
        for name, evaluation in evaluations.items()
        if evaluation.get("samples")
    }


# -- the ensemble -------------------------------------------------------------------------------


def _ensemble(
    names: Sequence[str], lines: Sequence[Mapping[str, Any]], vocab_size: int | None
) -> dict[str, Any]:
    """What `teachers.watch` measured, a mean over the last tenth of the distillation.

    Empty when nothing was measured. Without the vocabulary's size (training is not done yet)
    nobody can be said to be worse than chance.
    """
    watched = [line for line in lines if "target_entropy" in line]
    tail = [line for line in watched if line["step"] > 0.9 * watched[-1]["step"]]
    if not tail:
        return {}
    mean = {
        key: statistics.fmean(line[key] for line in tail)
        for key in tail[-1]
        if key.startswith(("teacher_", "target_", "student_"))
    }
    return {
        "first_step": tail[0]["step"],
        "last_step": tail[-1]["step"],
        "logged_steps": len(tail),
        "chance_ce": None if vocab_size is None else math.log(vocab_size),
        "teachers": {
            name: {
                measure: mean.get(f"teacher_{measure}/{name}")
                for measure in ("ce", "kl", "agreement")
            }
            for name in names
        },
        "distances": {
            f"{one}/{other}": mean.get(f"teacher_distance/{one}/{other}")
            for one, other in combinations(names, 2)
        },
        **{key: mean.get(key) for key in ("target_entropy", "student_agreement", "student_kl")},
        "warnings": [] if vocab_size is None else warnings_of(mean, names, vocab_size=vocab_size),
    }
