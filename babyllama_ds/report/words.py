"""The report's sentences: its dictionary enters, plain text leaves, the same in every page.

`markdown`, `card` and `html` dress them; none of them words a number anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from babyllama_ds.evaluation.minimal_pairs import CHANCE_OF_PAIRS
from babyllama_ds.report import fine_tuning as tuned
from babyllama_ds.report.formatting import MISSING, count, number, percent, points

CAVEAT = (
    "One run, one seed: a difference between two of its models says little before it is seen over "
    "several seeds."
)
LAST_STEP_NOTE = (
    "Training loss; with teachers it is the weighted sum of the section above, so compare models "
    "by CE, not by loss."
)
DOMAINS_NOTE = (
    "A token belongs to the file that it comes from itself, also where its window began in the one "
    "before. The whole is the mean over tokens."
)
ENDED = {"early_stopping": "early stopping", "max_minutes": "max_minutes"}


# -- the result -----------------------------------------------------------------------------------


def result(report: Mapping[str, Any]) -> list[str]:
    """What came out, a sentence for each measure; the first is the dev cross-entropy's if any."""
    student = report["models"]["student"]
    size = f" ({count(student['params'])} parameters)" if student["params"] is not None else ""
    if student["dev_ce"] is None and not student["minimal_pairs"] and not student["fine_tuning"]:
        return [f"The student{size} has not been evaluated."]
    sentences = []
    if student["dev_ce"] is not None:
        sentences.append(
            f"The student{size} reaches a dev cross-entropy of {student['dev_ce']:.4f} "
            f"nats/token{_compared(report)}."
        )
    for benchmark, accuracy in student["minimal_pairs"].items():
        against = _points_over_control(report, "minimal_pairs", benchmark)
        compared = f" ({against})" if against else ""
        # Not of all pairs: a task of few weighs as much as one of many.
        mean = f"{100 * accuracy:.2f} %, the mean over its tasks"
        sentences.append(f"Its accuracy on {benchmark} is {mean}{compared}.")
    for suite, score in student["fine_tuning"].items():
        against = _points_over_control(report, "fine_tuning", suite)
        compared = f" ({against})" if against else ""
        sentences.append(
            f"Fine-tuned on {suite}, it scores {percent(score)} points, the mean over its "
            f"tasks{compared}."
        )
    return sentences


