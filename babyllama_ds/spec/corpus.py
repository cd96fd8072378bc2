"""The text of a job: where it comes from, how it becomes token ids, how those become windows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from babyllama_ds.spec.base import HubName, Mismatch, Name, Spec, consistent, repeated_names


class NurseryCorpus(Spec):
    """Child-directed English made by the embedded grammar, deterministic from the job's seed."""

    kind: Literal["nursery"]
    words: Annotated[int, Field(ge=1_000)] = 150_000
    """Words of training text, about (whole scenes are written)."""
    dev_words: Annotated[int, Field(ge=200)] = 15_000
    """Words of held-out text, about."""
    pairs_per_task: PositiveInt = 100
    """Minimal pairs made for each grammatical phenomenon."""
    documents: Literal["none", "lines"] = "none"
    """Whether boundaries between scenes, of which each line is one, are kept: see
    docs/documents.md."""


class HeldOutFiles(Spec):
    """Development text is given as files of its own."""

    kind: Literal["held_out"]
    dev: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs of the development text."""


class HeldOutSplit(Spec):
    """Development text is a split of its own."""

    kind: Literal["held_out"]
    dev: Annotated[str, Field(min_length=1)] = "validation"
    """The split's name."""


class TailOfEachFile(Spec):
    """The last lines of every training file are held out (BabyLlama-2: the last 5 %).

    Of a source of rows (tables, hub) the last rows, so that no document is cut in two."""

    kind: Literal["tail"]
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of each file's lines that is held out; the cut is `round((1 - fraction) * lines)`."""


class FilesCorpus(Spec):
    """Text files or tables; the file name without its suffixes is the domain (`childes.train.gz`
    -> `childes`)."""

    kind: Literal["files"]
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs; matches are read in sorted order. Text (`.txt`, `.train`, `.dev`), one row a
    document (`.jsonl`, `.json` with an object a line, `.csv`, `.parquet`), and all but parquet also
    compressed (`.gz`, `.xz`, `.zst`)."""
    split: Annotated[HeldOutFiles | TailOfEachFile, Field(discriminator="kind")]
    """Where development text comes from."""
    column: Annotated[str, Field(min_length=1)] = "text"
    """The column (JSON: the key) that holds the text; text files have none."""
    cleaning: Literal["babylm", "published", "none"] = "babylm"
    """`babylm`: BabyLlama's rules per domain, their known bugs fixed; `published`: the same rules
    to the letter, bugs included; `none`: text as it is."""
    documents: Literal["none", "blank_lines", "lines", "files", "rows"] = "none"
    """What is a document, so that its boundaries are kept: of text files what blank lines or titles
    (`= = = … = = =`) set apart, each line, or each file; of tables each row; `none` (published):
    boundaries are dropped. The text stays the same; see docs/documents.md."""

    @model_validator(mode="after")
    def _documents_survive(self) -> FilesCorpus:
        found = []
        if self.cleaning == "published" and self.documents not in ("none", "files"):
            expected = "none or files, since the published rules erase boundaries within a file"
            hint = "cleaning: babylm has the same rules and keeps them"
            found.append(Mismatch(("documents",), self.documents, expected, hint))
        return consistent(self, found)


class HubCorpus(Spec):
    """A dataset of the Hugging Face hub; each row is a document."""

    kind: Literal["hub"]
    path: Annotated[str, Field(min_length=1)]
    """The dataset's id (`owner/name`), or a local folder laid out like one."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Its configuration (subset); none: its default."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """A commit, tag or branch; none: the newest. The commit found is part of the fingerprint."""
    train: Annotated[str, Field(min_length=1)] = "train"
    """The split that is trained on."""
    split: Annotated[HeldOutSplit | TailOfEachFile, Field(discriminator="kind")]
    """Where development text comes from."""
    column: Annotated[str, Field(min_length=1)] = "text"
    """The column that holds the text."""
    domain_column: Annotated[str, Field(min_length=1)] | None = None
    """The column whose value is the row's domain: rows are gathered by it, in the order in which
    domains first appear. None: all rows are of one domain, called `name`, or the last part of
    `path`."""
    streaming: bool = False
    """Read over the network in every pass, with no copy on the disk; else the split is downloaded
    once into the library's cache. A local folder is read in place."""
    cleaning: Literal["babylm", "none"] = "none"
    """`babylm`: BabyLlama's rules for the domains that bear its names; `none`: text as it is."""
    documents: Literal["none", "rows"] = "none"
    """Whether the boundaries between documents, of which each row is one, are kept; see
    docs/documents.md."""

    @model_validator(mode="after")
    def _readable(self) -> HubCorpus:
        found = []
        if self.streaming and self.domain_column is not None:
            hint = "rows are gathered by domain, which reads them once for each: leave one out"
            found.append(Mismatch(("domain_column",), self.domain_column, "no streaming", hint))
        if self.domain_column == self.column:
            expected = f"another column than the text's ({self.column})"
            found.append(Mismatch(("domain_column",), self.domain_column, expected))
        if isinstance(self.split, HeldOutSplit) and self.split.dev == self.train:
            hint = "`split: {kind: tail}` holds out the end of the training split"
            expected = "a split that no model is trained on"
            found.append(Mismatch(("split", "dev"), self.split.dev, expected, hint))
        return consistent(self, found)


