"""How far a run has come: its state and what it holds enter; what it has not done leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from babyllama_ds.report.metrics import model_of
from babyllama_ds.store import STORE_LOST


def what_is_missing(
    models: Mapping[str, tuple[str, Mapping[str, Any]]],
    evaluated: Collection[str],
    last_logged: Mapping[str, Mapping[str, Any]],
    lost: Mapping[str, Path],
) -> list[str]:
    """Models and measurements that a finished run would have.

    `models` holds role and training's summary by name, the latter empty of a model that is not
    made; `last_logged` the last line of metrics by stage; `lost` where links lead, by model or
    `tokens`, whose store is gone.
    """
    step_of = {model_of(stage): line.get("step") for stage, line in last_logged.items()}
    missing = []
    for name, (role, summary) in models.items():
        title = f"teacher {name}" if role == "teacher" else f"the {role}"
        if name in lost:
            missing.append(f"{title} ({_link_to(lost[name])})")
        elif not summary:
            begun = f" (logged up to step {step_of[name]})" if name in step_of else ""
            missing.append(f"{title}{begun}")
        elif name not in evaluated:
            missing.append(f"the evaluation of {title}")
    if "tokens" in lost:
        missing.append(f"what its text comes to ({_link_to(lost['tokens'])})")
    if not last_logged and any(summary.get("steps") for _, summary in models.values()):
        missing.append("the metrics of its trainings (none are logged here)")
    return missing


def how_it_stands(state: Mapping[str, Any], missing: list[str]) -> dict[str, Any] | None:
    """`state.json` where it says that a run ended early or goes on, and what is missing.

    None for a run that has everything, whatever is being done in it: its report is written while
    it still counts as running.
    """
    status = state.get("status")
    if not missing and status not in ("failed", "stopped"):
        return None
    why = state.get("error")
    if status == "stopped":
        why = ", ".join(str(state[key]) for key in ("reason", "at") if state.get(key))
    return {"status": status, "why": why, "missing": missing}


def _link_to(target: Path) -> str:
    return f"a link to {target}, which is not there: {STORE_LOST}"
