"""`babyllama-ds evaluate`: any causal LM, texts and benchmarks enter; one measurement leaves.

What is measured, and how, is what a run's own evaluation is: the texts are encoded into one stream
without special tokens, cut into windows one after another, each file a domain; the sentences of
minimal pairs are scored one by one. So a run's student is here what its report says it is, given
the same text with the same cleaning.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from babyllama_ds.corpus.characters import Characters, tell_what_changes
from babyllama_ds.corpus.cleaning import Cleaning
from babyllama_ds.corpus.prepare import PREPARATION
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.sources import FileSources, iter_text, read_texts
from babyllama_ds.corpus.tokenizer import (
    load_tokenizer,
    token_bytes,
    tokenizer_fingerprint,
    vocabulary_size,
)
from babyllama_ds.corpus.windows import DevWindows as DevText
from babyllama_ds.corpus.writing import write_shards
from babyllama_ds.errors import DataError, Problem
from babyllama_ds.evaluation.evaluate import DevWindows, evaluate_model
from babyllama_ds.evaluation.fine_tuning import (
    Learner,
    ends_of_texts,
    fine_tune_suite,
    kernel_to_learn,
    load_suite,
)
from babyllama_ds.evaluation.forward import OnBatch
from babyllama_ds.evaluation.loading import (
    WHERE,
    check_model_directory,
    load_causal_lm,
    model_directory,
)
from babyllama_ds.evaluation.pair_files import load_tasks
from babyllama_ds.evaluation.sentences import prefix_ids
from babyllama_ds.evaluation.stored import Remember, remembering, store_key, stored_evaluation
from babyllama_ds.files import hash_json
from babyllama_ds.fingerprints import hashes_now, measured_fingerprint
from babyllama_ds.hub import commit_of
from babyllama_ds.models.directories import MODEL
from babyllama_ds.models.families import missing_kernels, positions_of
from babyllama_ds.models.probe import embedding_rows
from babyllama_ds.spec.evaluation import FineTuning, Prefix
from babyllama_ds.store import Store


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a model is to be measured on, and how."""

    texts: tuple[Path, ...] = ()
    """Files of held-out text, each a domain of its own."""
    benchmarks: Mapping[str, Path] = field(default_factory=dict)
    """Directories of minimal pairs by the benchmark's name."""
    suites: tuple[FineTuning, ...] = ()
    """What copies of it are fine-tuned on."""
    length: int = 128
    """Tokens in a window."""
    cleaning: Cleaning = "none"
    """What is done to the texts before they are encoded."""
    leading_space: bool = True
    """Whether a sentence begins with a space, as inside running text."""
    prefix: Prefix = "none"
    """The token before each sentence."""
    batch_tokens: int = 8_192
    """Tokens, padding included, in one forward pass."""


def measure(
    path: str,
    wanted: Wanted,
    *,
    device: torch.device,
    store: Store | None = None,
    on_batch: OnBatch | None = None,
) -> dict[str, Any]:
    """The object that a run writes to `evaluation/<model>.json`, of the model at `path`.

    With a `store` the same measurement is made once.

    Raises:
        HubError: nothing there, neither here nor on the hub.
        ModelError: no model there, one that is not causal or that no safetensors hold, or one
            whose training on a task diverges.
        DataError: nothing to measure; a tokenizer that cannot be used; texts, pairs or examples
            that cannot be read or are too short or too long for the model.
        RunError: the store cannot be written.
    """
    if not wanted.texts and not wanted.benchmarks and not wanted.suites:
        raise DataError.of(
            "evaluate",
            got="neither --text, --pairs nor --fine-tune",
            expected="something to measure the model on",
        )
    directory = model_directory(path)
    check_model_directory(directory)
    tokenizer = load_tokenizer(directory, where=WHERE, what=MODEL)
    prefix_ids(tokenizer, wanted.prefix, where="--prefix")
    benchmarks = {
        name: load_tasks(folder, max_pairs=None, where="--pairs")
        for name, folder in wanted.benchmarks.items()
    }
    suites = [(suite, load_suite(suite, where="--fine-tune")) for suite in wanted.suites]
    if suites:
        ends_of_texts(tokenizer, where=WHERE)
    sources = read_texts(wanted.texts, cleaning=wanted.cleaning, where="--text")

    def make() -> dict[str, Any]:
        started = time.monotonic()
        model = load_causal_lm(directory, device=device)
        if sources.files:
            _check_length(model, wanted.length)
        for suite in wanted.suites:
            _check_length(model, suite.max_tokens, where="--max-tokens", what="examples")
        with tempfile.TemporaryDirectory(prefix="babyllama-ds-") as folder:
            result = evaluate_model(
                model,
                tokenizer,
                name=path,
                dev=_windows(sources, tokenizer, model, wanted, Path(folder)),
                benchmarks=benchmarks,
                leading_space=wanted.leading_space,
                prefix=wanted.prefix,
                batch_tokens=wanted.batch_tokens,
                device=device,
                vocab_size=min(embedding_rows(model), vocabulary_size(tokenizer)),
                on_batch=on_batch,
            )
        if suites:
            learner = _learner(directory, model, tokenizer, wanted, device)
            del model  # copies of it are to come
            result["fine_tuning"] = {
                suite.name: fine_tune_suite(
                    learner, suite, tasks, remember=_remember(learner, store), on_step=on_batch
                )
                for suite, tasks in suites
            }
        return {**result, "seconds": time.monotonic() - started}

    if store is None:
        return make()
    content = _content(directory)
    key = store_key(
        _fingerprint(content, tokenizer, sources, wanted), device=device.type, attention="default"
    )
    return stored_evaluation(store, key, make, name=path)


