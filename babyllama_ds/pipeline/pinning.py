"""What a job names by a hub id: a job enters; the same leaves, with every id's commit.

The commits that the first start finds are kept in the run directory, and later starts read the
same: a branch of the hub may have moved since. Datasets are pinned as models and tokenizers are:
at another commit the text counts as another, and the run could not go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from babyllama_ds import ranks
from babyllama_ds.corpus.hub import commit_of_dataset
from babyllama_ds.corpus.tokenizer import TOKENIZER
from babyllama_ds.hub import commit_of
from babyllama_ds.models.directories import MODEL
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.corpus import HubCorpus, LoadedTokenizer, MixCorpus
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.models import PretrainedModel
from babyllama_ds.storages import Storages

log = logging.getLogger(__name__)

HUB = "hub"
"""The commits' place among what a run has settled."""


_Named = HubCorpus | LoadedTokenizer | PretrainedModel
"""What has a path that may be a hub id, and a revision."""


def pin_to_commits(job: JobSpec, directory: RunDirectory, storages: Storages) -> JobSpec:
    """The job with the commit of every hub id as its revision. A collective.

    Raises:
        HubError: an id, or a path, that stands for nothing.
        DataError: a dataset that the hub does not give.
    """
    known = ranks.on_rank_zero(directory.settled).get(HUB, {})
    found = ranks.on_rank_zero(lambda: _commits(job, known))
    if found and found != known:
        storages.on_each(lambda: directory.settle(HUB, found))
    return _at(found, job)


def _commits(job: JobSpec, known: dict[str, str]) -> dict[str, str]:
    """Commits by hub id, with the branch or tag where the job names one."""
    found: dict[str, str] = {}
    for where, spec, ask in _named(job):
        name = _name(spec)
        commit = known.get(name) or ask()
        if commit is not None:
            log.info("%s: %s of the hub, at commit %s", where, spec.path, commit)
            found[name] = commit
    return found


def _named(job: JobSpec) -> Iterator[tuple[str, _Named, Callable[[], str | None]]]:
    """What may be of the hub, where the job names it, and how its commit is asked for."""
    for key, corpus in _corpora(job):
        if isinstance(corpus, HubCorpus):
            yield key, corpus, partial(commit_of_dataset, corpus, key=key)
    for where, what, spec in (
        ("tokenizer.path", TOKENIZER, job.tokenizer),
        *((f"teachers.{one.name}.model", MODEL, one.model) for one in job.teachers),
        ("student.model", MODEL, job.student.model),
    ):
        if isinstance(spec, LoadedTokenizer | PretrainedModel):
            yield where, spec, partial(commit_of, spec.path, spec.revision, where=where, what=what)


def _corpora(job: JobSpec) -> Iterator[tuple[str, Any]]:
    yield "corpus", job.corpus
    if isinstance(job.corpus, MixCorpus):
        for number, source in enumerate(job.corpus.sources):
            yield f"corpus.sources[{number}].corpus", source.corpus


def _name(spec: _Named) -> str:
    """As the hub's own addresses tell a dataset from a model of the same name."""
    path = f"datasets/{spec.path}" if isinstance(spec, HubCorpus) else spec.path
    return path if spec.revision is None else f"{path}@{spec.revision}"


def _at(commits: dict[str, str], job: JobSpec) -> JobSpec:
    def at(spec: Any) -> Any:
        known = isinstance(spec, _Named) and _name(spec) in commits
        return spec.model_copy(update={"revision": commits[_name(spec)]}) if known else spec

    def inside(owner: Any, key: str) -> Any:
        return owner.model_copy(update={key: at(getattr(owner, key))})

    corpus = at(job.corpus)
    if isinstance(corpus, MixCorpus):
        sources = tuple(inside(source, "corpus") for source in corpus.sources)
        corpus = corpus.model_copy(update={"sources": sources})
    return job.model_copy(
        update={
            "corpus": corpus,
            "tokenizer": at(job.tokenizer),
            "teachers": tuple(inside(teacher, "model") for teacher in job.teachers),
            "student": inside(job.student, "model"),
        }
    )
