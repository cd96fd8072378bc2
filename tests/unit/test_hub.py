"""Names of models and tokenizers: what is here, what the hub has, and what neither has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from babyllama_ds import hub as names
from babyllama_ds.errors import HubError, Problem
from babyllama_ds.spec.corpus import LoadedTokenizer
from babyllama_ds.spec.models import PretrainedModel
from reading_hub import ReadingHub, reading_hub

NAME = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library's cache, in a folder of this test; nothing that an earlier one was told."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    names._asked.cache_clear()
    yield tmp_path / "cache"
    names._asked.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadingHub]:
    with reading_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port at which nobody answers."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def commit_of(name: str, revision: str | None = None) -> str | None:
    return names.commit_of(name, revision, where="here", what="a model")


def refused(name: str, revision: str | None = None) -> Problem:
    with pytest.raises(HubError) as caught:
        commit_of(name, revision)
    (problem,) = caught.value.problems
    assert problem.where == "here"
    return problem


def in_cache(cache: Path, name: str, commit: str, branch: str = "main") -> None:
    """As the library leaves a model behind."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / branch).write_text(commit)


def test_what_is_here_has_no_commit(no_hub: None, tmp_path: Path) -> None:
    (tmp_path / "someone" / "model").mkdir(parents=True)
    assert commit_of(NAME) is None
    assert commit_of(str(tmp_path)) is None
    assert refused(NAME, "v1") == Problem(
        where="here",
        got="revision v1 for someone/model, a path that is here",
        expected="no revision: only what is on the hub has commits",
    )


@pytest.mark.parametrize("name", ["./model", "../model", "/a/model", "~/no-such-model", "a/b/c"])
def test_a_path_that_is_not_here_is_not_asked_of_the_hub(hub: ReadingHub, name: str) -> None:
    problem = refused(name)
    assert (problem.got, problem.hint) == (f"{name}: no such file or directory", None)
    assert hub.asked == []


def test_a_path_that_cannot_be_looked_at(hub: ReadingHub) -> None:
    name = "x" * 300
    assert refused(name).got == f"{name}: File name too long"
    assert hub.asked == []


def test_a_job_may_write_its_home_as_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/mara")
    for spec in (PretrainedModel, LoadedTokenizer):
        assert spec(kind="pretrained", path="~/elder").path == "/home/mara/elder"
        assert spec(kind="pretrained", path=NAME).path == NAME


def test_the_hub_names_the_commit_of_a_branch_and_of_a_tag(hub: ReadingHub, tmp_path: Path) -> None:
    first = hub.publish(NAME, tmp_path, "v1")
    second = hub.publish(NAME, tmp_path)
    assert commit_of(NAME) == second
    assert commit_of(NAME, "v1") == first != second


def test_the_hub_is_asked_once_in_a_process(hub: ReadingHub, tmp_path: Path) -> None:
    first = hub.publish(NAME, tmp_path)
    assert commit_of(NAME) == first
    hub.publish(NAME, tmp_path)
    assert commit_of(NAME) == first
    assert len(hub.asked) == 1


def test_a_commit_is_not_asked_for(hub: ReadingHub) -> None:
    assert commit_of(NAME, COMMIT) == COMMIT
    assert hub.asked == []


def test_what_the_hub_does_not_have(hub: ReadingHub, tmp_path: Path) -> None:
    assert refused(NAME).got == (
        "someone/model: no such directory here; as a hub id: there is none of this name, or it is "
        "private"
    )
    hub.publish(NAME, tmp_path)
    problem = refused(NAME, "v9")
    assert problem.got.endswith("as a hub id: it has no commit, tag or branch v9")
    assert problem.expected == "a model"


def test_without_a_network_the_cache_counts_and_is_told(
    no_hub: None, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problem = refused(NAME)
    assert "as a hub id: " in problem.got
    assert "\n" not in problem.got
    assert problem.hint is not None
    assert problem.hint.startswith("is the path right?")
    in_cache(cache, NAME, COMMIT)
    assert commit_of(NAME) == COMMIT
    (told,) = caplog.messages
    assert told.startswith(f"{NAME}: ")
    assert told.endswith(f"commit {COMMIT} is taken, from the hub's cache here")


def test_a_malformed_name_is_told(hub: ReadingHub) -> None:
    assert "as a hub id: " in refused("a model").got
