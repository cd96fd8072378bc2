"""The exported models in a process that has transformers and cannot import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

# Everything is computed anew from the text file and the model directories.
STRANGER = """
import json, sys

# As if they were not installed: an import fails, and who looks for them finds nothing.
for name in ("babyllama_ds", "deepspeed"):
    sys.modules[name] = None

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text, length, *directories = sys.argv[1:]
text, length = open(text, encoding="utf-8").read(), int(length)
result = {}
for directory in directories:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    facts = {"windows": len(windows), "largest_id": max(ids)}
    for name, dtype in (("fp32", torch.float32), ("bf16", "auto")):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        with torch.no_grad():
            logits = model(windows).logits[:, :-1]
        facts[name + "_logits"] = str(logits.dtype)
        loss = torch.nn.functional.cross_entropy(
            logits.double().flatten(0, 1), windows[:, 1:].flatten()
        )
        facts[name] = loss.item()
    facts["rows"] = model.get_input_embeddings().weight.shape[0]
    prompt = tokenizer("mara paints", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    facts["prompt_tokens"] = prompt["input_ids"].shape[1]
    facts["written_tokens"] = written.shape[1]
    facts["written"] = tokenizer.decode(written[0], skip_special_tokens=True)
    result[directory] = facts
assert not any(name.startswith(("babyllama_ds.", "deepspeed.")) for name in sys.modules)
print(json.dumps(result))
"""
MODELS = {
    "student": "student",
    "control": "control",
    "gpt2": "teachers/gpt2",
    "llama": "teachers/llama",
}


@pytest.fixture(scope="module")
def seen_by_a_stranger(
    finished: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("elsewhere")
    script = folder / "stranger.py"
    script.write_text(STRANGER)
    directories = {name: str(finished.run_dir / place) for name, place in MODELS.items()}
    words = [str(finished.folder / "town.dev"), "32", *directories.values()]
    # -I: no PYTHONPATH, no current directory, no user's packages.
    done = subprocess.run(
        [sys.executable, "-I", str(script), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[directory] for name, directory in directories.items()}


@pytest.mark.parametrize("name", MODELS)
def test_independent_cross_entropy_agrees_with_the_report(
    finished: Any, seen_by_a_stranger: dict[str, dict[str, Any]], name: str
) -> None:
    report = json.loads((finished.run_dir / "report" / "report.json").read_text())
    reported, seen = report["models"][name]["dev_ce"], seen_by_a_stranger[name]
    assert (seen["fp32_logits"], seen["bf16_logits"]) == ("torch.float32", "torch.bfloat16")
    assert seen["fp32"] == pytest.approx(reported, abs=1e-3)
    assert seen["bf16"] == pytest.approx(reported, abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_id_has_a_row(
    seen_by_a_stranger: dict[str, dict[str, Any]], finished: Any, name: str
) -> None:
    assert seen_by_a_stranger[name]["rows"] == 300
    evaluation = json.loads((finished.run_dir / "evaluation" / f"{name}.json").read_text())
    assert seen_by_a_stranger[name]["windows"] == evaluation["dev"]["windows"]


@pytest.mark.parametrize("name", MODELS)
def test_it_writes_on(seen_by_a_stranger: dict[str, dict[str, Any]], name: str) -> None:
    seen = seen_by_a_stranger[name]
    assert seen["written_tokens"] == seen["prompt_tokens"] + 12
    assert seen["written"].strip().startswith("mara paints")


def test_generation_defaults_name_the_special_tokens(finished: Any) -> None:
    path: Path = finished.run_dir / "student" / "generation_config.json"
    defaults = json.loads(path.read_text())
    ids = {key: defaults[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    assert ids == {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
