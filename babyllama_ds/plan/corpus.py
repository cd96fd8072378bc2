"""The corpus before it is prepared: a job enters, how many tokens it will have leaves.

Exact where an earlier run has left the very shards in its store; else as the user says; else
estimated from the size of the text. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from babyllama_ds.corpus.documents import documents_of
from babyllama_ds.corpus.finding import find_files, form_of, packing_of
from babyllama_ds.corpus.prepare import CorpusEntries, prepare_corpus
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.sources import read_sources
from babyllama_ds.corpus.streams import Texts
from babyllama_ds.corpus.tokenizer import load_tokenizer
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.errors import DataError
from babyllama_ds.spec.corpus import (
    CorpusSpec,
    FilesCorpus,
    HeldOutFiles,
    HubCorpus,
    MixCorpus,
    NurseryCorpus,
    TailOfEachFile,
    TextSpec,
    TrainedTokenizer,
)
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.store import Store

# Bytes of English text in a token of a byte-level BPE, by vocabulary size; measured on held-out
# text of the six BabyLM domains, with a tokenizer trained on an eighth of ten million words.
_VOCABULARIES = (800, 2_000, 4_096, 8_192, 16_000, 32_000)
_BYTES_A_TOKEN = (2.21, 2.64, 2.91, 3.12, 3.27, 3.38)
_BYTES_A_WORD = 5.40  # of those domains' ten million words, the whitespace behind each included

NURSERY_TOKENS_A_WORD = 1.35
"""Measured at a vocabulary of 800; larger ones give a little less."""
NURSERY_WORDS_A_SCENE = 51.5
"""Measured on 300,000 words."""

_TOKENS_A_DOCUMENT = {"none": 0, "begin": 1, "end": 1, "both": 2}


@dataclass(frozen=True, kw_only=True)
class PlannedCorpus:
    """How much there is to train and to measure on."""

    train_tokens: int
    train_words: int
    """By whitespace."""
    dev_tokens: int | None
    """None: not known, and evaluations are left out."""
    vocab_size: int
    source: Literal["store", "--tokens", "estimate"]
    """Where the numbers come from."""
    assumption: str
    """The same in words."""


def plan_corpus(job: JobSpec, *, runs: Path, tokens: int | None) -> PlannedCorpus:
    """Tokens of the job's corpus; `tokens` is what the user says of its training text.

    Raises:
        DataError: neither shards, nor text, nor a number; a tokenizer that cannot be loaded.
    """
    if tokens is not None:
        return PlannedCorpus(
            train_tokens=tokens,
            train_words=round(tokens * bytes_a_token(_vocab_size(job)) / _BYTES_A_WORD),
            dev_tokens=_tail_tokens(job, tokens),
            vocab_size=_vocab_size(job),
            source="--tokens",
            assumption=f"{tokens:,} training tokens, as given by --tokens",
        )
    shards = _prepared(job, runs)
    if shards is not None:
        return PlannedCorpus(
            train_tokens=shards.num_tokens("train"),
            train_words=shards.num_words("train"),
            dev_tokens=shards.num_tokens("dev"),
            vocab_size=shards.vocab_size,
            source="store",
            assumption=f"tokens counted in the shards of {runs / 'store'}",
        )
    return _estimate(job)


def cut(job: JobSpec, train_tokens: int) -> TrainWindows:
    """The training windows of so many tokens: their counts alone can be asked for.

    Raises:
        DataError: not one window.
    """
    tokens = cast(TokenShards, _Counted(train_tokens))
    spec = job.windows
    return TrainWindows(tokens, length=spec.length, offsets=spec.offsets, seed=0, order=spec.order)


@dataclass(frozen=True)
class _Counted:
    """What `TrainWindows` asks of token shards, where there are none yet."""

    train_tokens: int

    def num_tokens(self, split: str) -> int:
        assert split == "train", "of the training text alone is anything known"
        return self.train_tokens


def bytes_a_token(vocab_size: int) -> float:
    """Bytes of English text in a token, by the measured table, interpolated over log V."""
    places = [math.log(size) for size in _VOCABULARIES]
    return float(np.interp(math.log(vocab_size), places, _BYTES_A_TOKEN))


# -- exact -----------------------------------------------------------------------------------------


class _NotMadeError(Exception):
    """The store lacks an entry."""


class _Finder(Store):
    """A store that finds and never makes."""

    def build(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], None],  # noqa: ARG002 - the store's interface
        facts: Mapping[str, object] = {},  # noqa: ARG002
        *,
        resumable: bool = False,  # noqa: ARG002
    ) -> Path:
        entry = self.find(kind, key)
        if entry is None:
            raise _NotMadeError(kind)
        return entry


def _prepared(job: JobSpec, runs: Path) -> TokenShards | None:
    """The job's own shards, if an earlier run left them; the text is read for its hash."""
    if not (runs / "store" / "tokens").is_dir():
        return None
    try:
        job = job.model_copy(update={"corpus": _streamed(job.corpus)})
        entries: CorpusEntries = prepare_corpus(job, _Finder(runs / "store"), lambda: None)
    except (_NotMadeError, DataError):  # a corpus that is not there may still be estimated
        return None
    return TokenShards.open(entries.tokens_dir)


