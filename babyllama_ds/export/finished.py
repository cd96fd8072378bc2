"""A finished run: its directory enters; its report and its parts leave, each known to be there.

What leads into the store may have lost its store, and a run may not be done: both are errors that
name everything that is missing, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama_ds.errors import Problem, RunError
from babyllama_ds.files import MANIFEST_NAME, read_json
from babyllama_ds.report.collect import collect_report
from babyllama_ds.spec.explain import closest


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that is done, and what its files say of it."""

    path: Path
    report: Mapping[str, Any]
    """As `report.json`."""

    @property
    def models(self) -> list[str]:
        """Where its models lie: `student`, `control`, `teachers/NAME`."""
        job = self.report["job"]
        own = ["student", *(["control"] if job.get("control") else [])]
        return [*own, *(f"teachers/{teacher['name']}" for teacher in job["teachers"])]

    @property
    def parts(self) -> list[str]:
        """Folders that the run cannot do without, each with a manifest of its own."""
        return [*self.models, "tokenizer", "tokens"]

    def model_dir(self, model: str) -> Path:
        """The directory of one of its models.

        Raises:
            RunError: the run has no such model, or it is not there any more.
        """
        if model not in self.models:
            named_so = (one for one in self.models if one.endswith(f"/{model}"))
            near = next(named_so, None) or closest(model, self.models)
            raise RunError.of(
                "--model",
                got=repr(model),
                expected=f"one of {', '.join(self.models)}",
                hint=f"did you mean `{near}`?" if near else None,
            )
        self.check([model])
        return (self.path / model).resolve()

    def check(self, parts: list[str]) -> None:
        """Every one of these parts is there. Raises `RunError` naming all that are not."""
        if problems := list(self._problems(parts)):
            raise RunError.all_of(problems)

    def _problems(self, parts: list[str]) -> Iterator[Problem]:
        for part in parts:
            path = self.path / part
            if (path / MANIFEST_NAME).is_file():
                continue
            if path.is_symlink() and not path.exists():
                got = f"a link to {path.readlink()}, which is not there"
                hint = "bring the store back beside the run, or start the run again: what is "
                hint += "missing is made anew"
            else:
                got = f"no {MANIFEST_NAME}: unfinished" if path.exists() else "nothing"
                hint = "start the run again: what is missing is made anew"
            yield Problem(
                where=str(path), got=got, expected="a finished part of the run", hint=hint
            )


def open_finished(run_dir: Path) -> FinishedRun:
    """The run in `run_dir`.

    Raises:
        RunError: it is not a run's directory, the run is not done, or its files are garbled.
    """
    state_path = run_dir / "state.json"
    if not state_path.exists():
        raise RunError.of(
            run_dir,
            got="no state.json" if run_dir.is_dir() else "no such directory",
            expected="the directory of a run",
            hint="it is <runs>/<job name>",
        )
    state = read_json(state_path)
    status = state.get("status") if isinstance(state, dict) else state
    if status != "done":
        raise RunError.of(
            run_dir,
            got=f"a run that is {status}",
            expected="one that is done",
            hint="wait for it; where it was killed, start it again with the same command"
            if status == "running"
            else "start it again with the same command: it goes on from where it was",
        )
    # Resolved: the report is called by the folder's name, also where the run is given as `.`.
    return FinishedRun(path=run_dir, report=collect_report(run_dir.resolve()))
