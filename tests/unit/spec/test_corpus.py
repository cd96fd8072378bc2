"""Corpora of every kind: what fits together, and what is refused at its place with a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from babyllama_ds.errors import JobError
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.resolved import dump_job
from babyllama_ds.spec.shipped import find_job

FILES = {"kind": "files", "train": ["a.txt"], "split": {"kind": "tail"}}
HUB = {"kind": "hub", "path": "owner/name", "split": {"kind": "tail"}}


def job_of(corpus: dict[str, Any], tmp_path: Path) -> Path:
    """The shipped nursery job with another corpus."""
    job = yaml.safe_load(find_job("nursery").read_text())
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**job, "corpus": corpus}))
    return path


def problems(corpus: dict[str, Any], tmp_path: Path) -> list[tuple[str, str, str]]:
    with pytest.raises(JobError) as caught:
        load_job(job_of(corpus, tmp_path))
    return [(one.where, one.got, one.hint or "") for one in caught.value.problems]


def mix(*sources: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"kind": "mix", "sources": list(sources), **keys}


def test_new_keys_leave_a_corpus_of_files_as_it_was(tmp_path: Path) -> None:
    corpus = load_job(job_of(FILES, tmp_path)).corpus
    assert corpus.model_dump(mode="json") == {
        **FILES,
        "split": {"kind": "tail", "fraction": 0.05},
        "column": "text",
        "cleaning": "babylm",
        "documents": "none",
    }


@pytest.mark.parametrize(
    "corpus",
    [
        {**FILES, "column": "body", "cleaning": "published"},
        {**HUB, "name": "en", "revision": "main", "streaming": True},
        {**HUB, "split": {"kind": "held_out"}, "domain_column": "source"},
        mix({"name": "a", "corpus": FILES, "weight": 1}, {"name": "b", "corpus": HUB, "weight": 2}),
        mix({"name": "a", "corpus": FILES, "words": 5}, {"name": "b", "corpus": HUB, "words": 7}),
        mix({"name": "a", "corpus": FILES, "weight": 1, "repeat": True}, words=100),
    ],
)
def test_a_job_of_every_kind_reads_back_as_it_was(corpus: dict[str, Any], tmp_path: Path) -> None:
    job = load_job(job_of(corpus, tmp_path))
    assert job.corpus.kind == corpus["kind"]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_job(job))
    assert load_job(resolved) == job


@pytest.mark.parametrize(
    ("corpus", "where", "got", "hint"),
    [
        (
            {**HUB, "streaming": True, "domain_column": "source"},
            "corpus.domain_column",
            "source",
            "rows are gathered by domain",
        ),
        ({**HUB, "domain_column": "text"}, "corpus.domain_column", "text", ""),
        (
            {**HUB, "split": {"kind": "held_out", "dev": "train"}},
            "corpus.split.dev",
            "train",
            "`split: {kind: tail}` holds out the end",
        ),
        ({**HUB, "cleaning": "published"}, "corpus.cleaning", "'published'", ""),
        (mix({"name": "a", "corpus": FILES}), "corpus.sources[0].weight", "neither", ""),
        (
            mix({"name": "a", "corpus": FILES, "weight": 1, "words": 5}),
            "corpus.sources[0].weight",
            "both",
            "",
        ),
        (
            mix({"name": "a", "corpus": FILES, "weight": 1, "repeat": True}),
            "corpus.words",
            "nothing",
            "sources that all begin again have no end",
        ),
        (
            mix({"name": "a", "corpus": FILES, "words": 5}, words=5),
            "corpus.words",
            "5",
            "",
        ),
        (
            mix(
                {"name": "a", "corpus": FILES, "words": 5},
                {"name": "a", "corpus": HUB, "words": 5},
            ),
            "corpus.sources[1].name",
            "'a'",
            "number 0 has it too",
        ),
        (
            {**FILES, "cleaning": "published", "documents": "lines"},
            "corpus.documents",
            "lines",
            "cleaning: babylm has the same rules and keeps them",
        ),
        (
            mix(
                {"name": "a", "corpus": {**FILES, "documents": "lines"}, "words": 5},
                {"name": "b", "corpus": HUB, "words": 5},
            ),
            "corpus.sources[1].corpus.documents",
            "none",
            "",
        ),
        (
            mix({"name": "a", "corpus": {"kind": "nursery"}, "words": 5}),
            "corpus.sources[0].corpus.kind",
            "'nursery'",
            "",
        ),
    ],
)
def test_what_does_not_fit_together(
    corpus: dict[str, Any], where: str, got: str, hint: str, tmp_path: Path
) -> None:
    ((found_where, found_got, found_hint),) = problems(corpus, tmp_path)
    assert (found_where, found_got) == (where, got)
    assert hint in found_hint


def test_weights_beside_budgets_are_refused_at_each_place(tmp_path: Path) -> None:
    found = problems(
        mix({"name": "a", "corpus": FILES, "words": 5}, {"name": "b", "corpus": HUB, "weight": 2}),
        tmp_path,
    )
    assert [(where, got) for where, got, _ in found] == [
        ("corpus.sources[0].words", "5"),
        ("corpus.sources[1].weight", "2.0"),
    ]
    assert "give all one or the other" in found[0][2]
