"""The text of a job: where it comes from, how it becomes token ids, how those become windows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator

from babyllama_ds.spec.base import Spec


class NurseryCorpus(Spec):
    """Child-directed English made by the embedded grammar, deterministic from the job's seed."""

    kind: Literal["nursery"]
    words: Annotated[int, Field(ge=1_000)] = 150_000
    """Words of training text, about (whole scenes are written)."""
    dev_words: Annotated[int, Field(ge=200)] = 15_000
    """Words of held-out text, about."""
    pairs_per_task: PositiveInt = 100
    """Minimal pairs made for each grammatical phenomenon."""


class HeldOutFiles(Spec):
    """Development text is given as files of its own."""

    kind: Literal["held_out"]
    dev: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs of the development text."""


class TailOfEachFile(Spec):
    """The last lines of every training file are held out (BabyLlama-2: the last 5 %)."""

    kind: Literal["tail"]
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of each file's lines that is held out; the cut is `round((1 - fraction) * lines)`."""


class FilesCorpus(Spec):
    """Plain text files; the file name's stem is the domain (`childes.train` -> `childes`)."""

    kind: Literal["files"]
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`.txt`, `.train`, `.dev`); matches are read in sorted order."""
    split: Annotated[HeldOutFiles | TailOfEachFile, Field(discriminator="kind")]
    """Where development text comes from."""
    cleaning: Literal["babylm", "none"] = "babylm"
    """`babylm`: BabyLlama's rules per domain, their known bugs fixed; `none`: text as it is."""


CorpusSpec = Annotated[NurseryCorpus | FilesCorpus, Field(discriminator="kind")]


# -- tokenizer and windows ----------------------------------------------------------------------


class TrainedTokenizer(Spec):
    """Byte-level BPE trained on the training text (NFKC; `<pad>` 0, `<s>` 1, `</s>` 2)."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=260)] = 16_000
    """Rows of the embedding: 3 special tokens, 256 bytes, merges."""
    min_frequency: PositiveInt = 2
    """Occurrences that a merge needs."""


class LoadedTokenizer(Spec):
    """An existing fast tokenizer."""

    kind: Literal["pretrained"]
    path: str
    """A Hugging Face tokenizer directory, a `tokenizer.json`, or a hub id."""


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
