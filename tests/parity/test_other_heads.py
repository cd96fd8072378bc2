"""Families whose logits are more than a product: loss and all gradients, as student and teacher.

The reference takes each model's own logits and leaves the rest to PyTorch's operators and autograd.

Shapes: B windows, S positions, N = B * S, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from babyllama_ds.losses.distillation import TeacherStates, distillation_loss
from babyllama_ds.losses.topk import top_k_targets
from babyllama_ds.models.parts import split_causal_lm

B, S, ROWS, V = 3, 7, 61, 59
ALPHA, TEMPERATURE = 0.3, 2.0
SMALL: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=6, final_logit_softcapping=3.0),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "llama": lambda: LlamaConfig(**SMALL),
}
OTHERS = ["gemma2", "granite", "cohere"]


def make_model(family: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(CONFIGS[family]()).double().eval()


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, S], labels [N], valid [N]: the last window ends in padding."""
    tokens = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    labels = torch.full((B, S), -100)
    labels[:, :-1] = tokens[:, 1:]
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[-1, -3:] = False
    labels[-1, -4:] = -100
    return tokens, labels.flatten(), valid.flatten()


def reference(student: nn.Module, teachers: list[nn.Module]) -> Tensor:
    tokens, labels, valid = data()
    z, *ts = (model(input_ids=tokens).logits.flatten(0, 1)[:, :V] for model in (student, *teachers))
    p = softmax(torch.stack([t.detach() for t in ts]).mean(0) / TEMPERATURE, -1)
    kl = kl_div(log_softmax(z / TEMPERATURE, -1), p, reduction="none").sum(-1)[valid].sum()
    ce = cross_entropy(z, labels, ignore_index=-100, reduction="sum")
    return ALPHA * ce / 13 + (1 - ALPHA) * TEMPERATURE**2 * kl / 3


def states_of(teachers: list[nn.Module]) -> list[TeacherStates]:
    tokens, *_ = data()
    parts = [split_causal_lm(teacher) for teacher in teachers]
    with torch.inference_mode():
        return [TeacherStates(backbone(tokens).flatten(0, 1), head) for backbone, head in parts]


def ours(student: nn.Module, targets: Any, chunk_tokens: int | None = 5) -> Tensor:
    tokens, labels, valid = data()
    backbone, head = split_causal_lm(student)
    return distillation_loss(
        backbone(tokens).flatten(0, 1),
        head,
        labels,
        valid,
        targets,
        alpha=ALPHA,
        temperature=TEMPERATURE,
        mean_of="logits",
        ce_count=13,
        kl_count=3,
        vocab_size=V,
        chunk_tokens=chunk_tokens,
    ).loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(student: nn.Module, got: Tensor, expected: Tensor) -> None:
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = gradients(student, got), gradients(student, expected)
    assert any("embed_tokens" in name for name in theirs)
    for name, gradient in theirs.items():
        # These families take their norms in fp32, and its rounding of what comes back is felt.
        error = torch.linalg.norm(ours[name] - gradient) / torch.linalg.norm(gradient)
        assert error < 1e-6, (name, error)


@pytest.mark.parametrize("chunk_tokens", [5, None])
@pytest.mark.parametrize("family", OTHERS)
def test_as_student(family: str, chunk_tokens: int | None) -> None:
    student, teachers = make_model(family, 1), [make_model("llama", 2), make_model("llama", 3)]
    assert split_causal_lm(student)[1].states_are_logits
    got = ours(student, states_of(teachers), chunk_tokens)
    assert_same(student, got, reference(student, teachers))


@pytest.mark.parametrize("family", OTHERS)
def test_as_teacher(family: str) -> None:
    student, teachers = make_model("llama", 1), [make_model(family, 2), make_model("llama", 3)]
    kinds = [target.head.states_are_logits for target in states_of(teachers)]
    assert kinds == [True, False]
    assert_same(student, ours(student, states_of(teachers)), reference(student, teachers))


def test_as_student_and_teachers_and_in_top_k() -> None:
    student, teachers = make_model("gemma2", 1), [make_model(each, 2) for each in OTHERS]
    assert_same(student, ours(student, states_of(teachers)), reference(student, teachers))
    targets = top_k_targets(
        states_of(teachers), k=V, temperature=TEMPERATURE, mean_of="logits", vocab_size=V
    )
    assert_same(student, ours(student, targets), reference(student, teachers))


def test_what_lies_at_padding_has_no_effect() -> None:
    """Neither as the student's own logits nor as a teacher's, in values and in gradients."""
    rng = torch.Generator().manual_seed(1)
    _, labels, valid = data()
    head = split_causal_lm(make_model("gemma2", 1))[1]

    def loss_and_gradient(spoil: float) -> tuple[Tensor, Tensor]:
        z, t = torch.randn(2, B * S, ROWS, generator=rng.manual_seed(2), dtype=torch.float64)
        z[~valid] = t[~valid] = spoil
        z[:, V:] = t[:, V:] = spoil
        z.requires_grad_()
        loss = distillation_loss(
            z,
            head,
            labels,
            valid,
            [TeacherStates(t, head)],
            alpha=ALPHA,
            temperature=TEMPERATURE,
            mean_of="logits",
            ce_count=13,
            kl_count=3,
            vocab_size=V,
            chunk_tokens=5,
        ).loss
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    loss, gradient = loss_and_gradient(0.0)
    spoilt_loss, spoilt_gradient = loss_and_gradient(torch.nan)
    assert torch.equal(spoilt_loss, loss)
    assert torch.equal(spoilt_gradient, gradient)
    assert spoilt_gradient[:, V:].abs().max() == spoilt_gradient[~valid].abs().max() == 0
