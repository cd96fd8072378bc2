"""TensorBoard's part of a finished run: the report's dictionary enters; event files leave.

Beside the scalars of a model's training, in the same folder, stand its hyperparameters, its final
measures (`final/…`: the dashboard HPARAMS compares models and runs by them) and the texts that it
wrote. Written once: a later report replaces the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from babyllama_ds.report.milestones import measures as measures_of_milestone
from babyllama_ds.rundir import BOARDS_NAME

SUFFIX = ".final"
"""How a file of this module ends, to be found again."""

Report = Mapping[str, Any]
HParams = dict[str, str | float]


def write_boards(run_dir: Path, report: Report) -> None:
    """An event file for each model, `tensorboard/<stage>/`."""
    settings = {name: hyperparameters(report, name) for name in report["models"]}
    measures = {name: final_measures(report, name) for name in report["models"]}
    # The dashboard has the columns of the first experiment that it finds: all tell all of them.
    columns = {key: value for of_model in settings.values() for key, value in of_model.items()}
    metrics = {key: 0.0 for of_model in measures.values() for key in of_model}
    experiment, _, _ = hparams(columns, metrics)
    for name, model in report["models"].items():
        folder = run_dir / BOARDS_NAME / _stage(name, model["role"])
        old = [*folder.glob(f"*{SUFFIX}")]
        _, start, end = hparams(settings[name], measures[name])
        with SummaryWriter(str(folder), filename_suffix=SUFFIX) as board:
            for summary in (experiment, start, end):
                board.file_writer.add_summary(summary)
            step = model["steps"] or 0
            for key, value in measures[name].items():
                board.add_scalar(key, value, step)
            for milestone in report["milestones"].get(name, ()):
                for key, value in measures_of_milestone(milestone).items():
                    board.add_scalar(f"milestones/{key}", value, milestone["steps"])
            for number, sample in enumerate(report["samples"].get(name, ()), start=1):
                board.add_text(f"sample/{number}", _verbatim(sample), step)
        for path in old:
            path.unlink(missing_ok=True)


def hyperparameters(report: Report, name: str) -> HParams:
    """What the job says of a model, as key paths: its own part, its training's, the loss.

    Named alike for all models, so that they can be compared; what is off is left out.
    """
    job, role = report["job"], report["models"][name]["role"]
    if role == "teacher":
        own = next(teacher for teacher in job["teachers"] if teacher["name"] == name)
    else:
        of_control = (job.get("control") or {}).get("training") if role == "control" else None
        own = {**job["student"], "training": of_control or job["student"]["training"]}
    chosen = {
        "role": role,
        "seed": job["seed"],
        "model": own["model"],
        "training": own.get("training"),
        "windows": job["windows"],
        "distillation": job["distillation"] if role == "student" else None,
    }
    return dict(_flat(chosen))


def final_measures(report: Report, name: str) -> dict[str, float]:
    """The finished model's measures; accuracies and scores are not in per cent."""
    model = report["models"][name]
    scores = {key: model[key] for key in ("dev_ce", "perplexity", "bits_per_byte")}
    scores |= {f"minimal_pairs/{pairs}": value for pairs, value in model["minimal_pairs"].items()}
    scores |= {f"fine_tuning/{suite}": value for suite, value in model["fine_tuning"].items()}
    return {f"final/{key}": value for key, value in scores.items() if value is not None}


def _stage(name: str, role: str) -> str:
    return f"teachers/{name}" if role == "teacher" else name


def _flat(value: Any, path: str = "") -> list[tuple[str, str | float]]:
    if isinstance(value, Mapping):
        return [
            pair
            for key, inner in value.items()
            for pair in _flat(inner, f"{path}.{key}" if path else key)
        ]
    if value is None:
        return []
    plain = isinstance(value, float | int) and not isinstance(value, bool)
    return [(path, value if plain else str(value))]


def _verbatim(sample: Mapping[str, str]) -> str:
    """Markdown that shows a text as it is: TensorBoard would set asterisks and hashes."""
    text = f"{sample['prompt']}▸{sample['text']}"
    return "\n".join(f"    {line}" for line in text.splitlines())
