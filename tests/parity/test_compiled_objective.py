"""A compiled objective against the same one uncompiled: values, sums and every gradient.

All of the compiler is used but its code generation, so that no C++ compiler is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from babyllama_ds.losses.distillation import TeacherStates
from babyllama_ds.losses.topk import top_k_targets
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.training.batches import MicroBatch, micro_batch
from babyllama_ds.training.objective import Counts, LossParts, Objective

V = 59  # models have 61 rows
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=4, n_positions=64),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=6, final_logit_softcapping=3.0),
}
COUNTS = Counts(ce=40, kl=6, scale=2.0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_model(family: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(MODELS[family]()).eval()  # without dropout


def make_micro(seed: int) -> MicroBatch:
    rng = torch.Generator().manual_seed(seed)
    return micro_batch(torch.randint(0, V, (3, 9), generator=rng), torch.tensor([1, 1, 0]).bool())


def make_targets(kind: str, micro: MicroBatch) -> Any:
    backbone, head = split_causal_lm(make_model("llama", seed=5))
    with torch.inference_mode():
        states = [TeacherStates(backbone(micro.input_ids_BS).flatten(0, 1), head)]
        if kind == "states":
            return states
        return top_k_targets(states, k=7, temperature=2.0, mean_of="logits", vocab_size=V)


def step(
    objective: Callable[..., LossParts], model: nn.Module, kind: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and sums of two accumulated micro-batches, and the gradients they leave."""
    model.zero_grad()
    values = []
    for seed in (1, 2):
        micro = make_micro(seed)
        parts = objective(micro, make_targets(kind, micro), COUNTS)
        parts.loss.backward()
        values += [parts.loss.detach(), parts.ce_sum, parts.kl_sum]
    return values, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "states"), ("gpt2", "states"), ("llama", "topk"), ("gemma2", "states")],
)
def test_values_and_gradients(family: str, kind: str) -> None:
    """GPT-2's head is tied; Gemma 2 is tried for its head inside the first compiled call."""
    spec = DistillationSpec(alpha=0.3, temperature=2.0, chunk_tokens=8)
    plain = Objective(make_model(family), vocab_size=V, distillation=spec)
    expected, expected_gradients = step(plain, plain, kind)
    assert expected[0] > 0
    objective = Objective(make_model(family), vocab_size=V, distillation=spec)
    values, gradients = step(torch.compile(objective, backend="aot_eager"), objective, kind)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    for got, right in zip(gradients, expected_gradients, strict=True):
        assert torch.linalg.norm(got - right) <= 1e-5 * torch.linalg.norm(right)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_gradients(family: str) -> None:
    objective = Objective(make_model(family), vocab_size=V, distillation=DistillationSpec())
    micro = make_micro(1)
    targets = make_targets("states", micro)
    compiled = torch.compile(objective, backend="eager")
    with torch.no_grad():
        expected = objective(micro, targets, COUNTS)
        got = compiled(micro, targets, COUNTS)
    assert not got.loss.requires_grad
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
