"""Where a run is made: its setup, corpus and speed enter; `environment.json` and a log line leave.

The report reads the file.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from babyllama_ds import files, ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.corpus.tokenizer import vocabulary_hash
from babyllama_ds.environment import describe_environment
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.speed import Speed
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.storages import Storages

log = logging.getLogger(__name__)


def describe_run(
    setup: JobSetup, directory: RunDirectory, storages: Storages, speed: Speed, corpus: Corpus
) -> None:
    """Say what runs where, and keep it for the report. A collective.

    Written is where the models are made; a later start that makes none does not rewrite it.
    """
    made = any(storages.on_each(lambda: _made_before(directory.path)))
    facts = _facts(
        setup,
        corpus,
        matmul_rate=None if made else speed.facts(corpus),
        settled=ranks.on_rank_zero(directory.settled),
    )
    if not made:
        facts = ranks.broadcast_object(facts)  # of other nodes the hardware may be another
        storages.on_each(lambda: files.write_json(directory.path / "environment.json", facts))
    log.info(
        "%s: ranks %d, on %s, threads per rank %d, ZeRO-%d, %s, attention %s, in %s",
        setup.job.run_name,
        facts["ranks"],
        facts["hardware"]["cuda_device"] or facts["hardware"]["host_cpu"] or "cpu",
        facts["threads_per_rank"],
        facts["zero_stage"],
        setup.precision,
        ", ".join(sorted(set(facts["attention"].values()))),
        directory.path,
    )


def _made_before(run_dir: Path) -> bool:
    """Whether the models, and where they were made, are there from an earlier start."""
    student = run_dir / "student" / files.MANIFEST_NAME
    return student.exists() and (run_dir / "environment.json").exists()


def _facts(
    setup: JobSetup,
    corpus: Corpus,
    *,
    matmul_rate: dict[str, float] | None,
    settled: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    job = setup.job
    attention = {
        where: setup.attention(where, model, training=training is not None)
        for where, model, training in setup.models()
    }
    config = setup.deepspeed_config("student", job.student.training)
    return {
        **describe_environment(setup.device),
        "ranks": ranks.world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "zero_stage": config["zero_optimization"]["stage"],
        "device": setup.device.type,
        "attention": attention,
        "precision": setup.precision,
        "matmul_rate": matmul_rate,
        "seeds": {where: job.stage_seed(where) for where in attention},
        "settled": settled,
        "fingerprints": {
            "job": files.hash_json(job.model_dump(mode="json")),
            "tokenizer": corpus.entries.tokenizer_key,
            "tokens": corpus.entries.tokens_key,
            "vocabulary": vocabulary_hash(corpus.tokenizer),
        },
    }
