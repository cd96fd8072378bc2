"""What is said of fine-tuning everywhere: a suite's settings and tasks enter, sentences leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from babyllama_ds.spec.evaluation import MEASURED_WITH

TASK_FACTS = ("metric", "examples", "train_examples", "majority")
"""What is the same of a task for every model."""
METRICS = {"accuracy": "accuracy", "f1": "F1", "mcc": "MCC"}
BEST_EPOCH = (
    "Of each fine-tuning's epochs the one that scores best on the learnt task's own validation "
    "examples counts: the published protocol, which flatters every model alike."
)


def chosen_on(task: str) -> str:
    """Whose examples a task's epoch is the best on."""
    trained = MEASURED_WITH.get(task)
    return "the same examples" if trained is None else f"the examples of {trained}"


def notes(settings: Mapping[str, Any]) -> list[str]:
    """How scores came about and what flatters them; what the numbers are."""
    several = settings["seeds"] > 1
    means = f"the mean over {settings['seeds']} seeds" if several else "one seed"
    seeds = " and of the seeds of fine-tuning" if several else ""
    own = "".join(
        f"; {task}: {', '.join(_training(changed))}"
        for task, changed in (settings.get("per_task") or {}).items()
    )
    return [
        "Fine-tuned on each task's training examples, scored on its validation examples "
        f"({means}). {BEST_EPOCH} Settings: {', '.join(_training(settings))}, at most "
        f"{settings['max_tokens']:,} tokens an example{own}.",
        "F1 is of label 1, MCC is Matthews' correlation (from −100 to 100). Majority is the score "
        "of always saying the training examples' most frequent label. The standard error (±) is "
        f"that of the choice of validation examples{seeds}, not of the seed of the model's own "
        "training.",
    ]


def _training(settings: Mapping[str, Any]) -> Iterator[str]:
    """Those of the settings that are given."""
    if "learning_rate" in settings:
        yield f"learning rate {settings['learning_rate']:g}"
    if "batch_size" in settings:
        yield f"{settings['batch_size']:,} examples a batch"
    if "epochs" in settings:
        yield f"{settings['epochs']:,} epochs"
    if "patience" in settings:
        patience = settings["patience"]
        yield (
            "no early end"
            if patience is None
            else f"ended after {patience} epochs without a better score"
        )


def tasks_lacking(suite: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tasks of the report's suite that a model was not measured on, though others were."""
    lacking = {
        model: [task for task, facts in suite["tasks"].items() if model not in facts["score"]]
        for model in suite["score"]
    }
    return {model: tasks for model, tasks in lacking.items() if tasks}


def unlike(suite: Mapping[str, Any]) -> str:
    """That means over different tasks do not compare, where there are such."""
    lacking = tasks_lacking(suite)
    if not lacking:
        return ""
    named = "; ".join(f"{model} lacks {', '.join(tasks)}" for model, tasks in lacking.items())
    return f"The means are not of the same tasks ({named}): compare task by task."
