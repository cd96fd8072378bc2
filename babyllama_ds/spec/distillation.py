"""The loss of a distilled student, and how its teachers are remembered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from babyllama_ds.spec.base import Mismatch, Name, Spec, consistent
from babyllama_ds.spec.corpus import WindowsSpec

# -- how far the student is from its teachers -----------------------------------------------------

Between = Annotated[float, Field(gt=0, lt=1)]


class ForwardKL(Spec):
    """KL(teachers || student): the published one; the student covers what teachers may say."""

    kind: Literal["forward_kl"]


class ReverseKL(Spec):
    """KL(student || teachers) (MiniLLM): the student keeps to what teachers surely say."""

    kind: Literal["reverse_kl"]


class JensenShannon(Spec):
    """beta KL(teachers || m) + (1 - beta) KL(student || m), m = beta teachers + (1 - beta) student
    (GKD's generalized Jensen-Shannon divergence)."""

    kind: Literal["jensen_shannon"]
    beta: Between = 0.5
    """The teachers' share of m; towards 0 it becomes beta times the forward KL, towards 1
    1 - beta times the reverse KL."""


class SkewedForwardKL(Spec):
    """KL(teachers || skew teachers + (1 - skew) student) (DistiLLM)."""

    kind: Literal["skewed_forward_kl"]
    skew: Between = 0.1
    """The share of the distribution on the left that is mixed into the one on the right."""


class SkewedReverseKL(Spec):
    """KL(student || (1 - skew) teachers + skew student) (DistiLLM)."""

    kind: Literal["skewed_reverse_kl"]
    skew: Between = 0.1
    """The share of the distribution on the left that is mixed into the one on the right."""


DivergenceSpec = Annotated[
    ForwardKL | ReverseKL | JensenShannon | SkewedForwardKL | SkewedReverseKL,
    Field(discriminator="kind"),
]


# -- what changes in the course of a training -----------------------------------------------------


class AlphaSchedule(Spec):
    """An alpha that changes in the course of the training."""

    start: Annotated[float, Field(ge=0, le=1)]
    """At the first step."""
    end: Annotated[float, Field(ge=0, le=1)]
    """From `over` on."""
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training's optimizer steps after which `end` is reached."""
    shape: Literal["linear", "cosine"] = "linear"
    """The way from `start` to `end`: straight, or half a cosine."""


Degree = Annotated[float, Field(ge=0.001, le=1000)]
"""A temperature. Far beyond these limits fp32 holds neither T^2 nor what logits divided by T differ
by."""


class TemperatureSchedule(Spec):
    """A temperature that changes in the course of the training."""

    start: Degree
    """At the first step."""
    end: Degree
    """From `over` on."""
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training's optimizer steps after which `end` is reached."""
    shape: Literal["linear", "cosine"] = "linear"
    """The way from `start` to `end`: straight, or half a cosine."""


Alpha = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")]
    | Annotated[AlphaSchedule, Tag("AlphaSchedule")],
    Discriminator(
        lambda value: "AlphaSchedule" if isinstance(value, dict | AlphaSchedule) else "number"
    ),
]
Temperature = Annotated[
    Annotated[Degree, Tag("number")] | Annotated[TemperatureSchedule, Tag("TemperatureSchedule")],
    Discriminator(
        lambda value: (
            "TemperatureSchedule" if isinstance(value, dict | TemperatureSchedule) else "number"
        )
    ),
]


def scheduled(value: float | AlphaSchedule | TemperatureSchedule, done: float) -> float:
    """An alpha or temperature when the share `done`, in [0, 1], of the training's steps is done.

    A pure function, so that resuming needs no state.
    """
    if not isinstance(value, AlphaSchedule | TemperatureSchedule):
        return value
    way = done / value.over
    if way >= 1:
        return value.end
    if value.shape == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    return value.start + (value.end - value.start) * way


# -- the teachers' hidden states ------------------------------------------------------------------


class LayerPair(Spec):
    """A layer of a teacher, and the student's that is to be like it.

    Layers as transformers counts its hidden states: 0 the embeddings, i the output of layer i,
    and that of the last layer is normed.
    """

    teacher: Name
    """The teacher's name."""
    teacher_layer: NonNegativeInt
    """From 0 to the number of its layers."""
    student_layer: NonNegativeInt
    """From 0 to the number of the student's layers."""


class HiddenMatching(Spec):
    """weight * sum over pairs of layers of the distance of W h_student from h_teacher, a mean over
    the valid positions of the global batch; W is a matrix of each pair, trained with the student
    and not exported with it (TinyBERT)."""

    loss: Literal["mse", "cosine"] = "mse"
    """`mse`: the squared difference, a mean over the teacher's width; `cosine`: 1 - cosine."""
    weight: PositiveFloat
    """Beside alpha and 1 - alpha, neither of which touches it."""
    layers: Annotated[tuple[LayerPair, ...], Field(min_length=1)]
    """The pairs."""


