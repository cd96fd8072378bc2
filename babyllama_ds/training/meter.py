"""The meter: what a token costs and what the machine can do enter; `mfu` leaves.

    mfu = FLOPs of a token's matrix products · tokens per second / measured bf16 matrix rate

Counted is what the step has to compute: student forward and backward, each teacher's forward, the
heads of all. What is computed twice to save memory counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from babyllama_ds.engine.matmul_rate import Products, step_products
from babyllama_ds.models.sizes import ModelSizes, meta_model, model_sizes
from babyllama_ds.spec.models import ModelSpec

Cache = Literal["none", "hidden", "topk"]
"""What of the teachers is not computed in a step."""


@dataclass(frozen=True)
class Meter:
    """The meter of one training stage, all ranks together."""

    flops_per_token: float
    matmul_flops_per_s: float
    """What this machine's bf16 products reach at the shapes of the stage's models, as measured
    (`engine.matmul_rate`)."""

    def read(self, tokens_per_s: float) -> dict[str, float]:
        """What is logged: `flops_per_s`, and `mfu`, the share of the measured rate."""
        flops_per_s = self.flops_per_token * tokens_per_s
        return {"flops_per_s": flops_per_s, "mfu": flops_per_s / self.matmul_flops_per_s}


def flops_per_token(
    student: ModelSizes,
    teachers: Sequence[ModelSizes],
    *,
    length: int,
    vocab_size: int,
    cache: Cache,
) -> float:
    """FLOPs of the matrix products that a token of a window of `length` takes in a step.

    With a cache of hidden states only the teachers' heads are computed, with one of top-k
    probabilities nothing of theirs.
    """
    flops = student.training_flops(length, vocab_size)
    if cache == "none":
        flops += sum(teacher.forward_flops(length, vocab_size) for teacher in teachers)
    elif cache == "hidden":
        flops += sum(teacher.head_flops(vocab_size) for teacher in teachers)
    return float(flops)


@dataclass(frozen=True)
class Work:
    """What a step of a stage computes."""

    flops_per_token: float
    products: Products
    """Those of linear layers in a forward and backward pass of one rank."""


def work_of(
    model: ModelSpec,
    teachers: Sequence[ModelSpec],
    *,
    length: int,
    micro_batch: int,
    vocab_size: int,
    cache: Cache,
    where: str,
) -> Work:
    """The work of training `model` on the targets of `teachers`, from what describes them.

    Raises:
        ModelError: a model to be loaded has no readable configuration.
    """
    sizes = [model_sizes(spec, vocab_size, where=where) for spec in (model, *teachers)]
    shapes = [meta_model(spec, vocab_size, where=where) for spec in teachers]
    frozen: Sequence[nn.Module] = {
        "none": shapes,
        "hidden": [shape.get_output_embeddings() for shape in shapes],  # type: ignore[operator]
        "topk": [],
    }[cache]
    return Work(
        flops_per_token(sizes[0], sizes[1:], length=length, vocab_size=vocab_size, cache=cache),
        step_products(
            meta_model(model, vocab_size, where=where), frozen, tokens=micro_batch * length
        ),
    )
