"""The job: one frozen tree of validated values that describes an experiment.

Enters: plain data (from `spec.loading`). Leaves: a `JobSpec`, every default spelled out.
Every field carries its unit in its name or its docstring. Nothing here touches the disk, the
network or a device: a job is checked on any machine, with or without its data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A name that becomes a file or folder name."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every random generator we use accepts."""

T = TypeVar("T")

Attention = Literal[
    "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "eager"
]


@dataclass(frozen=True)
class Mismatch:
    """Values that are each fine and do not fit together; `key` starts at the validated part."""

    key: tuple[str | int, ...]
    got: object
    expected: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.key))}: got {self.got}, expected {self.expected}"


class MismatchError(ValueError):
    """What a validator raises: every mismatch it found, for `spec.explain` to place."""

    def __init__(self, mismatches: Sequence[Mismatch]) -> None:
        self.mismatches = tuple(mismatches)
        super().__init__("; ".join(map(str, mismatches)))


class Spec(BaseModel):
    """What all parts of a job have in common: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


# -- corpus -------------------------------------------------------------------------------------


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


# -- models -------------------------------------------------------------------------------------


class LlamaModel(Spec):
    """A LLaMA built from random initialisation (SiLU, RMSNorm, RoPE, no biases)."""

    kind: Literal["llama"]
    hidden_size: PositiveInt
    """Width."""
    num_layers: PositiveInt
    """Decoder layers."""
    num_heads: PositiveInt
    """Attention heads; divides `hidden_size`."""
    num_kv_heads: PositiveInt | None = None
    """Key-value heads (grouped-query attention); none: as many as heads."""
    intermediate_size: PositiveInt
    """Width inside the gated MLP."""
    max_positions: PositiveInt = 256
    """Longest sequence."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding."""
    norm_epsilon: PositiveFloat = 1e-6
    """RMSNorm epsilon."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tied_embeddings: bool = False
    """Whether the head shares the embedding's weights."""
    attention: Attention = "auto"
    """Attention kernel; `auto`: FlashAttention where installed and usable, else PyTorch's own."""

    @model_validator(mode="after")
    def _heads_fit(self) -> LlamaModel:
        found = _not_divisible(self, "hidden_size", "num_heads")
        if not found and self.hidden_size // self.num_heads % 2:
            size = self.hidden_size // self.num_heads
            found.append(
                Mismatch(
                    ("hidden_size",),
                    f"{self.hidden_size} for {self.num_heads} heads of {size}",
                    "an even head size",
                    hint="rotary embedding turns pairs of numbers",
                )
            )
        if self.num_kv_heads:
            found += _not_divisible(self, "num_heads", "num_kv_heads")
        return _consistent(self, found)


class Gpt2Model(Spec):
    """A GPT-2 built from random initialisation (GELU, LayerNorm, learned positions)."""

    kind: Literal["gpt2"]
    hidden_size: PositiveInt
    """Width."""
    num_layers: PositiveInt
    """Decoder layers."""
    num_heads: PositiveInt
    """Attention heads; divides `hidden_size`."""
    intermediate_size: PositiveInt | None = None
    """Width inside the MLP; none: `4 * hidden_size`."""
    max_positions: PositiveInt = 256
    """Longest sequence (rows of the position embedding)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout of residuals, embeddings and attention."""
    norm_epsilon: PositiveFloat = 1e-5
    """LayerNorm epsilon."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tied_embeddings: bool = True
    """Whether the head shares the embedding's weights."""
    attention: Attention = "auto"
    """Attention kernel; `auto`: FlashAttention where installed and usable, else PyTorch's own."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Gpt2Model:
        return _consistent(self, _not_divisible(self, "hidden_size", "num_heads"))


class PretrainedModel(Spec):
    """Any causal language model that transformers can load (safetensors only)."""

    kind: Literal["pretrained"]
    path: str
    """A Hugging Face model directory or hub id."""
    attention: Attention = "auto"
    """Attention kernel; `auto`: FlashAttention where installed and usable, else PyTorch's own."""


ModelSpec = Annotated[LlamaModel | Gpt2Model | PretrainedModel, Field(discriminator="kind")]


