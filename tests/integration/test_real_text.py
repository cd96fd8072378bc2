"""The stack on real English: a few-minute version of `babylm_tiny`, and text through the shards.

Needs BABYLM_DATA: train/*.train, dev/*.dev, eval/blimp_filtered/*.jsonl,
eval/supplement_filtered/*.jsonl, eval/glue/*.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.data,
    pytest.mark.launch,
    pytest.mark.skipif("BABYLM_DATA" not in os.environ, reason="BABYLM_DATA is not set"),
]

ROOT = Path(__file__).resolve().parents[2]
GLUE = {
    "name": "glue",
    "path": "${BABYLM_DATA}/eval/glue",
    "epochs": 1,
    "max_train_examples": 128,
    "max_examples": 100,
}
SHORT = [f"{key}.training.max_steps=80" for key in ("teachers.0", "teachers.1", "student")] + [
    f"{key}.training.warmup_steps=10" for key in ("teachers.0", "teachers.1", "student")
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished short run of babylm_tiny, through the launcher, on two ranks."""
    runs = tmp_path_factory.mktemp("runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_gpus", "2"),
        *("--master_port", str(port), "launcher/run.py", "launcher/jobs/babylm_tiny.yaml"),
        *("--runs", str(runs), "tokenizer.vocab_size=4096", *SHORT),
        *("evaluation.max_pairs_per_task=20", "evaluation.dev_windows=512"),
        f"evaluation.fine_tuning=[{json.dumps(GLUE)}]",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "babylm_tiny-1"


def report_of(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "report" / "report.json").read_text())
    return report


def test_every_model_is_measured_on_all_tasks(run_dir: Path) -> None:
    models = report_of(run_dir)["models"]
    assert set(models) == {"gpt2", "llama", "student", "control"}
    for name in models:
        result = json.loads((run_dir / "evaluation" / f"{name}.json").read_text())
        tasks = result["minimal_pairs"]["blimp"]["tasks"]
        assert len(tasks) == 67
        assert {task["pairs"] for task in tasks.values()} == {20}
        assert 0.4 < models[name]["minimal_pairs"]["blimp"] < 0.9
        assert len(result["minimal_pairs"]["blimp"]["terms"]) == 13
        supplement = result["minimal_pairs"]["supplement"]
        assert {"hypernym", "turn_taking", "qa_congruence_easy"} < supplement["tasks"].keys()
        assert len(supplement["tasks"]) == 5
        assert supplement["terms"] == {}
        domains = result["dev"]["domains"]
        assert domains.keys() >= {"childes", "gutenberg", "open_subtitles", "simple_wiki"}
        tokens = sum(part["tokens"] for part in domains.values())
        assert tokens == result["dev"]["tokens"] == 512 * 127


def test_every_model_learns_the_tasks_that_are_whole(run_dir: Path) -> None:
    """BoolQ and MultiRC have no training text there, QNLI and MNLI's second part no text at all."""
    for name in report_of(run_dir)["models"]:
        result = json.loads((run_dir / "evaluation" / f"{name}.json").read_text())
        tasks = result["fine_tuning"]["glue"]["tasks"]
        assert set(tasks) == {"cola", "mnli", "mrpc", "qqp", "rte", "sst2", "wsc"}
        metrics = {task: found["metric"] for task, found in tasks.items()}
        assert (metrics["cola"], metrics["mrpc"], metrics["mnli"]) == ("mcc", "f1", "accuracy")
        for task, found in tasks.items():
            assert found["train_examples"] == 128
            assert found["examples"] == (52 if task == "wsc" else 100)
            assert len(set(found["labels"])) == (3 if task == "mnli" else 2)
            assert set(found["predictions"][0]) <= {"0", "1", "2"}


def test_models_beat_word_frequencies(run_dir: Path) -> None:
    """80 steps are few, but every model must know more than how frequent each token is."""
    from babyllama_ds.corpus.shards import TokenShards

    shards = TokenShards.open((run_dir / "tokens").resolve())
    train = shards.read("train", 0, shards.num_tokens("train"))
    dev = shards.read("dev", 0, shards.num_tokens("dev"))
    counts = Counter(train.tolist())
    total = len(train) + 4096
    unigram = -np.mean([math.log((counts[token] + 1) / total) for token in dev.tolist()])
    for name, model in report_of(run_dir)["models"].items():
        assert model["dev_ce"] < unigram, name


def test_shards_hold_the_cleaned_text(run_dir: Path) -> None:
    """Decoded, a file's tokens are its cleaned text (after NFKC), with nothing lost or added."""
    from babyllama_ds.corpus.shards import TokenShards
    from babyllama_ds.corpus.sources import iter_text, read_sources
    from babyllama_ds.corpus.tokenizer import load_tokenizer
    from babyllama_ds.spec.loading import load_job

    job = load_job(run_dir / "job.yaml")
    tokenizer = load_tokenizer(str((run_dir / "tokenizer").resolve()))
    shards = TokenShards.open((run_dir / "tokens").resolve())
    spans = shards.domains("dev")
    texts = iter_text(read_sources(job.corpus), "dev")  # type: ignore[arg-type]
    for span, (domain, lines) in zip(spans, texts, strict=True):
        assert span.domain == domain
        text = unicodedata.normalize("NFKC", "".join(lines))
        ids = shards.read("dev", span.start, span.stop - span.start).tolist()
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        # Tokenization adds one space before a text that does not begin with one.
        assert decoded.removeprefix(" ") == text.removeprefix(" "), domain
