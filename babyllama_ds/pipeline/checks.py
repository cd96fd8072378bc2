"""The checks before training: a job's parts and its corpus enter, nothing or an error leaves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from babyllama_ds import ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.corpus.tokenizer import differing_ids, load_tokenizer
from babyllama_ds.engine.compiling import choose_compiled
from babyllama_ds.errors import JobError, ModelError
from babyllama_ds.evaluation.sentences import prefix_ids
from babyllama_ds.models.build import build_model, check_positions
from babyllama_ds.models.documents import check_documents, takes_lengths, varies_in_shape
from babyllama_ds.models.parts import HeadKind, check_plain_head, split_causal_lm
from babyllama_ds.models.recomputing import check_recomputable
from babyllama_ds.models.sizes import model_sizes
from babyllama_ds.models.splitting import check_groups, check_split
from babyllama_ds.pipeline.parts import Parts, training_key
from babyllama_ds.spec.job import TeacherSpec
from babyllama_ds.spec.models import ModelSpec, PretrainedModel
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.cache.check import check_head, check_top_k
from babyllama_ds.training.batches import check_warmup
from babyllama_ds.training.matching import check_layers


def check_job(parts: Parts, corpus: Corpus) -> None:
    """Everything that can be known to fail, before hours of training.

    Raises:
        UserError: the first that fails.
    """
    job = parts.job
    choose_compiled(
        job.deepspeed.compile,
        device=parts.device_kind,
        products_s=0,
        shapes_vary=parts.shapes_vary(),
    )
    _check_trainings(parts, corpus)
    parts.dev_windows(corpus, job.evaluation.dev_windows)
    parts.benchmarks(corpus)
    prefix_ids(corpus.tokenizer, job.evaluation.prefix)
    for spec in job.teachers:
        _check_split(parts, spec, corpus)
    for spec in job.teachers:
        # What is split has no room whole for every rank: one of them reads it for all.
        reads = spec.tensor_parallel == 1 or ranks.rank() == 0
        if isinstance(spec.model, PretrainedModel) and reads:
            where, trainings = f"teachers.{spec.name}", [spec.training]
            head = _check_loaded(parts, where, spec.model, trainings, corpus)
            if job.distillation.cache == "hidden":
                check_head(head, teacher=spec.name)
    check_top_k(job.distillation, len(corpus.tokenizer))
    _check_matched_layers(parts, corpus)
    if isinstance(job.student.model, PretrainedModel):
        trainings = [job.student.training, job.control.training if job.control else None]
        _check_loaded(parts, "student", job.student.model, trainings, corpus)


def _check_split(parts: Parts, spec: TeacherSpec, corpus: Corpus) -> None:
    """Ranks can be grouped, and this model dealt out to a group."""
    if spec.tensor_parallel == 1:
        return
    where = f"teachers.{spec.name}.tensor_parallel"
    check_groups(spec.tensor_parallel, ranks.world_size(), where=where)
    sizes = model_sizes(spec.model, len(corpus.tokenizer), where=f"teachers.{spec.name}.model")
    check_split(sizes, spec.tensor_parallel, where=where)
    kernel = parts.attention(f"teachers.{spec.name}", spec.model, training=False)
    if parts.within_documents and varies_in_shape(kernel):
        raise JobError.of(
            where,
            got=f"{spec.tensor_parallel} with windows.attention=document on {kernel}",
            expected="another kernel, since a group's ranks bring documents of other lengths",
            hint=f"set teachers.{spec.name}.model.attention=sdpa",
        )


def _check_matched_layers(parts: Parts, corpus: Corpus) -> None:
    """Those of loaded models too, of which the job alone does not know how deep they are."""
    job = parts.job
    if job.distillation.hidden_matching is None:
        return

    def depth(spec: ModelSpec, where: str) -> int:
        return model_sizes(spec, len(corpus.tokenizer), where=where).num_layers

    check_layers(
        job.distillation.hidden_matching,
        {spec.name: depth(spec.model, f"teachers.{spec.name}.model") for spec in job.teachers},
        depth(job.student.model, "student.model"),
    )


def _check_trainings(parts: Parts, corpus: Corpus) -> None:
    for where, model, training in parts.models():
        parts.attention(where, model, training=training is not None)
        if training is not None:
            parts.deepspeed_config(where, training)
            parts.has_label(where, training, corpus)
            windows = parts.windows(corpus, seed=0)
            check_warmup(training, windows.num_windows, windows.length, where=training_key(where))


def _check_loaded(
    parts: Parts,
    stage: str,
    spec: PretrainedModel,
    trainings: Sequence[TrainingSpec | None],
    corpus: Corpus,
) -> HeadKind:
    """The vocabulary, positions and head of a loaded model fit; what kind of head it has."""
    where = f"{stage}.model"
    _check_vocabulary(spec, corpus, where=where)
    attention = parts.attention(where, spec, training=False)
    model = build_model(spec, corpus.tokenizer, seed=0, attention=attention, where=where)
    check_positions(model, parts.job.windows.length, where=where)
    if any(training and training.gradient_checkpointing for training in trainings):
        check_recomputable(model, where=f"{training_key(stage)}.gradient_checkpointing")
    kind = check_plain_head(model, where=where)
    if parts.within_documents:
        # Flash kernels are for accelerators, and for bf16.
        tried = model.to(parts.device, parts.dtype) if takes_lengths(model) else model
        check_documents(tried, split_causal_lm(tried)[0], where=where)
    return kind


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