# -- training -----------------------------------------------------------------------------------


MicroBatch = Annotated[
    Annotated[PositiveInt, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(lambda value: "word" if value == "auto" else "number"),
]


class TrainingSpec(Spec):
    """How one model is trained. Training ends at the first of the limits given."""

    batch_windows: PositiveInt
    """Windows in one optimizer step, over all ranks and micro-batches."""
    micro_batch: MicroBatch | None = None
    """Windows in one forward pass of one rank; `auto`: the largest that fits in memory, tried out
    before training; none: the rank's whole share of the batch. Accumulation steps are derived:
    `batch_windows / (micro_batch * ranks)`."""
    epochs: PositiveFloat
    """Passes over the training windows; may be a fraction."""
    max_steps: PositiveInt | None = None
    """Limit on optimizer steps."""
    max_tokens: PositiveInt | None = None
    """Limit on tokens seen."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Decay to zero after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from zero."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices and embeddings (norms and biases are not decayed)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """AdamW's moment decay rates."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; none: no clipping."""
    evaluate_every_steps: PositiveInt | None = None
    """Optimizer steps between evaluations on development windows; none: once an epoch."""
    evaluate_windows: PositiveInt | None = None
    """Development windows (evenly spaced) in an evaluation during training; none: all."""
    keep: Literal["best", "last"] = "best"
    """The weights that leave: lowest development cross-entropy, or the last step's."""
    checkpoint_every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; none: at every evaluation."""
    log_every_steps: PositiveInt = 10
    """Optimizer steps between logged lines."""
    profile_steps: PositiveInt | None = None
    """Optimizer steps, after the first one of a start, whose parts are timed and told (data,
    teachers, student, loss, backward, optimizer, communication); none: none. On an accelerator
    these steps are slower: each part waits for the device."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> TrainingSpec:
        found = []
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            found.append(
                Mismatch(("warmup_steps",), self.warmup_steps, f"< max_steps ({self.max_steps})")
            )
        if isinstance(self.micro_batch, int) and self.batch_windows % self.micro_batch:
            fitting = [n for n in range(1, self.micro_batch) if self.batch_windows % n == 0]
            found.append(
                Mismatch(
                    ("micro_batch",),
                    self.micro_batch,
                    f"a divisor of batch_windows ({self.batch_windows})",
                    hint=f"the next smaller one is {fitting[-1]}",
                )
            )
        return _consistent(self, found)


class TeacherSpec(Spec):
    """A teacher: trained by this job (`training` given) or loaded (`model.kind: pretrained`)."""

    name: Name
    """Its folder, and its name in metrics and report."""
    model: ModelSpec
    """What it is."""
    training: TrainingSpec | None = None
    """How it is trained; none: it is used as loaded."""
    weight: PositiveFloat = 1.0
    """Its share of the ensemble, relative to the other teachers' weights."""
    seed: Seed | None = None
    """Seed of its initialisation and data order; none: derived from the job's seed and its name."""
    tensor_parallel: PositiveInt = 1
    """Ranks over which the frozen teacher is split; above 1 is refused: data-parallel ranks
    would each bring other windows to one split model."""

    @model_validator(mode="after")
    def _usable(self) -> TeacherSpec:
        found = []
        if self.training is None and self.model.kind != "pretrained":
            hint = f"a {self.model.kind} starts from random weights; give `training`, or load one"
            found.append(Mismatch(("training",), "nothing", "how it is trained", hint))
        if self.tensor_parallel > 1:
            hint = "data-parallel ranks would each bring other windows to one split model"
            found.append(Mismatch(("tensor_parallel",), self.tensor_parallel, "1", hint))
        return _consistent(self, found)


class StudentSpec(Spec):
    """The model that is distilled."""

    model: ModelSpec
    """What it is; `pretrained` warm-starts it."""
    training: TrainingSpec
    """How it is trained."""
    seed: Seed | None = None
    """Seed of its initialisation and data order; none: derived from the job's seed."""


class ControlSpec(Spec):
    """The same student, same initialisation and data order, trained without teachers."""

    training: TrainingSpec | None = None
    """Its own training; none: the student's."""


class DistillationSpec(Spec):
    """L = alpha CE + (1 - alpha) T^2 KL(teachers || student), KL and CE divided by the
    counts of the global batch (`losses.weights.loss_counts`)."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the hard labels' cross-entropy."""
    temperature: PositiveFloat = 2.0
    """T, dividing the logits of teachers and student in the KL."""
    soft_reduction: Literal["sequence", "token"] = "sequence"
    """KL divided by windows (`sequence`, as published: it outweighs CE by the window length) or
    by positions (`token`)."""
    mean_of: Literal["logits", "probabilities"] = "logits"
    """What is averaged over teachers: raw logits (as published), or tempered probabilities."""
    chunk_tokens: PositiveInt | None = None
    """Positions whose logits exist at one time; none: chosen from the vocabulary's size."""
    cache: Literal["none", "hidden", "topk"] = "none"
    """Teachers computed once for each distinct window: `hidden` keeps their final hidden states
    (exact), `topk` the ensemble's most probable tokens (small, an approximation)."""
    cache_tier: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the cache is read from: the accelerator's memory, the host's, or mapped files;
    `auto`: the first that it fits."""
    cache_top_k: Annotated[int, Field(ge=1, le=1024)] = 64
    """Tokens that `topk` keeps at each position."""


# -- the rest -----------------------------------------------------------------------------------


class DeepSpeedSpec(Spec):
    """What DeepSpeed runs on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one. A device asked for by name must be there."""
    config: str = "auto"
    """A shipped configuration (`zero2_cuda`, `zero2_cpu`), a path to a JSON file, or `auto`:
    the shipped one for the device."""
    compile: Literal["auto", "none", "student", "all"] = "auto"
    """What torch.compile makes faster: the models that are trained (`student`), the frozen
    teachers beside them too (`all`), or nothing; `auto`: see docs/decisions/compiling.md."""


class MinimalPairs(Spec):
    """A directory of BLiMP-format files: one task a file, `sentence_good`, `sentence_bad`."""

    name: Name
    """The benchmark's name in the report."""
    path: str
    """Directory of `*.jsonl`."""


class EvaluationSpec(Spec):
    """What finished models are measured on. Changing it retrains nothing."""

    minimal_pairs: tuple[MinimalPairs, ...] = ()
    """Benchmarks; the nursery corpus adds its own."""
    max_pairs_per_task: PositiveInt | None = None
    """Only the first pairs of each task, for a quick look; none: all."""
    dev_windows: PositiveInt | None = None
    """Development windows, evenly spaced, that finished models are measured on; none: all."""
    leading_space: bool = True
    """Whether sentences are tokenized with a leading space, as inside running text."""
    batch_tokens: PositiveInt = 8_192
    """Tokens, padding included, in one forward pass of one rank."""

    @field_validator("minimal_pairs")
    @classmethod
    def _names_differ(cls, sets: tuple[MinimalPairs, ...]) -> tuple[MinimalPairs, ...]:
        return _consistent(sets, _repeated_names([one.name for one in sets]))


class JobSpec(Spec):
    """An experiment, from raw text to an evaluated student."""

    name: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]|\{seed\}){0,63}$"),
    ]
    """Name of the run's folder; may hold `{seed}`."""
    seed: Seed = 1
    """Every stage derives its own seed from this one and its name."""
    corpus: CorpusSpec
    """Where text comes from."""
    tokenizer: TokenizerSpec
    """How text becomes token ids."""
    windows: WindowsSpec = WindowsSpec()
    """How tokens become training examples."""
    teachers: Annotated[tuple[TeacherSpec, ...], Field(min_length=1)]
    """The ensemble."""
    student: StudentSpec
    """The model that is distilled."""
    control: ControlSpec | None = None
    """The undistilled twin of the student; none: not trained."""
    distillation: DistillationSpec = DistillationSpec()
    """The loss."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """The engine."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """The measurements."""

    # Per field, not on the whole: each is then checked even where another part is wrong.

    @field_validator("teachers")
    @classmethod
    def _teachers_fit(
        cls, teachers: tuple[TeacherSpec, ...], info: ValidationInfo
    ) -> tuple[TeacherSpec, ...]:
        found = _repeated_names([teacher.name for teacher in teachers])
        found += [
            Mismatch((i, "name"), repr(teacher.name), "another name", hint="it is taken")
            for i, teacher in enumerate(teachers)
            if teacher.name in RESERVED_NAMES
        ]
        for i, teacher in enumerate(teachers):
            found += _too_few_positions((i, "model"), teacher.model, info.data.get("windows"))
        return _consistent(teachers, found)

    @field_validator("student")
    @classmethod
    def _student_fits(cls, student: StudentSpec, info: ValidationInfo) -> StudentSpec:
        found = _too_few_positions(("model",), student.model, info.data.get("windows"))
        return _consistent(student, found)

    @field_validator("distillation")
    @classmethod
    def _windows_repeat(
        cls, distillation: DistillationSpec, info: ValidationInfo
    ) -> DistillationSpec:
        windows, student = info.data.get("windows"), info.data.get("student")
        if distillation.cache == "none" or windows is None or student is None:
            return distillation
        return _consistent(
            distillation, _no_use_of_a_cache(distillation.cache, windows, student.training.epochs)
        )

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        taken = [Mismatch((), repr(name), "another name", hint="runs share a folder of that name")]
        return _consistent(name, taken if name == "store" else [])

    @property
    def run_name(self) -> str:
        """The run's folder: `name` with `{seed}` filled in."""
        return self.name.replace("{seed}", str(self.seed))

    def stage_seed(self, stage: str) -> int:
        """The seed of a stage: its own if the job names one, else derived."""
        own = {f"teachers/{teacher.name}": teacher.seed for teacher in self.teachers}
        own["student"] = own["control"] = self.student.seed
        if own.get(stage) is not None:
            return int(own[stage])  # type: ignore[arg-type]
        # The control is the student's twin: same initialisation, same data order.
        return derive_seed(self.seed, "student" if stage == "control" else stage)