class MixSource(Spec):
    """One source of a mix."""

    name: Name
    """What it is called; the domain of a source that has one, and before the others' names
    (`name/domain`) where it has several."""
    corpus: Annotated[FilesCorpus | HubCorpus, Field(discriminator="kind")]
    """Its text, with the split and the cleaning that are its own."""
    weight: PositiveFloat | None = None
    """Its share of the words of the mix, relative to the other sources' weights."""
    words: PositiveInt | None = None
    """Its budget: so many words from its start, up to the end of a line."""
    repeat: bool = False
    """Whether it begins again where it is shorter than its budget or its share; else that is an
    error."""


class MixCorpus(Spec):
    """Several sources, one after another, each from its start and up to its share of the words.

    Words are counted by whitespace, after cleaning. Only training text is measured out; the
    development text is that of all sources, whole."""

    kind: Literal["mix"]
    sources: Annotated[tuple[MixSource, ...], Field(min_length=1)]
    """What is mixed: all by `weight`, or all by `words`."""
    words: PositiveInt | None = None
    """Training words of a mix by weight; none: as many as the weights leave, so that the source
    that is shortest for its share is taken whole."""

    @property
    def documents(self) -> str:
        """What is a document in each source, or `none`: all keep their boundaries, or none does."""
        kept = [source.corpus.documents for source in self.sources]
        return "none" if "none" in kept else "/".join(kept)

    @model_validator(mode="after")
    def _measured(self) -> MixCorpus:
        found = [
            Mismatch(("sources", *each.key), each.got, each.expected, each.hint)
            for each in repeated_names([source.name for source in self.sources])
        ]
        by_words = [source.words is not None for source in self.sources]
        for i, source in enumerate(self.sources):
            if (source.weight is None) == (source.words is None):
                got = "neither" if source.words is None else "both"
                expected = "either `weight` or `words`"
                found.append(Mismatch(("sources", i, "weight"), got, expected))
            elif any(by_words) and not all(by_words):
                hint = "shares of what budgets leave have no meaning: give all one or the other"
                key = "words" if by_words[i] else "weight"
                expected = "all sources by `weight`, or all by `words`"
                found.append(Mismatch(("sources", i, key), getattr(source, key), expected, hint))
        drop = [source.corpus.documents == "none" for source in self.sources]
        if any(drop) and not all(drop):
            expected = "documents in all sources, or `none` in all: they are one stream"
            place = ("sources", drop.index(True), "corpus", "documents")
            found.append(Mismatch(place, "none", expected))
        if self.words is not None and any(by_words):
            expected = "nothing: the sources' budgets say how many words there are"
            found.append(Mismatch(("words",), self.words, expected))
        if self.words is None and not any(by_words) and all(s.repeat for s in self.sources):
            hint = "sources that all begin again have no end"
            found.append(Mismatch(("words",), "nothing", "how many words the mix has", hint))
        return consistent(self, found)


