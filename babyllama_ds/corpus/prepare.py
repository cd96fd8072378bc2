"""A job's corpus, prepared once and shared: the job enters; tokenizer and token shards leave.

Each step is an entry of the store under the hash of what decides it, so a changed text or
tokenizer can never meet a stale shard:

    text (nursery only) → tokenizers → tokens

Only the last is resumable. A tokenizer is learnt in one call of its library, which begins again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from babyllama_ds.corpus.characters import Characters, tell_what_changes
from babyllama_ds.corpus.documents import (
    DocumentTokens,
    check_documents_found,
    document_tokens,
)
from babyllama_ds.corpus.nursery.write import NURSERY_VERSION, write_nursery
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.sources import iter_text, read_sources
from babyllama_ds.corpus.streams import Sources, only_lines
from babyllama_ds.corpus.text import nursery_files
from babyllama_ds.corpus.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from babyllama_ds.corpus.writing import write_shards
from babyllama_ds.errors import DataError
from babyllama_ds.files import hash_json
from babyllama_ds.spec.corpus import CorpusSpec, LoadedTokenizer, NurseryCorpus
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.store import Store

log = logging.getLogger(__name__)

PREPARATION = 1
"""Raised when a change of the code gives other tokens for the same text."""
DOCUMENTS = 1
"""Raised when a change of the code gives other documents of the same text."""

Check = Callable[[], None]
"""Called now and then during long work; raises to stop it."""


@dataclass(frozen=True, kw_only=True)
class CorpusEntries:
    """Where the prepared corpus lies, and under which keys."""

    tokenizer_dir: Path
    tokenizer_key: str
    tokens_dir: Path
    tokens_key: str
    pairs_dir: Path | None
    """The nursery's minimal pairs."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The prepared corpus, opened on one rank."""

    entries: CorpusEntries
    tokenizer: PreTrainedTokenizerFast
    shards: TokenShards
    byte_lengths: NDArray[np.int64]
    """Bytes that each token id stands for."""


def prepare_corpus(job: JobSpec, store: Store, check: Check) -> CorpusEntries:
    """Find or make every entry; for one rank to call.

    Raises:
        DataError: text or tokenizer that cannot be used.
        RunError: a disk that refuses.
    """
    text_dir = _nursery(job.corpus, job.stage_seed("corpus"), store, check)
    corpus = job.corpus
    if isinstance(corpus, NurseryCorpus):
        sources = read_sources(nursery_files(_some(text_dir), corpus.documents), check=check)
    else:
        sources = read_sources(corpus, check=check)
    check_documents_found(iter_text(sources, "train"), corpus.documents)
    tokenizer_key, tokenizer_dir = _tokenizer(job, sources, store, check)
    tokens_key = hash_json(
        {
            "version": PREPARATION,
            "text": sources.fingerprint(),
            "tokenizer": tokenizer_key,
            **_documents(job),
        }
    )
    ends = _document_tokens(job, tokenizer_dir)

    def make(directory: Path) -> None:
        log.info("tokens: encoding %s", sources.size())
        characters = Characters()
        texts = {
            "train": characters.counted(iter_text(sources, "train")),
            "dev": characters.counted(iter_text(sources, "dev")),
        }
        tokenizer = load_tokenizer(str(tokenizer_dir))
        write_shards(directory, texts, tokenizer, documents=ends, check=check)
        tell_what_changes(tokenizer, characters, TokenShards.open(directory))

    return CorpusEntries(
        tokenizer_dir=tokenizer_dir,
        tokenizer_key=tokenizer_key,
        tokens_dir=store.build("tokens", tokens_key, make, resumable=True),
        tokens_key=tokens_key,
        pairs_dir=text_dir / "pairs" if text_dir else None,
    )


def open_corpus(entries: CorpusEntries) -> Corpus:
    """Open what `prepare_corpus` made; for every rank to call."""
    tokenizer = load_tokenizer(str(entries.tokenizer_dir))
    lengths = [len(meaning) for meaning in token_bytes(tokenizer)]
    return Corpus(
        entries=entries,
        tokenizer=tokenizer,
        shards=TokenShards.open(entries.tokens_dir),
        byte_lengths=np.array(lengths, dtype=np.int64),
    )


def _nursery(corpus: CorpusSpec, seed: int, store: Store, check: Check) -> Path | None:
    """The nursery's text; none for other corpora."""
    if not isinstance(corpus, NurseryCorpus):
        return None
    text = corpus.model_dump(mode="json", exclude={"documents"})  # which do not change it
    key = hash_json({"nursery": NURSERY_VERSION, "seed": seed, **text})

    def make(directory: Path) -> None:
        log.info("nursery: writing %s words", f"{corpus.words:,}")
        write_nursery(
            directory,
            words=corpus.words,
            dev_words=corpus.dev_words,
            pairs_per_task=corpus.pairs_per_task,
            seed=seed,
            check=check,
        )

    return store.build("text", key, make)


def _tokenizer(job: JobSpec, sources: Sources, store: Store, check: Check) -> tuple[str, Path]:
    """The tokenizer's key and directory."""
    spec = job.tokenizer
    if isinstance(spec, LoadedTokenizer):
        loaded = load_tokenizer(spec.path, spec.revision)
        _check_without_gaps(loaded, spec.path)
        key = tokenizer_fingerprint(loaded)
        return key, store.build("tokenizers", key, lambda folder: save_tokenizer(loaded, folder))
    vocabulary = spec.model_dump(mode="json", exclude={"document_tokens"})
    if spec.normalization == "nfkc":  # as all were before there was a choice
        del vocabulary["normalization"]
    key = hash_json({"version": PREPARATION, "text": sources.fingerprint(), **vocabulary})

    def make(directory: Path) -> None:
        log.info("tokenizer: learning %d tokens", spec.vocab_size)
        train_tokenizer(spec, _lines(sources), directory, check=check)

    return key, store.build("tokenizers", key, make)


def _check_without_gaps(tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """A model has as many logits as there are tokens: an id beyond their number has none."""
    size = vocabulary_size(tokenizer)
    if size != len(tokenizer):
        raise DataError.of(
            "tokenizer.path",
            got=f"{path}: ids up to {size - 1}, of {len(tokenizer)} tokens",
            expected="a token for every id from 0 on",
            hint="give the missing ids tokens of their own: `tokenizer.json` lists all",
        )


def _lines(sources: Sources) -> Iterator[str]:
    for _, lines in iter_text(sources, "train"):
        yield from only_lines(lines)


def _documents(job: JobSpec) -> dict[str, Any]:
    """What the key of token shards says of documents: nothing where their boundaries are dropped,
    as before there was a choice."""
    if job.corpus.documents == "none":
        return {}
    return {"documents": [DOCUMENTS, job.corpus.documents, job.tokenizer.document_tokens]}


def _document_tokens(job: JobSpec, tokenizer_dir: Path) -> DocumentTokens | None:
    """The tokens at the ends of documents; none where boundaries are dropped."""
    if job.corpus.documents == "none":
        return None
    return document_tokens(load_tokenizer(str(tokenizer_dir)), job.tokenizer.document_tokens)


def _some(path: Path | None) -> Path:
    assert path is not None, "a nursery corpus has its text in the store"
    return path