RESERVED_NAMES = ("student", "control")
"""Models of every run, beside its teachers."""


def derive_seed(seed: int, stage: str) -> int:
    """A 63-bit seed from the job's seed and a stage's name (SHA-256, the same everywhere)."""
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _consistent(value: T, found: Sequence[Mismatch]) -> T:
    if found:
        raise MismatchError(found)
    return value


def _not_divisible(model: LlamaModel | Gpt2Model, key: str, divisor: str) -> list[Mismatch]:
    number, by = getattr(model, key), getattr(model, divisor)
    if number % by == 0:
        return []
    lower = number // by * by
    fitting = f"{lower} or {lower + by}" if lower else str(by)
    return [Mismatch((key,), number, f"a multiple of {divisor} ({by})", hint=f"{fitting} would do")]


def _repeated_names(names: Sequence[str]) -> list[Mismatch]:
    return [
        Mismatch((i, "name"), repr(name), "a name of its own", hint=f"number {first} has it too")
        for i, name in enumerate(names)
        if (first := names.index(name)) != i
    ]


def _no_use_of_a_cache(cache: str, windows: WindowsSpec, epochs: float) -> list[Mismatch]:
    if windows.num_phases is None:
        expected = "none, since windows.offsets are random: no window comes twice"
        hint = f"set windows.offsets={{phases: K}}, K up to {math.ceil(epochs)} (the epochs)"
        return [Mismatch(("cache",), cache, expected, hint)]
    if windows.num_phases > math.ceil(epochs):
        got = f"{cache} over {windows.num_phases} phases"
        expected = f"at most as many phases as epochs ({epochs:g})"
        return [Mismatch(("cache",), got, expected, "lower windows.offsets.phases")]
    return []


def _too_few_positions(
    key: tuple[str | int, ...], model: ModelSpec, windows: WindowsSpec | None
) -> list[Mismatch]:
    if windows is None or model.kind == "pretrained" or model.max_positions >= windows.length:
        return []
    expected = f">= windows.length ({windows.length})"
    return [Mismatch((*key, "max_positions"), model.max_positions, expected)]