TextSpec = FilesCorpus | HubCorpus | MixCorpus
"""A corpus whose text is the user's."""

CorpusSpec = Annotated[
    NurseryCorpus | FilesCorpus | HubCorpus | MixCorpus, Field(discriminator="kind")
]


# -- tokenizer and windows ----------------------------------------------------------------------


DocumentTokens = Literal["none", "begin", "end", "both"]


class TrainedTokenizer(Spec):
    """Byte-level BPE trained on the training text (`<pad>` 0, `<s>` 1, `</s>` 2)."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=260, le=10_000_000)] = 16_000
    """Rows of the embedding: 3 special tokens, 256 bytes, merges."""
    min_frequency: PositiveInt = 2
    """Occurrences that a merge needs."""
    normalization: Literal["nfkc", "nfc", "none"] = "nfkc"
    """Unicode form that text is brought to. `nfkc` (published) also writes other signs for some:
    `，` as `,`, `①` as `1`; `nfc` only composes accents; `none` keeps every character."""
    document_tokens: DocumentTokens = "none"
    """Special tokens at the ends of every document: `<s>` where it begins, `</s>` where it ends;
    `none` (published): no special token is in the stream. Needs `corpus.documents`."""


class LoadedTokenizer(Spec):
    """An existing fast tokenizer."""

    kind: Literal["pretrained"]
    path: HubName
    """A Hugging Face tokenizer directory, a `tokenizer.json`, or a hub id."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Of a hub id: as that of a model."""
    document_tokens: DocumentTokens = "none"
    """Special tokens at the ends of every document: the tokenizer's `bos_token` where it begins,
    its `eos_token` where it ends; `none` (published): no special token is in the stream. Needs
    `corpus.documents`."""


TokenizerSpec = Annotated[TrainedTokenizer | LoadedTokenizer, Field(discriminator="kind")]


class Phases(Spec):
    """Offsets that repeat, so that teachers can be remembered."""

    phases: PositiveInt
    """K: in epoch e every window is shifted by `(e mod K) * length // K` tokens."""


Offsets = Annotated[
    Annotated[Literal["fixed", "random"], Tag("word")] | Annotated[Phases, Tag("Phases")],
    Discriminator(lambda value: "Phases" if isinstance(value, dict | Phases) else "word"),
]


class WindowsSpec(Spec):
    """How the token stream is cut into training examples."""

    length: Annotated[int, Field(ge=2)] = 128
    """Tokens in a window."""
    offsets: Offsets = "random"
    """`fixed`: window i starts at token `i * length` in every epoch; `random` (published): it is
    shifted by an offset in [0, length) drawn from (seed, epoch, i); `{phases: K}`: by one of K
    offsets, used in turn, the same for every seed."""
    attention: Literal["window", "document"] = "window"
    """What a position attends to: all earlier ones of its window (`window`, published), or those
    of its own document alone, with positions counted anew and no label across the boundary
    (`document`). Needs `corpus.documents`. Only under `distillation.soft_reduction: token` is a
    batch's loss then that of its documents one by one: see docs/documents.md."""
    order: Literal["seeded", "published"] = "seeded"
    """`seeded`: every stage visits windows, and draws offsets, by its own seed; `published`: all
    models by seed 42, in the order that Hugging Face's trainer gave those of BabyLlama-2."""

    @field_validator("offsets")
    @classmethod
    def _one_phase_is_fixed(cls, offsets: Offsets) -> Offsets:
        """One experiment, one way to write it down: fingerprints compare the words."""
        return "fixed" if offsets == Phases(phases=1) else offsets

    @property
    def num_phases(self) -> int | None:
        """Offsets that are used in turn; none: they never repeat."""
        if isinstance(self.offsets, Phases):
            return self.offsets.phases
        return 1 if self.offsets == "fixed" else None
