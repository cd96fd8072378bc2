"""What a job names by a hub id: a job enters; the same leaves, with every id's commit.

The commits that the first start finds are kept in the run directory, and later starts read the
same: a branch of the hub may have moved since.
"""

from __future__ import annotations

import logging
from typing import Any

from babyllama_ds import ranks
from babyllama_ds.corpus.tokenizer import TOKENIZER
from babyllama_ds.hub import commit_of
from babyllama_ds.models.directories import MODEL
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.corpus import LoadedTokenizer, TokenizerSpec
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.models import ModelSpec, PretrainedModel
from babyllama_ds.storages import Storages

log = logging.getLogger(__name__)

HUB = "hub"
"""The commits' place among what a run has settled."""


def pin_to_commits(job: JobSpec, directory: RunDirectory, storages: Storages) -> JobSpec:
    """The job with the commit of every hub id as its revision. A collective.

    Raises:
        HubError: an id, or a path, that stands for nothing.
    """
    known = ranks.on_rank_zero(directory.settled).get(HUB, {})
    found = ranks.on_rank_zero(lambda: _commits(job, known))
    if found and found != known:
        storages.on_each(lambda: directory.settle(HUB, found))
    return _at(found, job)


def _commits(job: JobSpec, known: dict[str, str]) -> dict[str, str]:
    """Commits by hub id, with the branch or tag where the job names one."""
    found: dict[str, str] = {}
    named: list[tuple[str, str, TokenizerSpec | ModelSpec]] = [
        ("tokenizer.path", TOKENIZER, job.tokenizer),
        *((f"teachers.{one.name}.model", MODEL, one.model) for one in job.teachers),
        ("student.model", MODEL, job.student.model),
    ]
    for where, what, spec in named:
        if not isinstance(spec, LoadedTokenizer | PretrainedModel):
            continue
        name = _name(spec)
        commit = known.get(name) or commit_of(spec.path, spec.revision, where=where, what=what)
        if commit is not None:
            log.info("%s: %s of the hub, at commit %s", where, spec.path, commit)
            found[name] = commit
    return found


def _name(spec: LoadedTokenizer | PretrainedModel) -> str:
    return spec.path if spec.revision is None else f"{spec.path}@{spec.revision}"


def _at(commits: dict[str, str], job: JobSpec) -> JobSpec:
    def at(spec: Any) -> Any:
        known = isinstance(spec, LoadedTokenizer | PretrainedModel) and _name(spec) in commits
        return spec.model_copy(update={"revision": commits[_name(spec)]}) if known else spec

    def model_at(owner: Any) -> Any:
        return owner.model_copy(update={"model": at(owner.model)})

    return job.model_copy(
        update={
            "tokenizer": at(job.tokenizer),
            "teachers": tuple(map(model_at, job.teachers)),
            "student": model_at(job.student),
        }
    )
