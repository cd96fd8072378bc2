"""Memory of one rank: a stage, a number of ranks and a machine enter; bytes by item leave.

A training's memory has several high points. At each, other things are there at once:

    cache       teachers fill the cache, the student is not there yet
    teaching    teachers that are split over ranks run on the windows of all of a group
    start       the model in fp32, before the engine casts it
    forward     activations whole, the loss's chunk of logits, the head's gradient
    backward    gradients travel: buckets, their fp32 copies, the owned partition (`plan.gradients`)
    update      the owned partition, and masters and moments change
    evaluation  a larger batch, without gradients
    checkpoint  rank 0 gathers masters and moments in host memory

The plan's peak is the highest of them. What DeepSpeed holds all the time under ZeRO-2 was read off
its source (0.19.8, `runtime/zero/stage_1_and_2.py`): parameters in one flat buffer of the model's
dtype; a partition of fp32 masters; AdamW's two moments of it.

On a CPU the allocator counts too: glibc keeps much of what a forward pass frees between the
tensors that stay, and gives none of it back in the backward pass.

P parameters, N ranks, e bytes of a number (bf16 2, fp32 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from babyllama_ds.engine.muon import TOGETHER
from babyllama_ds.losses.chunks import default_chunk_tokens
from babyllama_ds.models.sizes import ModelSizes
from babyllama_ds.plan.activations import (
    MicroBatchShape,
    recomputed_bytes,
    saved_bytes,
    working_bytes,
)
from babyllama_ds.plan.gradients import GradientBytes, gradient_bytes
from babyllama_ds.spec.deepspeed import precision
from babyllama_ds.spec.deepspeed_file import ZeroBlock

_FP32 = 4
_MOMENTS = 2
KEPT_BY_GLIBC = 0.5
KEPT_AT_LEAST_BYTES = 120 * 2**20
"""Kept by glibc's malloc beside the tensors, as a part of the activations, and at least: fitted to
what was measured, see docs/plan.md."""
_REST_OF_LOSS_BYTES = 16
"""Bytes of a position: its label, validity, CE and KL."""

Item = Literal[
    "parameters",
    "master weights, fp32",
    "moments, fp32",
    "moving average, fp32",
    "offloading",
    "gradients, fp32",
    "gradient buckets",
    "orthogonal updates",
    "best weights",
    "teachers",
    "teachers' hidden states",
    "states of matched layers",
    "teacher cache",
    "activations",
    "logits of a chunk",
    "teachers' heads side by side",
    "gradients of head and states",
    "work of a layer",
    "model before it is cast",
    "gathered checkpoint",
    "kept by the allocator",
]

Moment = Literal[
    "cache", "teaching", "start", "forward", "backward", "update", "evaluation", "checkpoint"
]


@dataclass(frozen=True, kw_only=True)
class HeldTeacher:
    """A teacher beside the student."""

    sizes: ModelSizes
    live: bool
    """False: its states are remembered, and its head alone is there."""
    parts: int = 1
    """Ranks that it is split over (`tensor_parallel`)."""

    @property
    def held_params(self) -> int:
        """Parameters on one rank: of split layers a part; embeddings, norms and the head whole."""
        if not self.live:
            return self.sizes.head_weights
        split = self.sizes.backbone_weights
        return self.sizes.params - split + split // self.parts


@dataclass(frozen=True, kw_only=True)
class MatchedPair:
    """Two layers whose hidden states are matched (`losses.matching`)."""

    teacher_width: int
    loss: Literal["mse", "cosine"]


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """Everything that the memory of one stage's rank depends on."""

    model: ModelSizes
    micro: MicroBatchShape
    accumulation: int
    """Micro-batches in a step."""
    ranks: int
    vocab_size: int
    chunk_tokens: int | None
    """Positions whose logits exist at one time; none: the loss chooses."""
    teachers: Sequence[HeldTeacher]
    summed: bool
    """Whether the teachers' logits are made as one sum, not apart (`losses.voters`)."""
    work_spaces: int
    """fp32 [C, V] that the loss works in: 3 with teachers' states (5 for another divergence than
    the forward KL), 2 with their most likely tokens, 1 without teachers (`losses.distillation`); 0
    where the Triton kernel does it."""
    cache_bytes: int
    """Bytes of the teacher cache in this device's memory."""
    host_cache_bytes: int
    """Bytes of the teacher cache in the host's memory, where that is another: one rank's copy."""
    filling: Sequence[Sequence[HeldTeacher]]
    """Teachers that are there together while a cache is filled, before the student comes."""
    evaluation_tokens: int
    """In one forward pass of an evaluation."""
    averaged: bool = False
    """Whether a moving average of the weights is kept (`ema`)."""
    muon: bool = False
    """Whether the layers' matrices have one moment instead of two (`muon`)."""
    deepspeed: Mapping[str, Any]
    """DeepSpeed's configuration."""
    matched: Sequence[MatchedPair] = ()

    @property
    def trained(self) -> int:
        """Parameters that the engine trains: the model's, and a matrix of each matched pair."""
        return self.model.params + sum(self._projections)

    @property
    def gradients(self) -> GradientBytes:
        """What the gradients of all of them take."""
        return gradient_bytes(
            self.deepspeed,
            [*self.model.parameter_sizes, *self._projections],
            ranks=self.ranks,
            accumulates=self.accumulation > 1,
            on_cpu=self.micro.device == "cpu",
        )

    @property
    def _projections(self) -> list[int]:
        return [self.model.hidden_size * pair.teacher_width for pair in self.matched]


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device at each high point, and in the host's memory where that is another."""

    moments: Mapping[Moment, Mapping[Item, int]]
    host_bytes: int
    """Host memory of rank 0, at most: a gathered checkpoint, the best weights, an offloaded
    optimizer. 0 on a CPU, where the device's numbers hold them."""
    host_cache_bytes: int
    """The copies of a teacher cache that all ranks hold in the host's memory; likewise 0 on a
    CPU."""

    @property
    def peak(self) -> Moment:
        """The highest point."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def items(self) -> Mapping[Item, int]:
        """What is there at the highest point."""
        return self.moments[self.peak]

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return sum(self.items.values())


def rank_memory(stage: StageShape) -> RankMemory:
    """The memory of the rank that needs most, rank 0."""
    on_cpu = stage.micro.device == "cpu"
    params = stage.trained
    best = stage.micro.element_bytes * params
    gathered = _state_bytes(stage)
    in_host = _host_share(stage)
    beside = _beside(stage)
    always = beside | _engine(stage)
    if on_cpu:
        always["best weights"] = best
    moments: dict[Moment, Mapping[Item, int]] = {
        "start": beside | {"model before it is cast": _FP32 * params},
        "forward": always | _forward(stage),
        "backward": always | _backward(stage),
        "update": always | _update(stage),
        "evaluation": always | _evaluation(stage),
    }
    if stage.filling:
        moments["cache"] = _filling(stage)
    if any(teacher.live and teacher.parts > 1 for teacher in stage.teachers):
        moments["teaching"] = always | _teaching(stage, stage.teachers)
    if on_cpu:
        moments["checkpoint"] = always | {"gathered checkpoint": gathered}
    return RankMemory(
        moments,
        host_bytes=0 if on_cpu else gathered + best + in_host,
        host_cache_bytes=stage.ranks * stage.host_cache_bytes,
    )


def chunk_bytes(stage: StageShape) -> int:
    """Room for a chunk's logits: e for each model or sum, and fp32 work spaces (`losses.chunks`).

    On a CPU the work spaces are as large as its caches, and left out.
    """
    tokens = stage.chunk_tokens or default_chunk_tokens(
        stage.vocab_size, torch.device(stage.micro.device)
    )
    each = (1 + (1 if stage.summed else len(stage.teachers))) * stage.micro.element_bytes
    if stage.micro.device == "cuda":
        each += stage.work_spaces * _FP32
    return min(tokens, stage.micro.tokens) * stage.vocab_size * each


# -- what is there all the time ------------------------------------------------------------------


def _beside(stage: StageShape) -> dict[Item, int]:
    """Teachers, and what is remembered of them."""
    e = stage.micro.element_bytes
    held: dict[Item, int] = {
        "teachers": sum(e * teacher.held_params for teacher in stage.teachers),
        "teacher cache": stage.cache_bytes,
    }
    return held


def _engine(stage: StageShape) -> dict[Item, int]:
    """Parameters whole; masters and moments in N parts, offloaded: elsewhere."""
    params, parts = stage.trained, stage.ranks
    offloaded = _offloads(stage) and stage.micro.device == "cuda"
    here = 0 if offloaded else 1
    return {
        "parameters": stage.micro.element_bytes * params,
        "master weights, fp32": here * _FP32 * params // parts,
        "moments, fp32": here * _FP32 * _moments(stage) // parts,
        "moving average, fp32": here * stage.averaged * _FP32 * params // parts,
        "offloading": _offloading(stage),
    }


def _moments(stage: StageShape) -> int:
    """Numbers of all moments."""
    twice = _MOMENTS * stage.trained
    return twice - stage.model.backbone_weights if stage.muon else twice


def _state_bytes(stage: StageShape) -> int:
    """Bytes of a checkpoint: masters, moments, and the moving average."""
    return _FP32 * ((1 + stage.averaged) * stage.trained + _moments(stage))


def _offloads(stage: StageShape) -> bool:
    return _zero(stage).offload_optimizer is not None


def _offloading(stage: StageShape) -> int:
    """What it takes where the model is: a buffer for the largest matrix, and on a CPU the rest."""
    if not _offloads(stage):
        return 0
    e, params = stage.micro.element_bytes, stage.trained
    rest = (_FP32 + e) * params // stage.ranks if stage.micro.device == "cpu" else 0
    return e * stage.model.head_weights + rest


def _host_share(stage: StageShape) -> int:
    """A rank's optimizer in the host's memory, its gradients and new weights beside it."""
    if not _offloads(stage):
        return 0
    beside = (_FP32 + stage.micro.element_bytes) * stage.trained
    return (_state_bytes(stage) + beside) // stage.ranks


def _zero(stage: StageShape) -> ZeroBlock:
    return ZeroBlock.model_validate(stage.deepspeed["zero_optimization"])


# -- the high points -----------------------------------------------------------------------------


def _forward(stage: StageShape) -> dict[Item, int]:
    """The end of the loss: head gradient summed in fp32, one chunk's product, and its cast."""
    model, micro, e = stage.model, stage.micro, stage.micro.element_bytes
    head = (_FP32 + e) * model.head_weights if e < _FP32 else _FP32 * model.head_weights
    states = micro.tokens * (2 * e * model.hidden_size + _REST_OF_LOSS_BYTES)
    saved = saved_bytes(model, micro)
    return {
        "gradients, fp32": stage.gradients.between,
        "teachers' hidden states": _teacher_states(stage),
        "states of matched layers": _matched_states(stage),
        "activations": saved,
        "kept by the allocator": _kept(stage, saved),
        "logits of a chunk": chunk_bytes(stage),
        "teachers' heads side by side": _joined_heads(stage),
        "gradients of head and states": head + states,
    }


