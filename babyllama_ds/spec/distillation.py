"""The loss of a distilled student, and how its teachers are remembered."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from babyllama_ds.spec.base import Mismatch, Spec
from babyllama_ds.spec.corpus import WindowsSpec


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
