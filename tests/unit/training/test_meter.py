"""FLOPs of a token against PyTorch's own count of a real step's products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from babyllama_ds.engine.matmul_rate import Products
from babyllama_ds.models.sizes import model_sizes, sizes_of
from babyllama_ds.spec.models import Gpt2Model, LlamaModel
from babyllama_ds.training.meter import Meter, flops_per_token, work_of

WINDOWS, LENGTH, VOCAB = 3, 8, 61


def counted(*, student: Any, teachers: list[Any], cache: str) -> int:
    """FLOPs of a step, by running it; of a cache's targets only the heads are computed."""
    ids_BS = torch.randint(VOCAB, (WINDOWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        student(input_ids=ids_BS, use_cache=False).logits.sum().backward()
        with torch.no_grad():
            for teacher in teachers:
                if cache == "none":
                    teacher(input_ids=ids_BS, use_cache=False)
                elif cache == "hidden":
                    teacher.lm_head(torch.zeros(WINDOWS * LENGTH, 24))
    return counter.get_total_flops()


@pytest.mark.parametrize("cache", ["none", "hidden", "topk"])
def test_flops_of_a_token(tiny_model: Callable[..., Any], cache: Any) -> None:
    student = tiny_model("llama", attn_implementation="eager")
    teachers = [tiny_model("gpt2", attn_implementation="eager") for _ in range(2)]
    flops = flops_per_token(
        sizes_of(student.config),
        [sizes_of(teacher.config) for teacher in teachers],
        length=LENGTH,
        vocab_size=VOCAB,
        cache=cache,
    )
    real = counted(student=student, teachers=teachers, cache=cache)
    # LLaMA turns positions into angles by a small product of its own, which is no layer's.
    assert WINDOWS * LENGTH * flops == pytest.approx(real, rel=1e-3)


def test_the_meter() -> None:
    meter = Meter(flops_per_token=2e8, matmul_flops_per_s=8e11)
    assert meter.read(1000.0) == {"flops_per_s": 2e11, "mfu": 0.25}


LLAMA = LlamaModel(
    kind="llama", hidden_size=24, num_layers=2, num_heads=4, intermediate_size=40, max_positions=16
)
GPT2 = Gpt2Model(kind="gpt2", hidden_size=24, num_layers=1, num_heads=3, max_positions=16)


def flops_of(products: Products) -> float:
    return sum(times * product.flops for product, times in products.items())


@pytest.mark.parametrize("cache", ["none", "hidden", "topk"])
def test_the_measured_products_are_those_of_the_work(cache: Any) -> None:
    """All that is counted, but for attention, whose products are no layer's."""
    work = work_of(
        LLAMA,
        [GPT2, GPT2],
        length=LENGTH,
        micro_batch=WINDOWS,
        vocab_size=VOCAB,
        cache=cache,
        where="student",
    )
    student, teacher = (model_sizes(spec, VOCAB, where="x") for spec in (LLAMA, GPT2))
    attention = 3 * 4 * student.num_layers * LENGTH * student.attention_size
    if cache == "none":
        attention += 2 * 4 * teacher.num_layers * LENGTH * teacher.attention_size
    tokens = WINDOWS * LENGTH
    assert flops_of(work.products) == pytest.approx(tokens * (work.flops_per_token - attention))
