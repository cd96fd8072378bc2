"""Which models can be split over ranks (tensor parallelism): sizes enter; nothing, or an error.

Heads, key-value heads and inner columns are dealt out whole and in equal numbers. (DeepSpeed's
AutoTP would give the first ranks more of them where they do not divide, and a rank nothing at all
where there are fewer key-value heads than ranks.)
"""

from __future__ import annotations

import os

from babyllama_ds.errors import JobError, ModelError
from babyllama_ds.models.sizes import ModelSizes
from babyllama_ds.spec.base import divisors

SPLIT_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "opt",
    "granite",
    "cohere",
    "stablelm",
    "olmo",
    "starcoder2",
)
"""Families that give, split by AutoTP, what they give on one rank: tests/parity compares each.

transformers' names (`model_type`). Others are refused, whatever AutoTP says of itself: it finds the
layers to split by their names, and computes something else where they mean something else.
"""

_FUSED = "DeepSpeed's AutoTP does not deal its one matrix of queries, keys and values out right"

WRONGLY_SPLIT = {
    "gpt2": "DeepSpeed's AutoTP does not know it (its layers are no nn.Linear)",
    "gpt_neox": _FUSED,
    "bloom": _FUSED,
    "falcon": _FUSED,
    "phi3": _FUSED,
    "olmo2": "its norms of queries and keys go over all heads, and a rank has some of them",
}
"""What is known to fail, and why."""


def check_split(sizes: ModelSizes, parts: int, *, where: str) -> None:
    """A model of these sizes can be split over `parts` ranks. `where`: the key that asks for it.

    Raises:
        ModelError: a family that AutoTP does not split right, or numbers that do not divide.
    """
    if parts == 1:
        return
    if sizes.family not in SPLIT_FAMILIES:
        why = WRONGLY_SPLIT.get(sizes.family, "nobody has compared it with one rank")
        raise ModelError.of(
            where,
            got=f"{parts} for a model of the family {sizes.family}: {why}",
            expected=f"1, or one of the families {', '.join(SPLIT_FAMILIES)}",
            hint="leave tensor_parallel out, or set distillation.cache=hidden or topk to have the "
            "teachers off the device while the student trains",
        )
    for what, number in (
        ("attention heads", sizes.num_heads),
        ("key-value heads", sizes.num_kv_heads),
        ("inner columns (intermediate_size)", sizes.intermediate_size),
    ):
        if number % parts:
            fitting = [n for n in divisors(sizes.num_heads) if n < parts and _divides(n, sizes)]
            raise ModelError.of(
                where,
                got=f"{parts} for a model of {number} {what}",
                expected=f"a divisor of {number}: each rank has as many",
                hint=f"the next smaller one that divides all of this model is {fitting[-1]}",
            )


def check_groups(parts: int, num_ranks: int, *, where: str) -> None:
    """Ranks can be taken in groups of `parts`, each on one machine.

    Raises:
        JobError: they cannot.
    """
    if num_ranks % parts:
        raise JobError.of(
            where,
            got=f"{parts} with {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}",
            expected="a divisor of the number of ranks: each is in one group",
            hint=f"start a multiple of {parts} ranks (NPROC, --num_gpus), or change {where}",
        )
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if here is not None and int(here) % parts:
        raise JobError.of(
            where,
            got=f"{parts} with {here} ranks on this machine",
            expected="a divisor of them: a group's layers meet in every layer, and not over a "
            "network between machines",
            hint=f"start a multiple of {parts} ranks on every machine, or change {where}",
        )


def _divides(parts: int, sizes: ModelSizes) -> bool:
    return not any(
        number % parts for number in (sizes.num_heads, sizes.num_kv_heads, sizes.intermediate_size)
    )
