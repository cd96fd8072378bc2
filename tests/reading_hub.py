"""A hub on this machine, as the Hugging Face library reads it: models, commits, branches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

from serving import serving


@dataclass
class ReadingHub:
    """Directories by name and commit; what each branch or tag of a name stands for."""

    url: str = ""
    commits: dict[tuple[str, str], Path] = field(default_factory=dict)
    named: dict[tuple[str, str], str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def publish(self, name: str, directory: Path, *names: str) -> str:
        """A new commit of `name`, which `main` and the names given stand for from now on."""
        commit = hashlib.sha1(f"{name} {len(self.commits)}".encode()).hexdigest()
        self.commits[name, commit] = directory
        for one in ("main", *names):
            self.named[name, one] = commit
        return commit

    def directory(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit that a branch, tag or commit stands for, and what is in it."""
        commit = self.named.get((name, revision), revision)
        directory = self.commits.get((name, commit))
        return None if directory is None else (commit, directory)


class _Handler(BaseHTTPRequestHandler):
    hub: ReadingHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case ["api", "models", owner, model]:
                self._describe(f"{owner}/{model}", "main")
            case ["api", "models", owner, model, "revision", revision]:
                self._describe(f"{owner}/{model}", unquote(revision))
            case [owner, model, "resolve", revision, file]:
                self._send_file(f"{owner}/{model}", unquote(revision), file)
            case _:
                self._answer(404, b"{}", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def _describe(self, name: str, revision: str) -> None:
        found = self._find(name, revision)
        if found is not None:
            commit, directory = found
            siblings = [{"rfilename": path.name} for path in directory.iterdir()]
            facts = {"id": name, "sha": commit, "private": False, "siblings": siblings}
            self._answer(200, json.dumps(facts).encode())

    def _send_file(self, name: str, revision: str, file: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        commit, directory = found
        if not (directory / file).is_file():
            self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data = (directory / file).read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._answer(200, data, ETag=etag, X_Repo_Commit=commit)

    def _find(self, name: str, revision: str) -> tuple[str, Path] | None:
        found = self.hub.directory(name, revision)
        if found is None:
            known = any(one == name for one, _ in self.hub.commits)
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._answer(404, b"{}", X_Error_Code=code)
        return found

    def _answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def reading_hub() -> Iterator[ReadingHub]:
    """One that answers within."""
    hub = ReadingHub()
    with serving(type("HandlerOfOne", (_Handler,), {"hub": hub})) as hub.url:
        yield hub