def _streamed(corpus: CorpusSpec) -> CorpusSpec:
    """The same text, of which no hub dataset is downloaded to be known again."""
    if isinstance(corpus, HubCorpus):
        return corpus.model_copy(update={"streaming": True})
    if isinstance(corpus, MixCorpus):
        sources = tuple(
            source.model_copy(update={"corpus": _streamed(source.corpus)})
            for source in corpus.sources
        )
        return corpus.model_copy(update={"sources": sources})
    return corpus


# -- estimated -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Size:
    """The size of one split."""

    bytes: float
    documents: int = 0
    """Where tokens mark their ends; else not counted."""

    @classmethod
    def of(cls, texts: Texts) -> _Size:
        """The size of cleaned text, which is read."""
        num_bytes = documents = 0
        for _, lines in texts:
            for document in documents_of(lines):
                documents += 1
                num_bytes += sum(len(line.encode()) for line in document)
        return cls(bytes=num_bytes, documents=documents)


def _estimate(job: JobSpec) -> PlannedCorpus:
    vocab_size, ends = _vocab_size(job), _TOKENS_A_DOCUMENT[job.tokenizer.document_tokens]
    if isinstance(job.corpus, NurseryCorpus):
        a_word = NURSERY_TOKENS_A_WORD + ends / NURSERY_WORDS_A_SCENE
        told = f"{NURSERY_TOKENS_A_WORD} tokens a word of the nursery"
        if ends:
            told += f", {_ends(ends)} of each scene of {NURSERY_WORDS_A_SCENE} words"
        return PlannedCorpus(
            train_tokens=round(job.corpus.words * a_word),
            train_words=job.corpus.words,
            dev_tokens=round(job.corpus.dev_words * a_word),
            vocab_size=vocab_size,
            source="estimate",
            assumption=told,
        )
    train, dev, how = _text_sizes(job.corpus, with_documents=bool(ends))
    ratio = bytes_a_token(vocab_size)
    told = f"{ratio:.2f} bytes of text a token (English, vocabulary {vocab_size:,}), {how}"
    if ends:
        told += f"; {_ends(ends)} of each of {train.documents:,} documents"
    return PlannedCorpus(
        train_tokens=round(train.bytes / ratio) + ends * train.documents,
        train_words=round(train.bytes / _BYTES_A_WORD),
        dev_tokens=round(dev.bytes / ratio) + ends * dev.documents,
        vocab_size=vocab_size,
        source="estimate",
        assumption=told,
    )


def _ends(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens > 1)} at the end{'s' * (tokens > 1)}"


def _text_sizes(corpus: TextSpec, *, with_documents: bool) -> tuple[_Size, _Size, str]:
    """Of training and of development text, and what is counted: plain text files as they stand; of
    compressed files, tables and mixes, which have to be read, as of documents, the cleaned text.
    """
    if hub := _hub_dataset(corpus):
        raise _not_known(f"{hub}, a hub dataset, whose size is known when it is loaded")
    try:
        if isinstance(corpus, FilesCorpus) and not with_documents:
            sizes = _plain_sizes(corpus)
            if sizes is not None:
                train, dev = (_Size(bytes=size) for size in sizes)
                return train, dev, "nothing lost in cleaning"
        sources = read_sources(corpus)
        train, dev = _Size.of(sources.texts("train")), _Size.of(sources.texts("dev"))
    except (DataError, OSError) as error:
        got = str(error.problems[0].got) if isinstance(error, DataError) else str(error)
        raise _not_known(got) from error
    return train, dev, "counted in the cleaned text"


def _plain_sizes(corpus: FilesCorpus) -> tuple[float, float] | None:
    """Bytes of the files as they stand; none: they are not all plain text."""
    held_out = corpus.split.dev if isinstance(corpus.split, HeldOutFiles) else ()
    sizes = {"train": 0.0, "dev": 0.0}
    for split, path in find_files(corpus.train, held_out):
        if form_of(path) != "text" or packing_of(path):
            return None
        sizes[split] += path.stat().st_size
    if isinstance(corpus.split, TailOfEachFile):
        held_out_bytes = corpus.split.fraction * sizes["train"]
        return sizes["train"] - held_out_bytes, held_out_bytes
    return sizes["train"], sizes["dev"]


def _hub_dataset(corpus: TextSpec) -> str | None:
    """The first hub dataset in a corpus."""
    if isinstance(corpus, MixCorpus):
        found = (_hub_dataset(source.corpus) for source in corpus.sources)
        return next(filter(None, found), None)
    return corpus.path if isinstance(corpus, HubCorpus) else None


def _not_known(got: str) -> DataError:
    return DataError.of(
        "corpus",
        got=got,
        expected="the job's text, to estimate its tokens",
        hint="give --tokens N, the tokens of the training text, to plan without it",
    )


def _tail_tokens(job: JobSpec, train_tokens: int) -> int | None:
    """Development tokens that go with so many training tokens, where the job's split says so."""
    corpus = job.corpus
    if isinstance(corpus, FilesCorpus | HubCorpus) and isinstance(corpus.split, TailOfEachFile):
        fraction = corpus.split.fraction
        return round(train_tokens * fraction / (1 - fraction))
    return None


def _vocab_size(job: JobSpec) -> int:
    if isinstance(job.tokenizer, TrainedTokenizer):
        return job.tokenizer.vocab_size
    return len(load_tokenizer(job.tokenizer.path, job.tokenizer.revision))
