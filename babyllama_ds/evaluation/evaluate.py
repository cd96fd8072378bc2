"""One model's evaluation: a model (or its directory) enters, the object of its JSON file leaves.

The caller writes it to `evaluation/<model>.json`. Accuracies are shares in [0, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from babyllama_ds import ranks
from babyllama_ds.corpus import windows
from babyllama_ds.evaluation.cross_entropy import (
    BeginsOf,
    DevScore,
    Domains,
    TextScore,
    WindowsOf,
    bits_per_byte,
    evaluate_cross_entropy,
    perplexity,
)
from babyllama_ds.evaluation.forward import OnBatch, Share
from babyllama_ds.evaluation.minimal_pairs import (
    CHANCE_OF_PAIRS,
    PairScores,
    TaskScore,
    TermScore,
    evaluate_minimal_pairs,
)
from babyllama_ds.evaluation.pair_files import Task
from babyllama_ds.evaluation.samples import write_samples
from babyllama_ds.models.build import count_parameters, load_model
from babyllama_ds.spec.evaluation import Prefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DevWindows:
    """Development text as windows."""

    windows_of: WindowsOf
    """Window indices to token ids [len(indices), S]."""
    num_windows: int
    """Windows there are."""
    batch_windows: int
    """Windows in one forward pass of one rank."""
    byte_lengths: NDArray[Any] | None = None
    """Bytes that each token id stands for; none: bits per byte are not computed."""
    domains: Domains | None = None
    """Where the tokens come from; none: only the whole is measured."""
    begins_of: BeginsOf | None = None
    """Where pieces of documents begin in them, which are kept apart; none: windows are whole."""

    @classmethod
    def of(
        cls, text: windows.DevWindows, *, batch_tokens: int, byte_lengths: NDArray[Any]
    ) -> DevWindows:
        """The windows of prepared text, `batch_tokens` tokens in one forward pass."""
        return cls(
            windows_of=lambda ids: text.windows(np.asarray(ids, dtype=np.int64)),
            num_windows=text.num_windows,
            batch_windows=max(1, batch_tokens // text.length),
            byte_lengths=byte_lengths,
            domains=Domains(
                names=text.domains,
                numbers_of=lambda ids: text.domain_numbers(np.asarray(ids, dtype=np.int64)),
            ),
            begins_of=_begins_of(text) if text.within_documents else None,
        )


def _begins_of(text: windows.DevWindows) -> BeginsOf:
    def begins_of(ids: Sequence[int]) -> NDArray[np.bool_]:
        begins_BS = text.begins(np.asarray(ids, dtype=np.int64))
        assert begins_BS is not None, "documents are kept apart"
        return begins_BS

    return begins_of


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """A model that several ranks run together, as one of them holds it."""

    module: nn.Module
    params: int
    """Parameters of the whole."""
    share: Share


def evaluate_model(
    model: nn.Module | Path | SplitModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    name: str,
    dev: DevWindows | None,
    benchmarks: Mapping[str, Sequence[Task]],
    leading_space: bool,
    batch_tokens: int,
    device: torch.device | str,
    attention: str = "sdpa",
    prefix: Prefix = "none",
    vocab_size: int | None = None,
    samples: int = 0,
    on_batch: OnBatch | None = None,
) -> dict[str, Any]:
    """Everything a model is measured on; called by every rank, the same on every rank.

    A directory is loaded in the dtype it was exported in, with `attention` as kernel; a module is
    taken as it is. So is a split one, of which each group of ranks measures what else a rank does.
    `benchmarks` are lists of tasks by name, `samples` the number of texts that it writes (on rank
    0) from beginnings of `dev`. Rows of the embedding from `vocab_size` on (none: the tokenizer's
    size) are no tokens and get no probability.

    Raises:
        ModelError: the directory holds no loadable model, or its scores are not finite.
        DataError: no development window, a sentence longer than the model's positions, or a
            prefix token that the tokenizer has not.
    """
    share, params = None, None
    if isinstance(model, Path):
        model = _load(model, attention=attention, where=f"evaluation of {name}")
    elif isinstance(model, SplitModel):
        share, params, model = model.share, model.params, model.module
    model = model.to(device)
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    result: dict[str, Any] = {
        "model": name,
        "params": count_parameters(model) if params is None else params,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": torch.device(device).type,
        "attention": cast(PreTrainedModel, model).config._attn_implementation,
        "dev": None,
        "minimal_pairs": {},
    }
    if dev is not None:
        score = evaluate_cross_entropy(
            model,
            dev.windows_of,
            dev.num_windows,
            device=device,
            batch_windows=dev.batch_windows,
            vocab_size=vocab_size,
            byte_lengths=dev.byte_lengths,
            domains=dev.domains,
            begins_of=dev.begins_of,
            share=share,
            on_batch=on_batch,
        )
        result["dev"] = dev_as_json(score)
        logger.info("%s: dev cross-entropy %.4f nats/token", name, score.cross_entropy)
    if dev is not None and samples:
        write = partial(
            write_samples,
            model,
            tokenizer,
            dev.windows_of,
            dev.num_windows,
            number=samples,
            device=device,
        )
        # A split model writes on all its ranks, the same on each: they draw with one seed.
        result["samples"] = (
            ranks.on_rank_zero(write)
            if share is None
            else ranks.broadcast_object(ranks.on_every_rank(write))
        )
    for benchmark, tasks in benchmarks.items():
        scores = evaluate_minimal_pairs(
            model,
            tokenizer,
            tasks,
            leading_space=leading_space,
            prefix=prefix,
            share=share,
            device=device,
            batch_tokens=batch_tokens,
            vocab_size=vocab_size,
            on_batch=on_batch,
        )
        result["minimal_pairs"][benchmark] = pairs_as_json(scores)
        logger.info("%s: %s %.2f %%", name, benchmark, 100 * scores.accuracy)
    return result


def dev_as_json(score: DevScore) -> dict[str, Any]:
    """Cross-entropy in nats per token, perplexity, bits per byte, and what they were taken over;
    the same by domain."""
    return {
        **_text_as_json(score),
        "windows": score.num_windows,
        "domains": {name: _text_as_json(part) for name, part in score.domains.items()},
    }


def pairs_as_json(scores: PairScores) -> dict[str, Any]:
    """A benchmark: mean over tasks, share of all pairs, each term and task, how sentences began."""
    return {
        "accuracy": scores.accuracy,
        "pooled_accuracy": scores.pooled_accuracy,
        "terms": {term: _term_as_json(score) for term, score in scores.terms.items()},
        "tasks": {task.name: _task_as_json(task) for task in scores.tasks},
        "prefix": scores.prefix,
        "leading_space": scores.leading_space,
    }


def _text_as_json(score: TextScore) -> dict[str, float | int | None]:
    return {
        "ce": score.cross_entropy,
        "perplexity": perplexity(score.nll_nats, score.num_tokens),
        "bits_per_byte": bits_per_byte(score.nll_nats, score.num_bytes)
        if score.num_bytes
        else None,
        "tokens": score.num_tokens,
    }


def _term_as_json(score: TermScore) -> dict[str, float | int]:
    return {"accuracy": score.accuracy, "tasks": len(score.tasks), "pairs": score.pairs}


def _task_as_json(task: TaskScore) -> dict[str, float | int | str | None]:
    return {
        "accuracy": task.accuracy,
        "pairs": task.pairs,
        "ties": task.ties,
        "term": task.term,
        "outcomes": task.outcomes,
        # Of pairs it goes without saying, as in files that were written before.
        **({"chance": task.chance} if task.chance != CHANCE_OF_PAIRS else {}),
    }


def _load(directory: Path, *, attention: str, where: str) -> nn.Module:
    return ranks.on_every_rank(
        lambda: load_model(str(directory), attention=attention, where=where, dtype="auto")
    )
