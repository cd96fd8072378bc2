"""What both sides of the benchmark have in common: models, weights, tokens and batches.

Sizes enter; a job, models with the same initial weights in every process, and the windows of every
batch leave. Tokens are drawn at random: what they are does not change how long a step takes.
"""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine.distributed import Device
from babyllama_ds.models.build import build_model
from babyllama_ds.models.sizes import Vocabulary
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.training.meter import work_of

NUM_BATCHES = 8
"""Batches in an epoch."""
TEMPERATURE, ALPHA = 2.0, 0.5
"""Of the published recipes."""


class Shape(Protocol):
    """What of a workload says which tokens are in which batch."""

    @property
    def vocab_size(self) -> int:
        """Tokens."""

    @property
    def length(self) -> int:
        """Tokens in a window."""

    @property
    def batch_windows(self) -> int:
        """Windows in an optimizer step."""

    @property
    def tokens(self) -> int:
        """Tokens in an optimizer step."""


STUDENT = {"kind": "llama", "hidden_size": 256, "num_layers": 6, "num_heads": 4}
TEACHER = {"hidden_size": 384, "num_layers": 8, "num_heads": 6}
GPT2_TEACHER = {"kind": "gpt2", **TEACHER, "tied_embeddings": False, "dropout": 0.0}
LLAMA_TEACHER = {"kind": "llama", **TEACHER, "intermediate_size": 1024}


@dataclass(frozen=True)
class Sizes:
    """One workload."""

    vocab_size: int = 8192
    length: int = 128
    """Tokens in a window."""
    batch_windows: int = 32
    student: dict[str, Any] = field(
        default_factory=lambda: {**STUDENT, "intermediate_size": 704},
    )
    teachers: tuple[dict[str, Any], ...] = (GPT2_TEACHER, LLAMA_TEACHER)

    @property
    def tokens(self) -> int:
        """Tokens in an optimizer step."""
        return self.batch_windows * self.length

    def flops_per_token(self, *, cached: bool) -> float:
        """Of a step's matrix products: student forward and backward, teachers forward."""
        spec = job(self)
        return work_of(
            spec.student.model,
            [teacher.model for teacher in spec.teachers],
            length=self.length,
            micro_batch=self.batch_windows,
            vocab_size=self.vocab_size,
            cache="hidden" if cached else "none",
            where="bench",
        ).flops_per_token

    def as_json(self) -> dict[str, Any]:
        """Plain data, for a process of a side and for the record."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Sizes:
        """The inverse of `as_json`."""
        return cls(**{**plain, "teachers": tuple(plain["teachers"])})

    def with_teachers(self, number: int) -> Sizes:
        """The first `number` of this workload's teachers, over and over."""
        return replace(self, teachers=tuple(self.teachers[k % 2] for k in range(number)))


DEFAULT = Sizes()
SMALL = Sizes(
    vocab_size=384,
    length=32,
    batch_windows=4,
    student={
        **STUDENT,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 64,
    },
    teachers=(
        {**GPT2_TEACHER, "hidden_size": 32, "num_layers": 1, "num_heads": 2},
        {**LLAMA_TEACHER, "hidden_size": 48, "num_layers": 1, "num_heads": 2},
    ),
)
"""Seconds: shows that the harness works, measures nothing."""
SIZES = {"default": DEFAULT, "small": SMALL}


def job(sizes: Sizes, *, cache: str | None = None) -> JobSpec:
    """The job that a user would write for this workload."""
    training = {"batch_windows": sizes.batch_windows, "epochs": 1.0, "learning_rate": 3e-4}
    distillation: dict[str, Any] = {"alpha": ALPHA, "temperature": TEMPERATURE}
    if cache is not None:
        distillation["cache"] = cache
    return JobSpec.model_validate(
        {
            "name": "bench",
            "corpus": {"kind": "nursery"},
            "tokenizer": {"kind": "bpe", "vocab_size": sizes.vocab_size},
            "windows": {"length": sizes.length, "offsets": "fixed"},
            "teachers": tuple(
                {"name": f"t{k}", "model": _long_enough(model, sizes), "training": training}
                for k, model in enumerate(sizes.teachers)
            ),
            "student": {"model": _long_enough(sizes.student, sizes), "training": training},
            "distillation": distillation,
        }
    )


def _long_enough(model: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    return {**model, "max_positions": max(256, sizes.length)}


def build(spec: ModelSpec, sizes: Shape, *, stage: str, attention: str) -> nn.Module:
    """A model in fp32, as a job has it, with the same weights wherever it is built.

    On the CPU, or within `with device:` on that device, where a large one takes no time. Which
    weights a seed gives depends on the kind of device.
    """
    seed = 1 + sum(map(ord, stage))
    return build_model(
        spec,
        cast(PreTrainedTokenizerBase, Vocabulary(sizes.vocab_size)),
        seed=seed,
        attention=attention,
        where=stage,
    )


def build_published(spec: ModelSpec, sizes: Shape, *, stage: str, attention: str) -> nn.Module:
    """The same weights in transformers' own modules, with GPT-2's published activation."""
    ours = build(spec, sizes, stage=stage, attention=attention)
    config = copy.deepcopy(ours.config)
    if config.model_type == "gpt2":
        config.activation_function = "gelu_new"
    theirs: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def windows(sizes: Shape) -> TrainWindows:
    """The training windows, at fixed places."""
    tokens = _RandomTokens(sizes.vocab_size, NUM_BATCHES * sizes.tokens)
    return TrainWindows(tokens, length=sizes.length, offsets="fixed", seed=0)  # type: ignore[arg-type]


def machine() -> tuple[Device, int]:
    """(device, units that work is shared out to: CUDA devices, or the cores we may use)."""
    import torch

    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", len(os.sched_getaffinity(0))


class _RandomTokens:
    """As much of `TokenShards` as windows take."""

    def __init__(self, vocab_size: int, number: int) -> None:
        self._ids = np.random.default_rng(0).integers(3, vocab_size, number)

    def num_tokens(self, split: str) -> int:
        return len(self._ids)

    def gather(self, split: str, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        places: NDArray[np.int64] = starts[:, None] + np.arange(length)
        return self._ids[places]
