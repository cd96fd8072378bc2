"""The kit for a machine without internet: made here, installed in a fresh folder, found by key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.spec.loading import load_job
from gpu.kit import collect as kit


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_job: Callable[..., Path]) -> Path:
    """A kit of a tiny job's text and pairs, as `DATA/…`, with no wheels."""
    data = tmp_path_factory.mktemp("corpus")
    pairs = data / "eval" / "pairs"
    pairs.mkdir(parents=True)
    pair = {"sentence_good": "a cat sits", "sentence_bad": "a cat sit"}
    (pairs / "agreement.jsonl").write_text(json.dumps(pair) + "\n")
    evaluation = {"minimal_pairs": [{"name": "pairs", "path": str(pairs)}]}
    job = tiny_job(data, evaluation=evaluation)
    out = tmp_path_factory.mktemp("kit")
    kit.collect(out, load_job(job), data=data)
    return out


def install(out: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As on the machine: another folder, and a Python that is an environment itself."""
    return subprocess.run(
        ["bash", str(out / "setup.sh"), str(target)],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


SAID = """
import torch
from babyllama_ds.environment import describe_environment
print(describe_environment(torch.device("cpu"))["commit"])
"""


@pytest.mark.parametrize("with_git", [True, False], ids=["with git", "without"])
def test_reports_name_the_commit(made: Path, tmp_path: Path, with_git: bool) -> None:
    target = tmp_path / "there"
    assert install(made, target).returncode == 0
    path = tmp_path / "bin"
    path.mkdir()
    for name in ["bash", *(["git"] if with_git else [])]:
        found = shutil.which(name)
        assert found is not None
        (path / name).symlink_to(found)
    (tmp_path / "said.py").write_text(SAID)
    done = subprocess.run(
        ["bash", "-c", 'source "$1/env.sh"; python "$2/said.py"', "it", target, tmp_path],
        env={"PATH": str(path), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [json.loads((made / "kit.json").read_text())["commit"]]


SEARCH = """
import json, os, sys
from pathlib import Path
import babyllama_ds
from babyllama_ds.corpus import prepare
from babyllama_ds.spec.loading import load_job
from babyllama_ds.store import Store

def refuse(*_, **__):
    raise AssertionError("made again, not found")

prepare.train_tokenizer = prepare.write_shards = refuse
job, runs = map(Path, sys.argv[1:])
entries = prepare.prepare_corpus(load_job(job), Store(runs / "store"), lambda: None)
print(json.dumps({"tokenizer": entries.tokenizer_key, "tokens": entries.tokens_key,
                  "tokens_dir": str(entries.tokens_dir), "code": babyllama_ds.__file__}))
"""


def test_installed_elsewhere_the_job_finds_its_tokens_by_key(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    done = install(made, target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "beside torch" in done.stdout
    (tmp_path / "job.yaml").write_text(json.dumps(_job(target / "data")))
    found = subprocess.run(
        [target / "code/.venv/bin/python", "-c", SEARCH, tmp_path / "job.yaml", target / "runs"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    facts = json.loads((made / "kit.json").read_text())
    assert (told["tokenizer"], told["tokens"]) == (facts["tokenizer"], facts["tokens"])
    assert told["tokens_dir"].startswith(str(target))
    assert told["code"] == str(target / "code/babyllama_ds/__init__.py")
    assert (target / "data/eval/pairs/agreement.jsonl").exists()
    assert (target / "code/.venv/.ready").exists()
    assert install(made, target).returncode == 2, "it must not write over what is there"


def _job(data: Path) -> dict[str, Any]:
    """The tiny job's corpus, at another place."""
    model = {"kind": "gpt2", "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    training = {"batch_windows": 8, "epochs": 1, "learning_rate": 1e-3}
    return {
        "name": "elsewhere",
        "corpus": {
            "kind": "files",
            "train": [str(data / "*.train")],
            "split": {"kind": "held_out", "dev": [str(data / "*.dev")]},
            "cleaning": "none",
        },
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "windows": {"length": 32},
        "teachers": [{"name": "t", "model": model, "training": training}],
        "student": {"model": model, "training": training},
    }


def test_a_damaged_kit_is_not_installed(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made, tmp_path / "kit")
    content = bytearray((out / "store.tar.xz").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "store.tar.xz").write_bytes(content)
    done = install(out, tmp_path / "elsewhere")
    assert done.returncode == 2
    assert "store.tar.xz: FAILED" in done.stdout
    assert "expected the kit as it was made" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_a_kit_that_is_too_large_names_its_largest_file(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made, tmp_path / "kit")
    (out / "wheels").mkdir()
    (out / "wheels" / "large.whl").write_bytes(bytes(9_000_000))
    assert kit.summary(out).splitlines()[0] == "     9.0 MB  wheels/large.whl"
    kit.check_size(out, 60)
    with pytest.raises(SystemExit, match=r"at most 8; the largest file is wheels/large.whl, 9.0"):
        kit.check_size(out, 8)


def test_text_outside_of_the_corpus_folder_is_refused(made: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("town.train", "town.dev"):
        (data / name).write_text("a line\n")
    (tmp_path / "job.yaml").write_text(json.dumps(_job(data)))
    with pytest.raises(SystemExit, match="expected some in"):
        list(kit._texts(load_job(tmp_path / "job.yaml"), tmp_path / "another"))
