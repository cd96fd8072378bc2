"""A job whose documents are kept apart, from text to report: the same on any ranks, live or cached.

Every line is a document, with `<s>` and `</s>` at its ends, so that a window holds several, and
no two batches have as many labels. fp32; the teachers are trained by the first run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from babyllama_ds.corpus.shards import TokenShards

pytestmark = pytest.mark.launch

STEPS, BATCH = 24, 24
CASES = {
    # name: (ranks, windows of a micro-batch, overrides)
    "alone": (1, 24, ()),
    "two": (2, 4, ()),
    "two-hidden": (2, 12, ("distillation.cache=hidden",)),
}


@pytest.fixture(scope="module")
def ran(
    once: Any,
    tiny_job: Callable[..., Path],
    run_ranks: Callable[..., Any],
    run_alone: Callable[..., Any],
) -> Any:
    def make(scene: Any) -> list[Any]:
        windows = {"length": 32, "offsets": {"phases": 2}, "attention": "document"}
        tokenizer = {"kind": "bpe", "vocab_size": 300, "document_tokens": "both"}
        job = tiny_job(scene.folder, windows=windows, tokenizer=tokenizer)
        ended = []
        for name, (num_ranks, micro, overrides) in CASES.items():
            words = (
                job,
                f"name={name}",
                "corpus.documents=lines",
                "deepspeed.config=zero2_cpu_fp32",
                "distillation.soft_reduction=token",
                "student.training.learning_rate=2e-3",
                f"student.training.batch_windows={BATCH}",
                f"student.training.micro_batch={micro}",
                *overrides,
                "--runs",
                scene.runs,
            )
            ended.append(run_ranks(*words) if num_ranks == 2 else run_alone("run", *words))
        return ended

    scene = once("documents", make)
    for ended in scene.ended:
        ended.assert_done()
    return scene


def curve(lines: list[dict[str, Any]], stage: str, key: str) -> list[float]:
    return [line[key] for line in lines if line["stage"] == stage and key in line]


@pytest.mark.parametrize("other", ["two", "two-hidden"])
def test_ranks_and_caches_are_no_part_of_the_mathematics(
    ran: Any, metrics: Callable[[Path], list[dict[str, Any]]], other: str
) -> None:
    plain, its = metrics(ran.runs / "alone"), metrics(ran.runs / other)
    for stage, keys in {
        "student": ("loss", "ce", "kl", "grad_norm", "dev_ce"),
        "control": ("loss", "grad_norm", "dev_ce"),
    }.items():
        for key in keys:
            ours, theirs = curve(plain, stage, key), curve(its, stage, key)
            assert len(ours) == len(theirs) >= 3
            worst = max(abs(b - a) / abs(a) for a, b in zip(ours, theirs, strict=True))
            assert worst <= 2e-5, f"{stage} {key}: {worst}"


def test_what_is_scored_are_the_tokens_within_documents(ran: Any) -> None:
    shards = TokenShards.open(ran.runs / "alone" / "tokens")
    num_windows = shards.num_tokens("dev") // 32
    stream = shards.read("dev", 0, 32 * num_windows).reshape(-1, 32)
    inside = int((stream[:, 1:] != 1).sum())  # all but what follows a boundary: `<s>`
    assert inside < stream[:, 1:].size
    for name in CASES:
        found = json.loads((ran.runs / name / "evaluation" / "student.json").read_text())
        assert (found["dev"]["tokens"], found["dev"]["windows"]) == (inside, num_windows)


def test_the_score_is_that_of_documents_one_by_one(ran: Any) -> None:
    """By transformers alone, from what was exported."""
    shards = TokenShards.open(ran.runs / "two" / "tokens")
    num_windows = shards.num_tokens("dev") // 32
    stream_BS = torch.from_numpy(shards.read("dev", 0, 32 * num_windows)).view(-1, 32)
    for name in ("student", "teachers/gpt2"):
        model = AutoModelForCausalLM.from_pretrained(ran.runs / "two" / name).eval()
        nll, count = 0.0, 0
        for ids_S in stream_BS:
            begins = [0, *(at for at in range(1, 32) if ids_S[at] == 1), 32]
            for first, last in pairwise(begins):
                piece_1S = ids_S[None, first:last]
                with torch.no_grad():
                    logits_SV = model(input_ids=piece_1S).logits[0, :-1]
                nll += cross_entropy(logits_SV, piece_1S[0, 1:], reduction="sum").item()
                count += last - first - 1
        path = ran.runs / "two" / "evaluation" / f"{name.rpartition('/')[2]}.json"
        assert json.loads(path.read_text())["dev"]["ce"] == pytest.approx(nll / count, rel=1e-5)


def test_every_document_begins_and_ends_with_its_tokens(ran: Any) -> None:
    shards = TokenShards.open(ran.runs / "alone" / "tokens")
    ids = shards.read("train", 0, shards.num_tokens("train"))
    documents = shards.documents("train")
    assert documents is not None
    num_lines = len((ran.folder / "town.train").read_text().splitlines())
    assert documents.num_documents == num_lines
    begins = np.flatnonzero(ids == 1)
    assert len(begins) == num_lines
    assert (ids[begins[1:] - 1] == 2).all()
