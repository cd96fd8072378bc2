"""What a model or tokenizer is called: a name enters; what it is here, or its commit on the hub.

A name is a path, or an id of the Hugging Face hub. Of an id the hub is asked once, for the commit
that its branch or tag stands for, and everything is read at that commit: a branch may move while a
run goes on.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path

from babyllama_ds.errors import HubError, first_line

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""How long the hub may take to name a commit."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def can_only_be_local(name: str) -> bool:
    """Whether it cannot be a hub id, which is `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def commit_of(name: str, revision: str | None = None, *, where: str, what: str) -> str | None:
    """The commit of a hub id, at a branch, tag or commit (none: the main branch); none of a path.

    `what` names what was expected, at the key `where`.

    Raises:
        HubError: nothing here, and nothing that the hub would give under this name.
    """
    if _is_here(name, where=where, what=what):
        if revision is not None:
            raise HubError.of(
                where,
                got=f"revision {revision} for {name}, a path that is here",
                expected="no revision: only what is on the hub has commits",
            )
        return None
    if can_only_be_local(name):
        raise HubError.of(where, got=f"{name}: no such file or directory", expected=what)
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        return _asked(name, revision)
    except _NotThereError as reason:
        raise HubError.of(
            where,
            got=f"{name}: no such directory here; as a hub id: {reason}",
            expected=what,
            hint="is the path right? On the hub, a private or gated one needs `hf auth login`",
        ) from reason


def _is_here(name: str, *, where: str, what: str) -> bool:
    """Whether a path is there. `HubError` where that cannot be told."""
    try:
        return Path(name).exists()
    except OSError as error:
        raise HubError.of(where, got=f"{name}: {error.strerror}", expected=what) from error


class _NotThereError(Exception):
    """Why the hub has no commit for a name."""


@cache
def _asked(name: str, revision: str | None) -> str:
    """By the hub, or where it cannot be reached, by its library's cache. Once in a process."""
    from huggingface_hub import HfApi, errors

    try:
        commit: str | None = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S).sha
    except errors.RevisionNotFoundError as error:
        raise _NotThereError(f"it has no commit, tag or branch {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise _NotThereError("there is none of this name, or it is private") from error
    except Exception as error:  # the library and its HTTP client raise what they like
        reason = first_line(error)
        if (commit := _cached(name, revision)) is None:
            raise _NotThereError(reason) from error
        log.warning("%s: %s; commit %s is taken, from the hub's cache here", name, reason, commit)
    assert commit is not None, "the hub names the commit that it describes"
    return commit


def _cached(name: str, revision: str | None) -> str | None:
    """The commit that the hub's library would read without a network."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
