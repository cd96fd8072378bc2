"""An exported model directory enters; a repository of the Hugging Face hub leaves that holds it.

Exactly the files that the directory's manifest names are sent, in one commit: a push that fails
has published nothing. Afterwards the hub is asked what it has, and its hashes are held to the
manifest's, so that what can be downloaded is what was exported. A repository that holds something
else is left alone unless its content is to be replaced.

The token and the hub's address are those of `huggingface_hub`: `HF_TOKEN` or `hf auth login`, and
`HF_ENDPOINT`, which is read when that library is imported.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from babyllama_ds import __version__, files
from babyllama_ds.errors import RunError
from babyllama_ds.export.model import check_names

log = logging.getLogger(__name__)

HUBS_OWN = (".gitattributes",)
"""What a new repository is born with."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A repository that a token may write to, as far as can be known without asking."""

    repo_id: str
    token: str
    endpoint: str

    @property
    def url(self) -> str:
        """Where people find it."""
        return f"{self.endpoint}/{self.repo_id}"


def destination(repo_id: str) -> Destination:
    """The repository `ORG/NAME`, with the token of this user.

    Raises:
        RunError: a malformed name, no token, or `HF_HUB_OFFLINE`.
    """
    try:
        validate_repo_id(repo_id)
        well_formed = repo_id.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise RunError.of(
            "--push",
            got=repr(repo_id),
            expected="ORG/NAME, of letters, digits, '-', '_', '.', at most 96 in all",
            hint="ORG is your user name or an organisation that you may write to",
        )
    endpoint = str(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        raise RunError.of(
            "--push",
            got="HF_HUB_OFFLINE, which is set",
            expected="leave to reach the hub",
            hint="unset it, or give --to DIR and upload that from another machine",
        )
    token = get_token()
    if token is None:
        raise RunError.of(
            "--push",
            got="no token",
            expected="one that may write",
            hint=f"`hf auth login`, or HF_TOKEN=…; {endpoint}/settings/tokens makes them",
        )
    return Destination(repo_id=repo_id, token=token, endpoint=endpoint)


def push(
    directory: Path, to: Destination, *, private: bool, replace: bool, branch: str | None = None
) -> bool:
    """Make the hub's repository hold what `directory` holds. Returns whether it did not yet.

    Args:
        private: a new repository is private, and a public one that is there is refused.
        branch: where, of a repository that is there; one that is not begins as empty as the
            repository began. None: `main`, of a repository that is made if it is not there.
        replace: other content that is there makes room, in the same commit; it stays in the
            repository's history.

    Raises:
        RunError: the directory is damaged, the repository holds something else, the hub refuses,
            cannot be reached, or has something else afterwards.
    """
    manifest = files.verify_manifest(directory)
    check_names(directory, manifest.files)
    ours = {name: _hashes(directory / name, facts) for name, facts in manifest.files.items()}
    api = HfApi(
        token=to.token,
        endpoint=to.endpoint,
        library_name="babyllama_ds",
        library_version=__version__,
    )
    place = to.url if branch is None else f"{to.url}, branch {branch}"
    with _told("making", place, refused=NOTHING_SENT, cut_off=NOTHING_SENT):
        if branch is None:
            api.create_repo(to.repo_id, private=private or None, exist_ok=True)
        else:
            first = api.list_repo_commits(to.repo_id)[-1].commit_id
            api.create_branch(to.repo_id, branch=branch, revision=first, exist_ok=True)
        there = api.repo_info(to.repo_id, revision=branch, files_metadata=True)
    theirs = _files_there(there)
    if private and not there.private:
        raise RunError.of(
            to.url,
            got="a public repository",
            expected="a private one, or none",
            hint="choose another name, make it private on the hub, or leave --private out",
        )
    if not _differing(ours, theirs) and theirs.keys() <= ours.keys():
        return False
    if theirs and not replace:
        names = sorted(theirs)
        more = ", …" if len(names) > 3 else ""
        raise RunError.of(
            place,
            got=f"a repository with other content ({', '.join(names[:3])}{more})",
            expected="a new one, or one with nothing in it",
            hint="choose another name; or give --replace: one commit puts this model in its "
            "place, and what was there stays in the repository's history",
        )
    with _told("uploading to", place, refused=NOTHING_SENT, cut_off=PERHAPS_SENT):
        commit = api.create_commit(
            to.repo_id,
            [
                *(CommitOperationDelete(name) for name in sorted(theirs.keys() - ours.keys())),
                *(CommitOperationAdd(name, directory / name) for name in sorted(ours)),
            ],
            revision=branch,
            commit_message=f"Model exported by babyllama_ds {__version__}",
            parent_commit=there.sha,  # whoever came in between is not written over
        )
    with _told("looking at", place, refused=SENT, cut_off=SENT):
        arrived = api.repo_info(to.repo_id, revision=commit.oid, files_metadata=True)
    if wrong := _differing(ours, _files_there(arrived)):
        raise RunError.of(
            f"{place} at {commit.oid}",
            got=f"other content than was sent, or none, in {', '.join(wrong)}",
            expected="the files of the manifest, byte for byte",
            hint="does a .gitignore there leave them out? Otherwise push again, with --replace",
        )
    log.info("pushed %d files to %s", len(ours), commit.commit_url)
    return True


# -- what is where --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hashes:
    """A file as git knows it: large ones by their SHA-256, the others by their blob."""

    sha256: str
    blob: str


def _hashes(path: Path, facts: files.FileFacts) -> _Hashes:
    digest = hashlib.sha1(f"blob {facts.bytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return _Hashes(facts.sha256, digest.hexdigest())


def _files_there(info: Any) -> dict[str, str]:
    """What the hub says that it holds: a file's SHA-256 if it is large, else its blob."""
    return {
        one.rfilename: one.lfs.sha256 if one.lfs is not None else one.blob_id
        for one in info.siblings or ()
        if one.rfilename not in HUBS_OWN
    }


def _differing(ours: dict[str, _Hashes], theirs: dict[str, str]) -> list[str]:
    """Names of our files that are not there as they are here."""
    return sorted(
        name
        for name, hashes in ours.items()
        if theirs.get(name) not in (hashes.sha256, hashes.blob)
    )


# -- what can go wrong ----------------------------------------------------------------------------

EXPECTED = {
    400: ("what the hub takes", None),
    401: ("a token that the hub knows", "`hf auth login`, or another HF_TOKEN"),
    403: (
        "leave to write there",
        "the token must be allowed to write for ORG: see the hub's settings, tokens",
    ),
    404: ("a user or organisation of that name", "is ORG right, and does the token see it?"),
    409: ("no other change at the same time", "look at what is there, and push again"),
    412: ("no other change at the same time", "look at what is there, and push again"),
}
"""By the hub's status: what was expected, and a hint."""

NOTHING_SENT = "no file was published"
PERHAPS_SENT = "push again: what has arrived is recognised, and is not sent twice"
SENT = "the files were sent; push again to look anew"


@contextmanager
def _told(doing: str, place: str, *, refused: str, cut_off: str) -> Iterator[None]:
    """What `huggingface_hub` raises, as one of ours.

    `refused` and `cut_off` say how things stand after the hub's no, and without an answer.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        response = _response(error)
        if response is None:
            got, expected = f"{type(error).__name__}: {_text(error)}", "an answer of the hub"
            hint: str | None = "is the network up? Otherwise --to DIR, and upload from elsewhere"
        else:
            got = f"{response.status_code}: {getattr(error, 'server_message', '') or _text(error)}"
            fallback = ("the hub to take it", "try again later")
            expected, hint = EXPECTED.get(response.status_code, fallback)
        stands = cut_off if response is None else refused
        raise RunError.of(
            f"{doing} {place}",
            got=got,
            expected=expected,
            hint=f"{hint}; {stands}" if hint else stands,
        ) from error


def _response(error: BaseException | None) -> Any:
    """The hub's answer that led to an error, however deep it lies; none: there was no answer."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__ or error.__context__
    return None


def _text(error: BaseException) -> str:
    """An error's text in one line of some length."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if len(text) <= 300 else f"{text[:299]}…"