# -- the whole ------------------------------------------------------------------------------------


class DistillationSpec(Spec):
    """L = alpha CE + (1 - alpha) T^2 KL(teachers || student), KL and CE divided by the
    counts of the global batch (`losses.weights.loss_counts`)."""

    alpha: Alpha = 0.5
    """Weight of the hard labels' cross-entropy; or a schedule of it."""
    temperature: Temperature = 2.0
    """T, dividing the logits of teachers and student in the KL; or a schedule of it."""
    divergence: DivergenceSpec = ForwardKL(kind="forward_kl")
    """What stands in the place of the KL; T^2 and the counts are the same for all."""
    hidden_matching: HiddenMatching | None = None
    """A term for hidden states in the middle of the models; none: none."""
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
    cache_kept: bool = True
    """Whether the cache is written to the store, too, where the disk has room for it; false: it is
    kept in memory alone, and every start computes it again."""
    cache_top_k: Annotated[int, Field(ge=1, le=1024)] = 64
    """Tokens that `topk` keeps at each position."""

    @model_validator(mode="after")
    def _the_cache_holds_what_is_needed(self) -> DistillationSpec:
        found = []
        if self.cache == "topk" and self.divergence.kind != "forward_kl":
            found.append(
                Mismatch(
                    ("divergence", "kind"),
                    f"{self.divergence.kind} with cache: topk",
                    "forward_kl",
                    "the cache knows of all but the k likeliest tokens only how likely they are "
                    "together, and this divergence weighs each by the student's probability: set "
                    "distillation.cache=hidden",
                )
            )
        if self.cache == "topk" and isinstance(self.temperature, TemperatureSchedule):
            found.append(
                Mismatch(
                    ("temperature",),
                    "a schedule with cache: topk",
                    "a number",
                    "the cache holds the teachers' probabilities at one temperature: set "
                    "distillation.cache=hidden",
                )
            )
        if self.cache_tier == "disk" and not self.cache_kept:
            found.append(
                Mismatch(
                    ("cache_kept",),
                    "false with cache_tier: disk",
                    "true",
                    "what is read from the disk has to be there: set "
                    "distillation.cache_tier=auto, device or host",
                )
            )
        if self.cache != "none" and self.hidden_matching is not None:
            found.append(
                Mismatch(
                    ("cache",),
                    f"{self.cache} with hidden_matching",
                    "none",
                    "a cache keeps no states from the middle of a teacher",
                )
            )
        return consistent(self, found)

    @property
    def is_scheduled(self) -> bool:
        """Whether alpha or temperature change in the course of the training."""
        return isinstance(self.alpha, AlphaSchedule) or isinstance(
            self.temperature, TemperatureSchedule
        )

    @property
    def fixed_temperature(self) -> float:
        """T, where it is a number."""
        assert not isinstance(self.temperature, TemperatureSchedule), "refused with a topk cache"
        return self.temperature


def no_use_of_a_cache(cache: str, windows: WindowsSpec, epochs: float) -> list[Mismatch]:
    """What keeps a cache from being of any use: windows that do not come twice."""
    if windows.num_phases is None:
        expected = "none, since windows.offsets are random: no window comes twice"
        hint = f"set windows.offsets={{phases: K}}, K up to {math.ceil(epochs)} (the epochs)"
        return [Mismatch(("cache",), cache, expected, hint)]
    if windows.num_phases > math.ceil(epochs):
        got = f"{cache} over {windows.num_phases} phases"
        expected = f"at most as many phases as epochs ({epochs:g})"
        return [Mismatch(("cache",), got, expected, "lower windows.offsets.phases")]
    return []


def unknown_layers(
    matching: HiddenMatching,
    teacher_layers: Mapping[str, int | None],
    student_layers: int | None,
) -> list[Mismatch]:
    """Layers that the models do not have; of models whose depth is not known (None) any will do.

    Keys start at the matching; teachers are those that `teacher_layers` knows.
    """
    found = []
    for i, pair in enumerate(matching.layers):
        asked = (
            ("teacher_layer", pair.teacher_layer, pair.teacher, teacher_layers.get(pair.teacher)),
            ("student_layer", pair.student_layer, "the student", student_layers),
        )
        for key, layer, whose, depth in asked:
            if depth is not None and layer > depth:
                expected = f"at most {depth}: {whose} has {depth} layers"
                hint = "0 is the embeddings, 1 the first layer's output"
                found.append(Mismatch(("layers", i, key), layer, expected, hint))
    return found
