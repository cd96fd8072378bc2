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
from babyllama_ds.rundir import MILESTONES_NAME
from babyllama_ds.spec.explain import closest
from babyllama_ds.store import STORE_LOST, lost_target

ANEW = "start the run again: what is missing is made anew"


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

    @property
    def kept(self) -> list[str]:
        """Milestones that are there, of all models. The run can do without."""
        found = self.path.glob(f"{MILESTONES_NAME}/*/*/{MANIFEST_NAME}")
        return sorted(str(manifest.parent.relative_to(self.path)) for manifest in found)

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

    def milestones(self, model: str) -> dict[str, Path]:
        """What was kept of a model on its way, by name (`chck_1M`), in the order of training.

        Raises:
            RunError: nothing was, or some of it is not there any more.
        """
        kept = read_json(self.model_dir(model) / "training.json").get("milestones", {})
        if not kept:
            raise RunError.of(
                "--milestones",
                got=f"a {model} of which nothing was kept on its way",
                expected="a student or control with `milestones` in its job",
                hint=f"train it under another name, with {model}.milestones=babylm"
                if model in ("student", "control")
                else None,
            )
        parts = [f"{MILESTONES_NAME}/{model}/{name}" for name in kept]
        self.check(parts, hint=f"it is made again only with all of {self.path / model}")
        return {name: self.path / part for name, part in zip(kept, parts, strict=True)}

    def check(self, parts: list[str], *, hint: str = ANEW) -> None:
        """Every one of these parts is there. Raises `RunError` naming all that are not."""
        if problems := list(self._problems(parts, hint)):
            raise RunError.all_of(problems)

    def _problems(self, parts: list[str], hint: str) -> Iterator[Problem]:
        for part in parts:
            path = self.path / part
            if (path / MANIFEST_NAME).is_file():
                continue
            if target := lost_target(path):
                got, how = f"a link to {target}, which is not there", STORE_LOST
            else:
                got = f"no {MANIFEST_NAME}: unfinished" if path.exists() else "nothing"
                how = hint
            yield Problem(where=str(path), got=got, expected="a finished part of the run", hint=how)


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
    return FinishedRun(path=run_dir, report=collect_report(run_dir))


def check_outside(run_dir: Path, target: Path) -> None:
    """`target` is no place inside the run, some of whose folders are links into the store.

    Raises:
        RunError: it is.
    """
    as_written = target.absolute().is_relative_to(run_dir.absolute())
    if as_written or target.resolve().is_relative_to(run_dir.resolve()):
        raise RunError.of(target, got="a place inside the run", expected="one outside of it")