def _joined_heads(stage: StageShape) -> int:
    if not stage.summed:
        return 0
    widths = sum(teacher.sizes.state_size for teacher in stage.teachers)
    return stage.vocab_size * widths * stage.micro.element_bytes


def _backward(stage: StageShape) -> dict[Item, int]:
    """The first full bucket is reduced: by then the layers that filled it have let go."""
    filled = min(_zero(stage).reduce_bucket_size, stage.trained)
    saved = saved_bytes(stage.model, stage.micro)
    # On a CPU what the layers let go stays with the process, too scattered for large buckets.
    left = 1 if stage.micro.device == "cpu" else 1 - filled / stage.trained
    return {
        "gradients, fp32": stage.gradients.owned,
        "gradient buckets": stage.gradients.buckets,
        "teachers' hidden states": _teacher_states(stage),
        "states of matched layers": _matched_states(stage),
        "activations": round(left * saved),
        "kept by the allocator": _kept(stage, saved),
        "work of a layer": working_bytes(stage.model, stage.micro)
        + recomputed_bytes(stage.model, stage.micro),
    }


def _update(stage: StageShape) -> dict[Item, int]:
    """Gradients; and on a CPU what the process still holds of the layers' tensors."""
    left = saved_bytes(stage.model, stage.micro) if stage.micro.device == "cpu" else 0
    return {
        "gradients, fp32": stage.gradients.updating,
        "orthogonal updates": _orthogonal_updates(stage) if stage.muon else 0,
        "activations": left,
        "kept by the allocator": _kept(stage, left),
    }


