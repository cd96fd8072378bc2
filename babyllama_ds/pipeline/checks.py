"""The checks before training: a job's setup and its corpus enter, nothing or an error leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from babyllama_ds import ranks
from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.corpus.tokenizer import compare_splits, differing_ids, load_tokenizer
from babyllama_ds.engine.compiling import choose_compiled
from babyllama_ds.engine.distributed import check_precision
from babyllama_ds.errors import JobError, ModelError
from babyllama_ds.evaluation.fine_tuning import ends_of_texts, load_suite
from babyllama_ds.evaluation.minimal_pairs import encode_items
from babyllama_ds.evaluation.pair_files import Task
from babyllama_ds.evaluation.sentences import check_positions as check_fit
from babyllama_ds.evaluation.sentences import prefix_ids
from babyllama_ds.models.build import build_model, check_positions
from babyllama_ds.models.directories import read_config
from babyllama_ds.models.documents import check_documents, varies_in_shape
from babyllama_ds.models.families import (
    check_causal,
    check_runs,
    check_trainable,
    positions_of,
)
from babyllama_ds.models.layers import check_layers
from babyllama_ds.models.parts import HeadKind, check_backbone, check_plain_head, split_causal_lm
from babyllama_ds.models.recomputing import check_recomputable
from babyllama_ds.models.sizes import model_sizes
from babyllama_ds.models.splitting import check_groups, check_split
from babyllama_ds.pipeline.ensembles import matched_layers
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.spec.job import TeacherSpec
from babyllama_ds.spec.models import ModelSpec, PretrainedModel
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.cache.check import check_head, check_top_k
from babyllama_ds.training.batches import check_warmup, tokens_after, total_steps
from babyllama_ds.training.matching import check_layers as check_matched_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_COMPARED_TOKENS = 20_000


def check_job(setup: JobSetup, corpus: Corpus) -> None:
    """Everything that can be known to fail, before hours of training.

    Raises:
        UserError: the first that fails.
    """
    job = setup.job
    check_precision(setup.device_kind, setup.precision)
    choose_compiled(
        job.deepspeed.compile,
        device=setup.device_kind,
        products_s=0,
        shapes_vary=setup.shapes_vary(),
    )
    _check_trainings(setup, corpus)
    _tell_of_a_cache_too_large(setup, corpus)
    setup.dev_windows(corpus, job.evaluation.dev_windows)
    benchmarks = _with_most_pairs(setup).benchmarks(corpus)
    prefix_ids(corpus.tokenizer, job.evaluation.prefix)
    if ranks.rank() == 0:  # the same on all, and long benchmarks take seconds
        for name, tasks in benchmarks.items():
            _check_sentences(setup, name, tasks, corpus)
        _check_fine_tuning(setup, corpus)
    for spec in job.teachers:
        _check_split(setup, spec, corpus)
    for spec in job.teachers:
        # What is split has no room whole for every rank: one of them reads it for all.
        reads = spec.tensor_parallel == 1 or ranks.rank() == 0
        if isinstance(spec.model, PretrainedModel) and reads:
            where, trainings = f"teachers.{spec.name}", [spec.training]
            layers = matched_layers(job.distillation, spec.name)
            head = _check_loaded(setup, where, spec.model, trainings, layers, corpus)
            if job.distillation.cache == "hidden":
                check_head(head, teacher=spec.name)
    check_top_k(job.distillation, len(corpus.tokenizer))
    _check_matched_layers(setup, corpus)
    if isinstance(job.student.model, PretrainedModel):
        trainings = [job.student.training, job.control.training if job.control else None]
        pairs = job.distillation.hidden_matching.layers if job.distillation.hidden_matching else ()
        layers = [pair.student_layer for pair in pairs]
        _check_loaded(setup, "student", job.student.model, trainings, layers, corpus)


def _with_most_pairs(setup: JobSetup) -> JobSetup:
    """With the limit that reads more pairs of each task: finished models', or milestones' own."""
    of_milestones = setup.of_milestones()
    both = [setup] if of_milestones is None else [setup, of_milestones]
    return max(both, key=lambda one: one.job.evaluation.max_pairs_per_task or math.inf)


def _check_sentences(setup: JobSetup, name: str, tasks: Sequence[Task], corpus: Corpus) -> None:
    """Each sentence of a benchmark fits into every model, all of which will be asked for it.

    Those that fit, but are longer than any window, are told of: no model that is trained here has
    seen their last positions (GPT-2's would still be as they were drawn).
    """
    spec = setup.job.evaluation
    parts_of_tasks, sources = encode_items(
        corpus.tokenizer, tasks, leading_space=spec.leading_space, prefix=spec.prefix
    )
    token_ids = [part.ids for part in parts_of_tasks]
    for stage, model, _ in setup.models():
        positions, remedy = _positions(setup, stage, model)
        whose = f"the positions of {stage}"
        check_fit(token_ids, positions, sources, whose=whose, remedy=remedy)
    lengths, window = [len(ids) for ids in token_ids], setup.job.windows.length
    if beyond := sum(length > window for length in lengths):
        log.warning(
            "%s: %d of %d sentences are longer than windows.length (%d tokens), up to %d: a "
            "model that is trained here scores them at positions that it has never seen",
            name,
            beyond,
            len(lengths),
            window,
            max(lengths),
        )


def _positions(setup: JobSetup, stage: str, model: ModelSpec) -> tuple[int | None, str]:
    """How many a model has (none: no limit), and how it may have more."""
    key = setup.job.model_key(stage)
    if isinstance(model, PretrainedModel):
        config = read_config(model.path, revision=model.revision, where=key)
        return positions_of(config), f"take another model ({key}.path)"
    return model.max_positions, f"raise {key}.max_positions"


def _check_fine_tuning(setup: JobSetup, corpus: Corpus) -> None:
    """The suites' files can be read, and their examples given to every model that learns them."""
    for suite in setup.job.evaluation.fine_tuning:
        where = f"evaluation.fine_tuning.{suite.name}"
        load_suite(suite)
        ends_of_texts(corpus.tokenizer, where=where)
        for stage, model, _ in setup.models():
            if stage.startswith("teachers/") and not suite.teachers:
                continue
            positions, remedy = _positions(setup, stage, model)
            if positions is not None and suite.max_tokens > positions:
                raise JobError.of(
                    f"{where}.max_tokens",
                    got=suite.max_tokens,
                    expected=f"at most {positions}, the positions of {stage}",
                    hint=f"lower it, or {remedy}",
                )


def _check_split(setup: JobSetup, spec: TeacherSpec, corpus: Corpus) -> None:
    """Ranks can be grouped, and this model dealt out to a group."""
    if spec.tensor_parallel == 1:
        return
    where = f"teachers.{spec.name}.tensor_parallel"
    check_groups(spec.tensor_parallel, ranks.world_size(), where=where)
    sizes = model_sizes(spec.model, len(corpus.tokenizer), where=f"teachers.{spec.name}.model")
    check_split(sizes, spec.tensor_parallel, where=where)
    kernel = setup.attention(f"teachers.{spec.name}", spec.model, training=False)
    if setup.within_documents and varies_in_shape(kernel):
        raise JobError.of(
            where,
            got=f"{spec.tensor_parallel} with windows.attention=document on {kernel}",
            expected="another kernel, since a group's ranks bring documents of other lengths",
            hint=f"set teachers.{spec.name}.model.attention=sdpa",
        )


def _check_matched_layers(setup: JobSetup, corpus: Corpus) -> None:
    """Those of loaded models too, of which the job alone does not know how deep they are."""
    job = setup.job
    if job.distillation.hidden_matching is None:
        return

    def depth(spec: ModelSpec, where: str) -> int:
        return model_sizes(spec, len(corpus.tokenizer), where=where).num_layers

    check_matched_layers(
        job.distillation.hidden_matching,
        {spec.name: depth(spec.model, f"teachers.{spec.name}.model") for spec in job.teachers},
        depth(job.student.model, "student.model"),
    )


def _check_trainings(setup: JobSetup, corpus: Corpus) -> None:
    for where, model, training in setup.models():
        setup.attention(where, model, training=training is not None)
        if training is not None:
            setup.deepspeed_config(where, training)
            setup.has_label(where, training, corpus)
            windows = setup.windows(corpus, seed=0)
            check_warmup(
                training, windows.num_windows, windows.length, where=setup.job.training_key(where)
            )
    job = setup.job
    setup.milestones("student", job.student.training, corpus)
    if job.control is not None:
        setup.milestones("control", job.control.training or job.student.training, corpus)


def _tell_of_a_cache_too_large(setup: JobSetup, corpus: Corpus) -> None:
    """That teachers compute windows which the student never sees, where its training is short."""
    job, windows = setup.job, setup.windows(corpus, seed=0)
    if job.distillation.cache == "none" or windows.num_distinct is None:
        return
    training = job.student.training
    steps = total_steps(training, windows.num_windows, windows.length)
    tokens = tokens_after(steps, training, windows.num_windows, windows.length)
    if (seen := tokens // windows.length) < windows.num_distinct:
        log.warning(
            "distillation.cache: %s is filled with all %d windows, of which student.training shows "
            "%d: unless that cache stands already, teachers would compute less without one "
            "(distillation.cache=none)",
            job.distillation.cache,
            windows.num_distinct,
            seen,
        )


def _check_loaded(
    setup: JobSetup,
    stage: str,
    spec: PretrainedModel,
    trainings: Sequence[TrainingSpec | None],
    layers: Sequence[int],
    corpus: Corpus,
) -> HeadKind:
    """A loaded model can do what the job asks of it; what kind of head it has.

    `layers` are those whose hidden states are matched. What a model does is tried, with a few
    tokens: in fp32 here, then as it will run.
    """
    where = f"{stage}.model"
    _check_vocabulary(spec, corpus, where=where)
    kernel = setup.attention(stage, spec, training=False)
    # FlashAttention is for cards, and for bf16: here, the plain products compute the same.
    tried = "eager" if varies_in_shape(kernel) else kernel
    model = build_model(spec, corpus.tokenizer, seed=0, attention=tried, where=where)
    model_sizes(spec, len(corpus.tokenizer), where=where)
    check_positions(model, setup.job.windows.length, where=where)
    check_causal(model, where=where)
    if any(training is not None for training in trainings):
        check_trainable(model.config, where=where)
    if any(training and training.gradient_checkpointing for training in trainings):
        check_recomputable(model, where=f"{setup.job.training_key(stage)}.gradient_checkpointing")
    kind = check_plain_head(model, where=where)
    if setup.job.evaluation.suites_of(teacher=stage != "student"):
        check_backbone(model, where=where)
    if layers:
        check_layers(model, split_causal_lm(model)[0], layers, where=where)
    if varies_in_shape(kernel):
        model.to(setup.device, setup.dtype).set_attn_implementation(kernel)  # type: ignore[operator]
    if setup.within_documents:
        check_documents(model, split_causal_lm(model)[0], where=where)
    check_runs(model.to(setup.dtype), where=where)
    return kind


def _check_vocabulary(spec: PretrainedModel, corpus: Corpus, *, where: str) -> None:
    theirs = load_tokenizer(spec.path, spec.revision, where=where)
    different = differing_ids(corpus.tokenizer, theirs)
    if different:
        shown = [f"{i} is {b}, not {a}" for i, (a, b) in islice(different.items(), 4)]
        more = ["…"] if len(different) > len(shown) else []
        raise ModelError.of(
            where,
            got=f"a vocabulary that differs in {len(different)} of "
            f"{max(len(corpus.tokenizer), len(theirs))} ids ({'; '.join(shown + more)})",
            expected="the job's: the same bytes for every id",
            hint=f"use this model's tokenizer: tokenizer={{kind: pretrained, path: {spec.path}}}",
        )
    _tell_other_splits(corpus, theirs, where=where)


def _tell_other_splits(corpus: Corpus, theirs: PreTrainedTokenizerFast, *, where: str) -> None:
    """Say so where a model's own tokenizer, of the same vocabulary, splits the text otherwise.

    Its logits mean what they should; but it was trained on other splits than it will be shown.
    """
    length = min(_COMPARED_TOKENS, corpus.shards.num_tokens("dev"))
    compared = compare_splits(
        corpus.tokenizer, theirs, corpus.shards.read("dev", 0, length).tolist()
    )
    if compared.otherwise:
        log.warning(
            "%s: its tokenizer has the job's vocabulary, but splits the text otherwise: %.1f %% of "
            "%d tokens are not as it would have them (%s). It is less sure of such text than of "
            "its own; tokenizer={kind: pretrained, path: …} takes its tokenizer for the job",
            where,
            100 * compared.otherwise / compared.tokens,
            compared.tokens,
            compared.example,
        )