def key_numbers(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The student's measures: value, what it is, and how it stands to the control's ("" without).

    Dev cross-entropy first, then each set of minimal pairs, then each suite of fine-tuning.
    """
    student = report["models"]["student"]
    gain = report["gains"]["student_minus"].get("control", {})
    numbers = []
    if student["dev_ce"] is not None:
        difference = gain.get("dev_ce")
        against = "" if difference is None else f"{_than(difference)} the control"
        numbers.append((f"{student['dev_ce']:.4f}", "dev cross-entropy, nats/token", against))
    for benchmark, accuracy in student["minimal_pairs"].items():
        against = _points_over_control(report, "minimal_pairs", benchmark)
        label = f"accuracy on {benchmark}, mean over tasks"
        numbers.append((f"{100 * accuracy:.2f} %", label, against))
    for suite, score in student["fine_tuning"].items():
        against = _points_over_control(report, "fine_tuning", suite)
        label = f"score on {suite} after fine-tuning, mean over tasks"
        numbers.append((percent(score), label, against))
    return numbers


def _compared(report: Mapping[str, Any]) -> str:
    """The student's dev CE beside the control's and the best teacher's."""
    models = report["models"]
    gains = report["gains"]["student_minus"]
    measured = [name for name, gain in gains.items() if gain["dev_ce"] is not None]
    teachers = [name for name in measured if models[name]["role"] == "teacher"]
    phrases = []
    if "control" in measured:
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


def _points_over_control(report: Mapping[str, Any], measure: str, name: str) -> str:
    """`measure` is `minimal_pairs` or `fine_tuning`, `name` one of its benchmarks or suites."""
    gain = report["gains"]["student_minus"].get("control")
    if gain is None or name not in gain[f"{measure}_points"]:
        return ""
    error = gain[f"{measure}_points_standard_error"][name]
    return f"{points(gain[f'{measure}_points'][name], error)} points against the control"


def trainings(report: Mapping[str, Any]) -> list[str]:
    """What the tables do not show: trainings that ended early, weights that are an average, times
    of other runs' machines."""
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
    sentences += [
        f"{name} was trained in another run, which shares it through the store: its training time "
        "and tokens/s are of that run's machine."
        for name in report["models"]
        if trained_elsewhere(report, name) and not taken_over(report, name)
    ]
    sentences += [
        f"{name} was trained in {runs}, each of which went on where the one before had ended: its "
        "training time and tokens/s are of all of them."
        for name in report["models"]
        if (runs := taken_over(report, name))
    ]
    return [" ".join(sentences)] if sentences else []


def trained_elsewhere(report: Mapping[str, Any], name: str) -> bool:
    """Whether a model came trained out of the store: this run has no part in its training."""
    job, model, logged = report["job"], report["models"][name], report["last_logged_step"]
    if model["runs"]:
        return job["name"].replace("{seed}", str(job["seed"])) not in model["runs"]
    # Of an earlier version, which did not name them, nor kept a teacher's metrics beside it.
    trained = model["role"] == "teacher" and bool(model["steps"])
    return trained and bool(logged) and f"teachers/{name}" not in logged


def taken_over(report: Mapping[str, Any], name: str) -> str:
    """The runs that trained a model one after another; empty where it was one."""
    runs = report["models"][name]["runs"] or []
    return f"the runs {', '.join(runs[:-1])} and {runs[-1]}" if len(runs) > 1 else ""


def speed(report: Mapping[str, Any]) -> str:
    """What the rates are, and those that cannot be."""
    note = (
        "GFLOP/s of the matrix products that training has to compute; mfu is their part of what "
        "this machine's bf16 products were measured to reach at the same shapes."
    )
    beyond = [name for name, model in report["models"].items() if (model["mfu"] or 0.0) > 1]
    if not beyond:
        return note
    return (
        f"{note} That of {', '.join(beyond)} is above 1, which cannot be: the machine was busy "
        "with other work while its products were measured, so leave it aside."
    )


# -- what it belongs to ---------------------------------------------------------------------------


def origin(report: Mapping[str, Any]) -> str:
    """What the numbers belong to: commit, job, tokenizer, text (as tokens), seed, hardware."""
    environment = report["environment"]
    made_from = environment.get("fingerprints") or {}
    hashes = {"job": report["job_sha256"], **{k: made_from.get(k) for k in ("tokenizer", "tokens")}}
    return (
        f"commit {environment.get('commit') or MISSING} · "
        + "".join(f"{what} sha256 {(h or MISSING)[:12]} · " for what, h in hashes.items())
        + f"seed {report['job']['seed']} · {_hardware(environment.get('hardware'))}"
    )


def _hardware(hardware: Any) -> str:
    """`environment.describe_environment`'s, in a line: the card, if one, and its host."""
    if not isinstance(hardware, Mapping):
        return str(hardware) if hardware else f"hardware {MISSING}"
    known = {key: hardware.get(key) or MISSING for key in ("cores", "host_cpu", "memory_gib")}
    host = "{cores} cores of {host_cpu}, {memory_gib} GiB".format_map(known)
    card = hardware.get("cuda_device")
    return f"{card}, beside {host}" if card else host


# -- teachers and loss ----------------------------------------------------------------------------


def topk_error(error: Mapping[str, Any]) -> str:
    """What it cost to keep the teachers' most likely tokens only."""
    return (
        f"The teachers' targets are approximate, the top-k of their mixture (k {error['k']}, all "
        f"other tokens one bucket). With the student's final weights, on {error['windows']} "
        f"windows of the training text, the KL is {error['topk_kl']:.4g} nats/token instead of "
        f"{error['exact_kl']:.4g} (relative error {error['relative_kl_error']:.2g}), and its "
        "gradient with respect to the student's hidden states has a cosine of "
        f"{error['gradient_cosine']:.4f} with the exact one."
    )


def ensemble_sentences(ensemble: Mapping[str, Any]) -> list[str]:
    """Where the means were taken, the targets, the student's agreement, teachers' distances."""
    chance = ensemble["chance_ce"]
    return [
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


# -- measurements ---------------------------------------------------------------------------------


def presentation(benchmark: Mapping[str, Any]) -> str:
    """How sentences were presented and scored, how often none won, and what guessing gives."""
    scored = (
        "no prefix token, so the first token is not scored"
        if benchmark["prefix"] is None
        else f"behind the prefix token `{benchmark['prefix']}`"
    )
    space = "a leading space" if benchmark["leading_space"] else "no leading space"
    ties: dict[str, int] = {}
    for scores in benchmark["tasks"].values():
        for model, number_of_ties in scores["ties"].items():
            ties[model] = ties.get(model, 0) + number_of_ties
    counted = ", ".join(f"{model} {n}" for model, n in ties.items() if n) or "none"
    return (
        f"Sum of log-probabilities; {scored}; {space}. Ties count as wrong (ties: {counted}). "
        f"Guessing gives {guessing(benchmark):.4g} %."
    )


def guessing(benchmark: Mapping[str, Any]) -> float:
    """The accuracy (%) of guessing, like a model's a mean over tasks."""
    tasks = benchmark["tasks"].values()
    return 100 * sum(map(chance_of, tasks)) / len(tasks)


def chance_of(task: Mapping[str, Any]) -> float:
    """The share of a task's items that guessing gets right."""
    chance: float = task.get("chance", CHANCE_OF_PAIRS)
    return chance


def fine_tuning(suite: Mapping[str, Any]) -> list[str]:
    """How the scores of a suite came about, and whether their means compare."""
    return [*tuned.notes(suite["settings"]), *filter(None, [tuned.unlike(suite)])]


# -- what is missing ------------------------------------------------------------------------------


def unfinished(report: Mapping[str, Any]) -> list[str]:
    """What the run has not done (yet), a sentence each; nothing for a run that is done."""
    facts = report["unfinished"]
    if facts is None:
        return []
    # An error has lines for its hint and for each problem more: none of them runs into another.
    lines = [line.strip() for line in (facts["why"] or "").splitlines() if line.strip()]
    why, *more = lines or ["it does not say why"]
    why = why.rstrip(". ")
    state = {
        "failed": f"The run failed: {why}.",
        "stopped": f"The run was stopped: {why}. The same command goes on from there.",
        # A run that is killed cannot say so.
        "running": "The run was going on when this was written, or had been killed before.",
    }.get(facts["status"], "The run is not complete.")
    return [state, *more, *(f"Missing: {missing}." for missing in facts["missing"])]