def _orthogonal_updates(stage: StageShape) -> int:
    """Of all matrices in fp32; and of those worked on together once more, as two of the iteration's
    and, at most as large, two Gram matrices."""
    owned = stage.model.backbone_weights // stage.ranks
    together = min(owned, TOGETHER)
    return _FP32 * (owned + together) + 4 * stage.micro.element_bytes * together


def _kept(stage: StageShape, saved: int) -> int:
    if stage.micro.device != "cpu":
        return 0
    return max(KEPT_AT_LEAST_BYTES, round(KEPT_BY_GLIBC * saved))


def _evaluation(stage: StageShape) -> dict[Item, int]:
    """A wider forward pass that keeps nothing, and the logits of the model alone.

    Chunks are the loss's own there, whatever the distillation asks for (`evaluation.forward`).
    """
    windows = max(1, stage.evaluation_tokens // stage.micro.length)
    alone = replace(
        stage,
        micro=replace(stage.micro, windows=windows),
        chunk_tokens=None,
        teachers=(),
        summed=False,
        work_spaces=0 if stage.micro.device == "cuda" else 1,  # plain cross-entropy
    )
    return {
        "work of a layer": _passing(stage.model, alone.micro),
        "logits of a chunk": chunk_bytes(alone),
    }


def _filling(stage: StageShape) -> dict[Item, int]:
    """The teachers that fill a cache together and need most."""
    e = stage.micro.element_bytes
    together = max(stage.filling, key=lambda teachers: sum(one.held_params for one in teachers))
    return {
        "teachers": sum(e * one.held_params for one in together),
        "teacher cache": stage.cache_bytes,
        **_teaching(stage, together),
    }


def _teaching(stage: StageShape, teachers: Sequence[HeldTeacher]) -> dict[Item, int]:
    """A forward pass of the teacher that needs most: split, of the windows of all its ranks."""
    micro = stage.micro
    return {
        "work of a layer": max(
            _passing(one.sizes, replace(micro, windows=one.parts * micro.windows), one.parts)
            for one in teachers
        )
    }


def _passing(sizes: ModelSizes, micro: MicroBatchShape, parts: int = 1) -> int:
    """A forward pass without gradients: the stream of states, and one layer's work, of which each
    rank of a split model does a part."""
    stream = micro.tokens * sizes.hidden_size * (2 * micro.element_bytes + 2 * _FP32)
    return stream + working_bytes(sizes, micro) // parts


def _teacher_states(stage: StageShape) -> int:
    widths = sum(teacher.sizes.state_size for teacher in stage.teachers)
    return stage.micro.tokens * widths * stage.micro.element_bytes


def _matched_states(stage: StageShape) -> int:
    """A teacher's layer, and what backward needs of the pair.

    That is the student's masked layer, and in fp32 the difference of an MSE, or for a cosine the
    student's side and the teacher's directions; and one more in passing.
    """
    e, width = stage.micro.element_bytes, stage.model.hidden_size
    in_fp32 = {"mse": 2, "cosine": 3}
    return stage.micro.tokens * sum(
        e * (pair.teacher_width + width) + in_fp32[pair.loss] * _FP32 * pair.teacher_width
        for pair in stage.matched
    )


def element_bytes(deepspeed: Mapping[str, Any]) -> int:
    """Bytes of a parameter under this configuration."""
    return 2 if precision(deepspeed) == "bf16" else 4
