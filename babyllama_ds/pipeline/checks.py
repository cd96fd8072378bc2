"""The checks before training: a job's parts and its corpus enter, nothing or an error leaves."""

from __future__ import annotations

from itertools import islice

from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.corpus.tokenizer import differing_ids, load_tokenizer
from babyllama_ds.engine.compiling import choose_compiled
from babyllama_ds.errors import ModelError
from babyllama_ds.evaluation.sentences import prefix_ids
from babyllama_ds.models.build import build_model, check_positions
from babyllama_ds.models.parts import HeadKind, check_plain_head
from babyllama_ds.pipeline.parts import Parts, training_key
from babyllama_ds.spec.models import PretrainedModel
from babyllama_ds.teachers.cache.check import check_head, check_top_k
from babyllama_ds.training.batches import check_warmup


def check_job(parts: Parts, corpus: Corpus) -> None:
    """Everything that can be known to fail, before hours of training.

    Raises:
        UserError: the first that fails.
    """
    job = parts.job
    choose_compiled(job.deepspeed.compile, device=parts.device_kind, products_s=0)
    _check_trainings(parts, corpus)
    parts.dev_windows(corpus, job.evaluation.dev_windows)
    parts.benchmarks(corpus)
    prefix_ids(corpus.tokenizer, job.evaluation.prefix)
    for spec in job.teachers:
        if isinstance(spec.model, PretrainedModel):
            head = _check_loaded(parts, f"teachers.{spec.name}.model", spec.model, corpus)
            if job.distillation.cache == "hidden":
                check_head(head, teacher=spec.name)
    check_top_k(job.distillation, len(corpus.tokenizer))
    if isinstance(job.student.model, PretrainedModel):
        _check_loaded(parts, "student.model", job.student.model, corpus)


def _check_trainings(parts: Parts, corpus: Corpus) -> None:
    for where, model, training in parts.models():
        parts.attention(where, model, training=training is not None)
        if training is not None:
            parts.deepspeed_config(where, training)
            windows = parts.windows(corpus, seed=0)
            check_warmup(training, windows.num_windows, windows.length, where=training_key(where))


def _check_loaded(parts: Parts, where: str, spec: PretrainedModel, corpus: Corpus) -> HeadKind:
    """The vocabulary, positions and head of a loaded model fit; what kind of head it has."""
    _check_vocabulary(spec, corpus, where=where)
    attention = parts.attention(where, spec, training=False)
    model = build_model(spec, corpus.tokenizer, seed=0, attention=attention, where=where)
    check_positions(model, parts.job.windows.length, where=where)
    return check_plain_head(model, where=where)


def _check_vocabulary(spec: PretrainedModel, corpus: Corpus, *, where: str) -> None:
    theirs = load_tokenizer(spec.path, where=where)
    different = differing_ids(corpus.tokenizer, theirs)
    if different:
        shown = [f"{i} is {b}, not {a}" for i, (a, b) in islice(different.items(), 4)]
        more = ["…"] if len(different) > len(shown) else []
        raise ModelError.of(
            where,
            got=f"a vocabulary that differs in {len(different)} of "
            f"{len(corpus.tokenizer)} ids ({'; '.join(shown + more)})",
            expected="the job's: the same bytes for every id",
            hint=f"use this model's tokenizer: tokenizer={{kind: pretrained, path: {spec.path}}}",
        )
