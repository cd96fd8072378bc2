"""What `babyllama-ds export` was asked for enters; the places where it was put leave, one by one.

What can be refused without work (options that do not go together, a name, a token, a target) is
refused first; the run is read and checked before anything is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from babyllama_ds import files
from babyllama_ds.errors import Problem, RunError
from babyllama_ds.export.bundle import bundle_run, check_kind
from babyllama_ds.export.finished import FinishedRun, check_outside, open_finished
from babyllama_ds.export.model import CardFacts, export_milestone_dir, export_model_dir
from babyllama_ds.export.results import collect_results


@dataclass(frozen=True, kw_only=True)
class Export:
    """Where a run, or a model of it, is to go."""

    run_dir: Path
    model: str | None = None
    """`student`, `control` or `teachers/NAME`; none: the student."""
    to: Path | None = None
    """A directory for the model."""
    push: str | None = None
    """The hub's repository for the model, `ORG/NAME`."""
    milestones: bool = False
    """Whether what was kept of the model on its way goes there too, each as a branch."""
    private: bool = False
    replace: bool = False
    float32: bool = False
    """Whether the model's weights are cast to fp32."""
    license_id: str | None = None
    language: str | None = None
    bundle: Path | None = None
    """A directory or a `.tar` for the whole run."""
    results: Path | None = None
    """A directory for the results alone, of a run that need not be done."""


def export_run(asked: Export) -> Iterator[str]:
    """Do what was asked; each place is given when it holds what it should.

    Raises:
        RunError: options that do not go together; whatever `collect_results`, `export_model_dir`,
            `push` and `bundle_run` raise.
    """
    _check(asked)
    _check_targets(asked)
    if asked.results is not None:
        collect_results(asked.run_dir, asked.results)
        yield str(asked.results)
    if asked.to is None and asked.push is None and asked.bundle is None:
        return
    run = open_finished(asked.run_dir)
    if asked.to is not None or asked.push is not None:
        yield from _model(asked, run)
    if asked.bundle is not None:
        bundle_run(run, asked.bundle)
        yield str(asked.bundle)


def _check(asked: Export) -> None:
    places = (asked.to, asked.push, asked.bundle, asked.results)
    if all(place is None for place in places):
        raise RunError.of(
            "export",
            got="no place for it",
            expected="--to DIR, --push ORG/NAME, --bundle PATH or --results DIR",
        )
    of_models = {
        "--model": asked.model,
        "--license": asked.license_id,
        "--language": asked.language,
        "--float32": asked.float32,
    }
    of_pushes = {
        "--private": asked.private,
        "--replace": asked.replace,
        "--milestones": asked.milestones,
    }
    needs = []
    if asked.to is None and asked.push is None:
        needs += [(option, "--to or --push") for option, value in of_models.items() if value]
    if asked.push is None:
        needs += [(option, "--push") for option, value in of_pushes.items() if value]
    if needs:
        raise RunError.all_of(
            [Problem(where=option, got=f"no {other}", expected=other) for option, other in needs]
        )


def _check_targets(asked: Export) -> None:
    """Each directory or file is a new one, outside of the run, and of no other's content."""
    given = {"--results": asked.results, "--to": asked.to, "--bundle": asked.bundle}
    targets = {option: target for option, target in given.items() if target is not None}
    if asked.bundle is not None:
        check_kind(asked.bundle)
    for target in targets.values():
        check_outside(asked.run_dir, target)
        files.check_new(target)
    for (one, first), (other, second) in combinations(targets.items(), 2):
        if first.resolve().is_relative_to(second.resolve()) or second.resolve().is_relative_to(
            first.resolve()
        ):
            raise RunError.of(
                other,
                got=f"{second}, where {one} puts something else",
                expected="a place of its own",
            )


def _model(asked: Export, run: FinishedRun) -> Iterator[str]:
    facts = CardFacts(
        license_id=asked.license_id,
        language=asked.language,
        place=asked.push or ".",
        float32=asked.float32,
    )
    model = asked.model or "student"
    if asked.push is None:
        assert asked.to is not None
        export_model_dir(run, model, asked.to, facts)
        yield str(asked.to)
        return
    # Only who pushes needs what `huggingface_hub` brings in.
    from babyllama_ds.export.hub import destination, push

    to = destination(asked.push)
    milestones = run.milestones(model) if asked.milestones else {}
    with tempfile.TemporaryDirectory(prefix="babyllama_ds-") as folder:
        directory = asked.to or Path(folder) / "model"
        export_model_dir(run, model, directory, facts)
        if asked.to is not None:
            yield str(asked.to)
        push(directory, to, private=asked.private, replace=asked.replace)
        yield to.url
        for name, source in milestones.items():
            kept = Path(folder) / name
            export_milestone_dir(run, model, source, kept, facts)
            push(kept, to, private=asked.private, replace=asked.replace, branch=name)
            shutil.rmtree(kept)
            yield f"{to.url}/tree/{name}"
