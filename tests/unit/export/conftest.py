"""A finished run without its training: every file that a run leaves, links into a store included.

And a hub: what `huggingface_hub` asks of the real one to make a repository, look at it and commit
to it, kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama_ds import files
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.corpus.writing import write_shards
from babyllama_ds.models.export import export_model
from babyllama_ds.report.write import write_report
from babyllama_ds.spec.corpus import TrainedTokenizer
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.resolved import dump_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.store import Store, link_entry
from serving import serving

VOCAB = 288
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENVIRONMENT = {
    "commit": "0123abc",
    "versions": {"babyllama_ds": "0.0.1", "torch": "2.13.0"},
    "hardware": {"cores": 2},
    "ranks": 2,
    "device": "cpu",
    "precision": "bf16",
    "seeds": {"student": 5, "teachers/gpt2": 6, "teachers/llama": 7},
    "fingerprints": {"job": "a" * 64, "tokenizer": "b" * 64, "tokens": "c" * 64},
}


def lines() -> Iterator[str]:
    words = ("the", "little", "dog", "sees", "a", "red", "ball", "and", "runs", "to", "it")
    for i in range(200):
        yield " ".join(words[(3 * i + j * j) % len(words)] for j in range(8)) + "\n"


def evaluation(ce: float, accuracy: float) -> dict[str, Any]:
    task = {"accuracy": accuracy, "pairs": 10, "ties": 0, "term": None}
    return {
        "params": 999,
        "dev": {"ce": ce, "perplexity": 2.0, "bits_per_byte": 1.5, "tokens": 9, "windows": 1},
        "minimal_pairs": {
            "nursery": {
                "accuracy": accuracy,
                "pooled_accuracy": accuracy,
                "tasks": {"agreement": task},
                "prefix": None,
                "leading_space": True,
            }
        },
    }


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """The runs directory: a store, and `nursery-1` beside it."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    run, store = runs / "nursery-1", Store(runs / "store")
    run.mkdir(parents=True)
    tokenizer_dir = store.build(
        "tokenizers",
        "t1",
        lambda folder: train_tokenizer(
            TrainedTokenizer(kind="bpe", vocab_size=VOCAB), lines(), folder
        ),
    )
    tokenizer = load_tokenizer(str(tokenizer_dir))
    train = [(domain, lines()) for domain in ("stories", "talk", "talk")]
    texts = {"train": train, "dev": [("stories", lines())]}
    tokens_dir = store.build("tokens", "k1", lambda folder: write_shards(folder, texts, tokenizer))
    link_entry(tokenizer_dir, run / "tokenizer")
    link_entry(tokens_dir, run / "tokens")

    def export(kind: str, folder: Path, seed: int) -> None:
        model = tiny_model(kind, seed=seed, vocab_size=VOCAB, **SPECIAL)
        summary = {"steps": 4, "train_tokens": 128, "seconds": 3.5, "tokens_per_s": 36.6}
        export_model(model, tokenizer_dir, folder, summary, dtype=torch.bfloat16)

    def export_teacher(name: str, folder: Path, seed: int) -> None:
        export(name, folder, seed)
        line = {"stage": f"teachers/{name}", "step": 4, "loss": 5.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    for seed, name in enumerate(("gpt2", "llama")):
        entry = store.build("teachers", name, lambda f, n=name, s=seed: export_teacher(n, f, s))
        link_entry(entry, run / "teachers" / name)
    for seed, name in enumerate(("student", "control"), start=2):
        export("llama", run / name, seed)
        files.write_manifest(run / name, fingerprint=name)
    for name in ("gpt2", "llama", "control", "student"):
        files.write_json(run / "evaluation" / f"{name}.json", evaluation(4.25, 0.625))
    (run / "job.yaml").write_text(dump_job(load_job(find_job("nursery"))))
    files.write_json(run / "environment.json", ENVIRONMENT)
    files.write_json(run / "state.json", {"status": "done"})
    files.write_json(run / "stages.json", {"student": "student"})
    (run / "metrics.jsonl").write_text('{"stage": "student", "step": 4, "loss": 5.0, "ce": 5.0}\n')
    (run / ".lock").touch()
    write_report(run)
    return runs


@pytest.fixture
def run_dir(made_once: Path, tmp_path: Path) -> Path:
    """A copy of the run with a store of its own."""
    shutil.copytree(made_once, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "nursery-1"


@pytest.fixture
def run_with_milestones(run_dir: Path) -> Path:
    """Of the student two are kept, of which the first has other weights."""
    student, milestones = run_dir / "student", {}
    for step, name in enumerate(("chck_2K", "chck_10K"), start=1):
        kept = run_dir / "milestones" / "student" / name
        weights = run_dir / "control" if step == 1 else student
        shutil.copytree(weights, kept)
        facts = {"milestone": name, "words": 2_003, "steps": step, "train_tokens": 2_500}
        files.write_json(kept / "training.json", facts)
        files.write_manifest(kept, fingerprint="student")
        milestones[name] = {"words": 2_003, "steps": step}
    training = files.read_json(student / "training.json")
    files.write_json(student / "training.json", training | {"milestones": milestones})
    files.write_manifest(student, fingerprint="student")
    return run_dir


# -- the hub --------------------------------------------------------------------------------------

TOKEN = "hf_atest"


@dataclass
class Branch:
    """Files by name, each with whether it is a large one."""

    name: str = "main"
    commits: int = 0
    files: dict[str, tuple[bytes, bool]] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        """The first commit is that of every branch."""
        name = self.name if self.commits else "main"
        return hashlib.sha1(f"{name} {self.commits}".encode()).hexdigest()


@dataclass
class Repository(Branch):
    """Its `main`, and the branches beside."""

    private: bool = False
    branches: dict[str, Branch] = field(default_factory=dict)
    born: dict[str, tuple[bytes, bool]] = field(default_factory=dict)
    """What its first commit holds."""

    def at(self, revision: str) -> Branch | None:
        """By name, or by its last commit."""
        here = {"main": self, **self.branches}
        return here.get(revision) or next((b for b in here.values() if b.sha == revision), None)


@dataclass
class Hub:
    """What was pushed to it, what it refuses, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)
    """Status by the first words of a request: `POST /api/repos/create`."""
    spoils: str | None = None
    """A file that it keeps other bytes of."""
    asked: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def content(self, name: str) -> dict[str, bytes]:
        return {path: data for path, (data, _) in self.repositories[name].files.items()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, value: object, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _handle(self) -> None:
        request = f"{self.command} {self.path.partition('?')[0]}"
        body = self._body()
        self.hub.asked.append(request)
        for start, status in self.hub.refuses.items():
            if request.startswith(start):
                self._answer(
                    status, {"error": "no, said the hub"}, X_Error_Message="no, said the hub"
                )
                return
        if "/upload/" not in request and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
            return
        self._serve(request, body)

    do_GET = do_POST = do_PUT = _handle

    def _serve(self, request: str, body: bytes) -> None:
        path = request.partition(" ")[2]
        parts = path.strip("/").split("/")
        if request == "POST /api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.hub.repositories
            if not there:
                first = {".gitattributes": (b"*.safetensors filter=lfs\n", False)}
                private = asked.get("visibility") == "private"
                born = Repository(private=private, files=dict(first), born=first)
                self.hub.repositories[name] = born
            self._answer(409 if there else 200, {"url": f"{self.hub.url}/{name}"})
        elif request == "POST /api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[0] == "upload":
            self.hub.uploads[parts[1]] = body
            self._answer(200, {})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        else:
            name = f"{parts[2]}/{parts[3]}"
            if name in self.hub.repositories:
                self._repository(name, self.hub.repositories[name], parts[4:], body)
            else:
                self._answer(404, {"error": "none of that name"}, X_Error_Code="RepoNotFound")

    def _repository(self, name: str, repository: Repository, rest: list[str], body: bytes) -> None:
        match rest:
            case ["commits", "main"]:
                dated = {
                    "authors": [],
                    "date": "2026-01-01T00:00:00.000Z",
                    "title": "",
                    "message": "",
                }
                oldest = Branch().sha
                shas = [repository.sha, *([oldest] if repository.commits else [])]
                self._answer(200, [{"id": sha, **dated} for sha in shas])
            case ["branch", branch]:
                assert json.loads(body) == {"startingPoint": Branch().sha}
                there = branch in repository.branches
                if not there:
                    repository.branches[branch] = Branch(branch, files=dict(repository.born))
                self._answer(409 if there else 200, {})
            case [] | [_, _]:
                action, revision = rest or ("revision", "main")
                found = repository.at(revision)
                if found is None:
                    self._answer(404, {"error": "none"}, X_Error_Code="RevisionNotFound")
                else:
                    self._of_branch(name, repository, found, action, body)
            case _:
                self._answer(404, {"error": f"this hub knows no {rest}"})

    def _of_branch(
        self, name: str, repository: Repository, branch: Branch, action: str, body: bytes
    ) -> None:
        match action:
            case "revision":
                siblings = [described(path, *file) for path, file in branch.files.items()]
                facts = {"id": name, "sha": branch.sha, "private": repository.private}
                self._answer(200, {**facts, "siblings": siblings})
            case "preupload":
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                self._answer(200, {"files": modes})
            case "commit":
                for line in body.splitlines():
                    self._commit(branch, **json.loads(line))
                branch.commits += 1
                url = f"{self.hub.url}/{name}/commit/{branch.sha}"
                self._answer(200, {"commitUrl": url, "commitOid": branch.sha})
            case _:
                self._answer(404, {"error": f"this hub knows no {action}"})

    def _commit(self, repository: Branch, key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if key == "file":
            repository.files[path] = (base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            data = self.hub.uploads[value["oid"]]
            assert hashlib.sha256(data).hexdigest() == value["oid"]
            repository.files[path] = (data, True)
        elif key == "deletedFile":
            del repository.files[path]
        else:
            assert key == "header", key
            assert value["parentCommit"] == repository.sha
        if path and path == self.hub.spoils:
            data, large = repository.files[path]
            repository.files[path] = (data + b"!", large)


def described(path: str, data: bytes, large: bool) -> dict[str, Any]:
    """A file as the hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    facts: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
    if large:
        sha256 = hashlib.sha256(data).hexdigest()
        facts["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 135}
    return facts


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub of one's own."""
    hub = Hub()
    with serving(type("HandlerOfOne", (Handler,), {"hub": hub})) as hub.url:
        yield hub
