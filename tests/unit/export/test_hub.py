"""What is pushed is what was exported, byte for byte; what goes wrong is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.export import hub as client
from babyllama_ds.export.command import Export, export_run
from babyllama_ds.export.finished import open_finished
from babyllama_ds.export.hub import Destination, destination, push
from babyllama_ds.export.model import CardFacts, export_model_dir

NAME = "babies/llama-1"
TOKEN = "hf_atest"


@pytest.fixture(autouse=True)
def by_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub of these tests knows git's protocol for large files, not Xet's."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The hub is a process's own here, wherever the tests run.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def model_dir(run_dir: Path, tmp_path: Path) -> Path:
    export_model_dir(open_finished(run_dir), "student", tmp_path / "model", CardFacts())
    return tmp_path / "model"


def at(hub: Any, token: str = TOKEN, name: str = NAME) -> Destination:
    return Destination(repo_id=name, token=token, endpoint=hub.url)


def here(directory: Path) -> dict[str, bytes]:
    """What the manifest names."""
    manifest = files.read_manifest(directory)
    assert manifest is not None
    return {name: (directory / name).read_bytes() for name in manifest.files}


def there(hub: Any) -> dict[str, bytes]:
    return {name: data for name, data in hub.content(NAME).items() if name != ".gitattributes"}


def refused(*args: Any, **options: bool) -> Any:
    with pytest.raises(RunError) as caught:
        push(*args, **{"private": False, "replace": False, **options})
    (problem,) = caught.value.problems
    return problem


def test_every_byte_arrives_and_nothing_else(hub: Any, model_dir: Path) -> None:
    (model_dir / "optimizer.pt").write_bytes(b"\x80\x04.")
    (model_dir / "notes.txt").write_text("mine")
    assert push(model_dir, at(hub), private=False, replace=False) is True
    assert there(hub) == here(model_dir)
    assert "model.safetensors" in there(hub)
    repository = hub.repositories[NAME]
    assert repository.files["model.safetensors"][1] is True
    assert (repository.commits, repository.private) == (1, False)


def test_a_private_repository(hub: Any, model_dir: Path) -> None:
    push(model_dir, at(hub), private=True, replace=False)
    assert hub.repositories[NAME].private is True


def test_what_is_there_already_is_not_sent_again(hub: Any, model_dir: Path) -> None:
    push(model_dir, at(hub), private=False, replace=False)
    assert push(model_dir, at(hub), private=False, replace=False) is False
    assert hub.repositories[NAME].commits == 1


def test_other_content_stays_unless_it_is_to_be_replaced(hub: Any, model_dir: Path) -> None:
    push(model_dir, at(hub), private=False, replace=False)
    repository = hub.repositories[NAME]
    repository.files["pytorch_model.bin"] = (b"old", True)
    repository.files["README.md"] = (b"old", False)
    before = dict(repository.files)
    problem = refused(model_dir, at(hub))
    assert problem.where == f"{hub.url}/{NAME}"
    assert problem.got.startswith("a repository with other content (README.md, config.json, ")
    assert "--replace" in problem.hint
    assert repository.files == before
    assert push(model_dir, at(hub), private=False, replace=True) is True
    assert there(hub) == here(model_dir)
    assert ".gitattributes" in repository.files
    assert repository.commits == 2


def test_the_same_names_with_other_bytes_are_other_content(hub: Any, model_dir: Path) -> None:
    push(model_dir, at(hub), private=False, replace=False)
    for name in ("README.md", "model.safetensors"):
        kept = hub.repositories[NAME].files[name]
        hub.repositories[NAME].files[name] = (kept[0] + b"!", kept[1])
        assert "other content" in refused(model_dir, at(hub)).got
        hub.repositories[NAME].files[name] = kept
    assert push(model_dir, at(hub), private=False, replace=False) is False


def test_a_file_more_is_other_content(hub: Any, model_dir: Path) -> None:
    push(model_dir, at(hub), private=False, replace=False)
    hub.repositories[NAME].files["extra.md"] = (b"hello", False)
    assert "other content" in refused(model_dir, at(hub)).got


def test_a_public_repository_is_no_private_one(hub: Any, model_dir: Path) -> None:
    push(model_dir, at(hub), private=False, replace=False)
    problem = refused(model_dir, at(hub), private=True)
    assert problem.got == "a public repository"
    assert hub.repositories[NAME].commits == 1


# -- milestones -----------------------------------------------------------------------------------


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(client, "get_token", lambda: TOKEN)


def pushed(run_dir: Path, **options: Any) -> list[str]:
    return list(export_run(Export(run_dir=run_dir, push=NAME, milestones=True, **options)))


def branch(hub: Any, name: str) -> dict[str, bytes]:
    files_there = hub.repositories[NAME].branches[name].files
    return {path: data for path, (data, _) in files_there.items() if path != ".gitattributes"}


@pytest.mark.usefixtures("token")
def test_each_milestone_is_a_branch(hub: Any, run_with_milestones: Path) -> None:
    run, places = run_with_milestones, pushed(run_with_milestones, language="en")
    assert places == [
        f"{hub.url}/{NAME}",
        f"{hub.url}/{NAME}/tree/chck_2K",
        f"{hub.url}/{NAME}/tree/chck_10K",
    ]
    assert there(hub)["model.safetensors"] == (run / "student" / "model.safetensors").read_bytes()
    for name in ("chck_2K", "chck_10K"):
        kept = run / "milestones" / "student" / name
        assert branch(hub, name).keys() == there(hub).keys()
        for file in ("model.safetensors", "config.json", "training.json", "tokenizer.json"):
            assert branch(hub, name)[file] == (kept / file).read_bytes()
        card = branch(hub, name)["README.md"].decode()
        assert f'from_pretrained("{NAME}", revision="{name}")' in card
        assert "after 2,003 words" in card
        assert "model-index" not in card
        assert ModelCard(card).data.language == "en"


@pytest.mark.usefixtures("token")
def test_a_push_of_milestones_that_broke_off_goes_on(hub: Any, run_with_milestones: Path) -> None:
    """The branch was made, and nothing had come into it."""
    hub.refuses[f"POST /api/models/{NAME}/commit/chck_10K"] = 500
    with pytest.raises(RunError) as caught:
        pushed(run_with_milestones)
    assert caught.value.problems[0].where == f"uploading to {hub.url}/{NAME}, branch chck_10K"
    assert branch(hub, "chck_10K") == {}
    hub.refuses.clear()
    pushed(run_with_milestones)
    assert branch(hub, "chck_10K")
    repository = hub.repositories[NAME]
    assert [repository.commits, *(one.commits for one in repository.branches.values())] == [1, 1, 1]


@pytest.mark.usefixtures("token")
def test_a_branch_with_other_content_stays(hub: Any, run_with_milestones: Path) -> None:
    pushed(run_with_milestones)
    hub.repositories[NAME].branches["chck_2K"].files["notes.md"] = (b"mine", False)
    with pytest.raises(RunError) as caught:
        pushed(run_with_milestones)
    assert caught.value.problems[0].where == f"{hub.url}/{NAME}, branch chck_2K"
    assert branch(hub, "chck_2K")["notes.md"] == b"mine"
    pushed(run_with_milestones, replace=True)
    assert "notes.md" not in branch(hub, "chck_2K")


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("model", ["control", "teachers/gpt2"])
def test_a_model_of_which_nothing_was_kept(hub: Any, run_with_milestones: Path, model: str) -> None:
    with pytest.raises(RunError, match="of which nothing was kept on its way"):
        pushed(run_with_milestones, model=model)
    assert hub.asked == []


@pytest.mark.usefixtures("token")
def test_a_milestone_that_is_gone_is_told_before_anything_is_sent(
    hub: Any, run_with_milestones: Path
) -> None:
    shutil.rmtree(run_with_milestones / "milestones" / "student" / "chck_2K")
    with pytest.raises(RunError) as caught:
        pushed(run_with_milestones)
    (problem,) = caught.value.problems
    assert problem.where.endswith("milestones/student/chck_2K")
    assert "only with all of" in (problem.hint or "")
    assert hub.asked == []


@pytest.mark.usefixtures("token")
def test_a_damaged_milestone_is_not_sent(hub: Any, run_with_milestones: Path) -> None:
    kept = run_with_milestones / "milestones" / "student" / "chck_10K"
    (kept / "config.json").write_text("{}")
    with pytest.raises(RunError) as caught:
        pushed(run_with_milestones)
    assert caught.value.problems[0].where == str(kept / "config.json")
    assert branch(hub, "chck_2K")
    assert "chck_10K" not in hub.repositories[NAME].branches


def test_milestones_go_to_the_hub_alone(run_with_milestones: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--milestones: got no --push"):
        list(export_run(Export(run_dir=run_with_milestones, to=tmp_path / "m", milestones=True)))


# -- what is refused ------------------------------------------------------------------------------


def test_a_damaged_directory_is_not_pushed(hub: Any, model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{}")
    assert "config.json" in refused(model_dir, at(hub)).where
    assert hub.asked == []


def test_a_manifest_with_a_pickle_is_not_pushed(hub: Any, model_dir: Path) -> None:
    (model_dir / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    files.write_manifest(model_dir, fingerprint="f")
    assert refused(model_dir, at(hub)).where.endswith("pytorch_model.bin")
    assert hub.asked == []


def test_what_arrived_is_looked_at(hub: Any, model_dir: Path) -> None:
    hub.spoils = "config.json"
    problem = refused(model_dir, at(hub))
    assert problem.got == "other content than was sent, or none, in config.json"
    assert problem.where.startswith(f"{hub.url}/{NAME} at ")


@pytest.mark.parametrize(
    ("request_", "status", "where", "expected", "hint"),
    [
        ("POST /api/repos/create", 403, "making", "leave to write there", "no file was published"),
        ("POST /api/repos/create", 500, "making", "the hub to take it", "try again later"),
        ("POST /api/validate-yaml", 400, "uploading to", "what the hub takes", "no file was"),
        (f"POST /api/models/{NAME}/commit", 403, "uploading to", "leave to write", "no file was"),
        (f"POST /api/models/{NAME}/commit", 412, "uploading to", "no other change", "look at"),
        (f"GET /api/models/{NAME}/revision", 404, "looking at", "of that name", "were sent"),
    ],
)
def test_a_hub_that_refuses(
    hub: Any, model_dir: Path, request_: str, status: int, where: str, expected: str, hint: str
) -> None:
    hub.refuses[request_] = status
    problem = refused(model_dir, at(hub))
    assert problem.where == f"{where} {hub.url}/{NAME}"
    assert problem.got.startswith(f"{status}: ")
    assert expected in problem.expected
    assert hint in problem.hint
    if "were sent" not in hint and NAME in hub.repositories:
        assert there(hub) == {}


def test_what_the_hub_said_is_told(hub: Any, model_dir: Path) -> None:
    hub.refuses["POST /api/repos/create"] = 403
    assert "no, said the hub" in refused(model_dir, at(hub)).got


def test_a_token_that_the_hub_does_not_know(hub: Any, model_dir: Path) -> None:
    problem = refused(model_dir, at(hub, token="hf_wrong"))
    assert problem.got.startswith("401: ")
    assert problem.expected == "a token that the hub knows"
    assert "hf_wrong" not in str(problem)


def test_a_large_file_that_is_refused(hub: Any, model_dir: Path) -> None:
    hub.refuses["PUT /upload"] = 403
    problem = refused(model_dir, at(hub))
    assert problem.got.startswith("403: ")
    assert there(hub) == {}


def test_no_network(hub: Any, model_dir: Path) -> None:
    gone = Destination(repo_id=NAME, token=TOKEN, endpoint="http://127.0.0.1:9")
    problem = refused(model_dir, gone)
    assert problem.got.startswith("ConnectError: ")
    assert problem.expected == "an answer of the hub"
    assert "is the network up?" in problem.hint
    assert "no file was published" in problem.hint


def test_a_network_that_fails_while_files_are_sent(
    hub: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they have arrived is not known: it is not said that nothing was published."""

    def fails(*_: object, **__: object) -> None:
        raise ConnectionResetError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", fails)
        problem = refused(model_dir, at(hub))
    assert problem.where == f"uploading to {hub.url}/{NAME}"
    assert problem.got == "ConnectionResetError: reset by peer"
    assert "push again: what has arrived is recognised" in problem.hint
    assert "no file was published" not in problem.hint