# -- text ---------------------------------------------------------------------------------------


def _windows(
    sources: FileSources,
    tokenizer: PreTrainedTokenizerFast,
    model: nn.Module,
    wanted: Wanted,
    folder: Path,
) -> DevWindows | None:
    """The texts as windows, their shards in `folder`; none: no text was given."""
    if not sources.files:
        return None
    characters = Characters()
    write_shards(folder, {"dev": characters.counted(iter_text(sources, "dev"))}, tokenizer)
    shards = TokenShards.open(folder)
    tell_what_changes(tokenizer, characters, shards)
    _check_texts(shards, sources, wanted.length)
    _check_embedded(shards, tokenizer, embedding_rows(model))
    return DevWindows.of(
        DevText(shards, wanted.length),
        batch_tokens=wanted.batch_tokens,
        byte_lengths=np.array([len(meaning) for meaning in token_bytes(tokenizer)], np.int64),
    )


def _check_length(
    model: nn.Module, length: int, *, where: str = "--length", what: str = "windows"
) -> None:
    positions = positions_of(model.config)
    if positions is not None and length > positions:
        raise DataError.of(
            where,
            got=f"{what} of {length} tokens",
            expected=f"at most {positions}, the model's positions",
            hint=f"give {where} {positions}, or less",
        )


def _check_texts(shards: TokenShards, sources: FileSources, length: int) -> None:
    num_tokens = {span.domain: span.stop - span.start for span in shards.domains("dev")}
    short = [
        Problem(
            where="--text",
            got=f"{file.path}, of {num_tokens.get(file.domain, 0)} tokens",
            expected=f"at least {length}, a window",
            hint="give more text, or a smaller --length",
        )
        for file in sources.files
        if num_tokens.get(file.domain, 0) < length
    ]
    if short:
        raise DataError.all_of(short)


def _check_embedded(shards: TokenShards, tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    largest = int(shards.read("dev", 0, shards.num_tokens("dev")).max())
    if largest >= rows:
        raise DataError.of(
            "--text",
            got=f"a text with the token {tokenizer.convert_ids_to_tokens(largest)!r}, id {largest}",
            expected=f"ids below {rows}, the rows of the model's embedding",
            hint="use the tokenizer that this model was trained with",
        )


# -- fine-tuning ----------------------------------------------------------------------------------


def _learner(
    directory: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    wanted: Wanted,
    device: torch.device,
) -> Learner:
    in_16_bits = next(model.parameters()).dtype != torch.float32
    return Learner(
        model=directory,
        tokenizer=tokenizer,
        attention=kernel_to_learn(
            "auto",
            device="cuda" if device.type == "cuda" else "cpu",
            precision="bf16" if in_16_bits else "fp32",
            where=WHERE,
            missing=missing_kernels(model.config),
        ),
        device=device,
        batch_tokens=wanted.batch_tokens,
        leading_space=wanted.leading_space,
        prefix=wanted.prefix,
        where=directory,
    )


def _remember(learner: Learner, store: Store | None) -> Remember:
    if store is None:
        return lambda _, learn: learn()
    return remembering(
        store,
        _content(learner.model),
        tokenizer_fingerprint(learner.tokenizer),
        device=learner.device.type,
        attention=learner.attention,
    )


# -- what it is known by ------------------------------------------------------------------------


def _fingerprint(
    content: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    sources: FileSources,
    wanted: Wanted,
) -> str:
    read_by = {"version": PREPARATION, "tokenizer": tokenizer_fingerprint(tokenizer)}
    settings = {
        "leading_space": wanted.leading_space,
        "prefix": wanted.prefix,
        "prefix_ids": prefix_ids(tokenizer, wanted.prefix),
        **read_by,
    }
    return measured_fingerprint(
        content,
        tokens=hash_json({"text": sources.fingerprint(), **read_by}) if sources.files else None,
        length=wanted.length if sources.files else None,
        settings=settings,
        benchmarks=list(wanted.benchmarks.items()),
        suites=wanted.suites,
    )


def _content(directory: str) -> dict[str, str]:
    """A local model by its files, one of a hub by its commit."""
    commit = commit_of(directory, where=WHERE, what=MODEL)
    return hashes_now(Path(directory)) if commit is None else {"hub": directory, "commit": commit}