# -- before anything is asked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "a/", "/b", "a/b--c", "a/.b", "a/b c", "a/b.git", "a/" + "b" * 100]
)
def test_malformed_names(name: str) -> None:
    with pytest.raises(RunError, match=r"--push: got .* expected ORG/NAME"):
        destination(name)


def test_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "get_token", lambda: None)
    with pytest.raises(RunError, match="--push: got no token") as caught:
        destination(NAME)
    assert "hf auth login" in (caught.value.problems[0].hint or "")


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE, which is set"):
        destination(NAME)


# -- the command, in a process of its own ---------------------------------------------------------

COMMAND = "import sys; from babyllama_ds.cli import main; sys.exit(main())"


def test_the_command(hub: Any, run_dir: Path, tmp_path: Path) -> None:
    """With the address and the token from the environment, and a copy of what was pushed."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    words = ["export", str(run_dir), "--to", str(tmp_path / "to"), "--push", NAME, "--private"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'to'}\n{hub.url}/{NAME}\n"
    assert there(hub) == here(tmp_path / "to")
    assert hub.repositories[NAME].private is True
    assert f'model="{NAME}"' in there(hub)["README.md"].decode()
    config = json.loads(there(hub)["config.json"])
    assert config["architectures"] == ["LlamaForCausalLM"]
