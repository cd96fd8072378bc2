"""The gradient of one optimizer step through the engine, against the formula written plainly.

Shapes: B windows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.losses.distillation import IGNORED_LABEL, TeacherStates, distillation_loss
from babyllama_ds.losses.heads import Head
from babyllama_ds.models.compiled import forget_compiled
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import Batch, micro_batch
from babyllama_ds.training.objective import (
    Balance,
    Counts,
    Objective,
    Totals,
    divergence_of,
    engine_scale,
)
from babyllama_ds.training.step import train_step

BATCH, LENGTH, VOCAB = 8, 9, 59  # models have 61 rows: two are padding
WEIGHTS = (1.0, 3.0)
BETA = 0.9

DISTILLATIONS = {
    "sequence": DistillationSpec(alpha=0.5, temperature=2.0, soft_reduction="sequence"),
    "token": DistillationSpec(alpha=0.3, temperature=1.0, soft_reduction="token"),
    "probabilities": DistillationSpec(
        alpha=0.2, temperature=3.0, soft_reduction="token", mean_of="probabilities"
    ),
    "chunked": DistillationSpec(alpha=0.5, temperature=2.0, chunk_tokens=7),
    "none": None,
}


def batch_of(num_windows: int, accumulation: int) -> Batch:
    """A global batch of `num_windows` real windows; the rest of its eight slots is padding."""
    generator = torch.Generator().manual_seed(7)
    tokens_BS = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    real_B = torch.arange(BATCH) < num_windows
    # Padding stands among the real windows of the last micro-batches, not only behind them.
    shuffled = torch.randperm(BATCH, generator=generator)
    tokens_BS, real_B = tokens_BS[shuffled], real_B[shuffled]
    micro_batches = zip(tokens_BS.chunk(accumulation), real_B.chunk(accumulation), strict=True)
    return Batch(
        epoch=0,
        window_ids=shuffled[real_B].numpy(),
        length=LENGTH,
        micro_batches=tuple(micro_batch(tokens, real) for tokens, real in micro_batches),
    )


def real_tokens(batch: Batch) -> Tensor:
    tokens_BS = torch.cat([micro.input_ids_BS for micro in batch.micro_batches])
    valid_BS = torch.cat([micro.valid_N for micro in batch.micro_batches]).view_as(tokens_BS)
    return tokens_BS[valid_BS.all(1)]


def plain_loss(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    tokens_BS: Tensor,
    spec: DistillationSpec | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, mean CE and mean KL, with all logits of the whole batch, in float32."""
    logits_BSV = student(input_ids=tokens_BS).logits[..., :VOCAB]
    ce = cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    if spec is None:
        return ce, ce, torch.zeros(())
    with torch.no_grad():
        teachers_KBSV = torch.stack([t(input_ids=tokens_BS).logits[..., :VOCAB] for t in teachers])
    weights_K111 = torch.tensor(WEIGHTS).view(-1, 1, 1, 1) / sum(WEIGHTS)
    temperature = spec.temperature
    if spec.mean_of == "logits":
        target_BSV = softmax((weights_K111 * teachers_KBSV).sum(0) / temperature, -1)
    else:
        target_BSV = (weights_K111 * softmax(teachers_KBSV / temperature, -1)).sum(0)
    kl_sum = kl_div(log_softmax(logits_BSV / temperature, -1), target_BSV, reduction="sum")
    num_windows, length = tokens_BS.shape
    divisor = num_windows if spec.soft_reduction == "sequence" else num_windows * length
    loss = spec.alpha * ce + (1 - spec.alpha) * temperature**2 * kl_sum / divisor
    return loss, ce, kl_sum / (num_windows * length)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("num_windows", [8, 5, 1])
@pytest.mark.parametrize("name", DISTILLATIONS)
def test_one_step_takes_the_gradient_of_the_whole_batchs_formula(
    name: str,
    num_windows: int,
    accumulation: int,
    alone: torch.device,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., Any],
    make_engine: Callable[..., Any],
) -> None:
    spec = DISTILLATIONS[name]
    kind = "llama" if name == "token" else "gpt2"  # untied and tied
    objective = Objective(tiny_model(kind), vocab_size=VOCAB, distillation=spec)
    training = training_spec(
        batch_windows=BATCH, micro_batch=BATCH // accumulation, clip_norm=None, betas=(BETA, 0.99)
    )
    engine = make_engine(objective, training)
    ensemble = Ensemble(
        [
            Member(
                str(seed),
                FrozenModel(tiny_model("llama", seed=seed), device=alone, dtype=torch.float32),
                weight,
            )
            for seed, weight in zip((1, 2), WEIGHTS, strict=True)
        ]
    )
    batch = batch_of(num_windows, accumulation)
    sums = train_step(engine, objective, ensemble if spec else None, batch, rate=0, seed=0, step=0)

    student = tiny_model(kind)
    teachers = [tiny_model("llama", seed=seed).eval() for seed in (1, 2)]
    loss, ce, kl = plain_loss(student, teachers, real_tokens(batch), spec)
    loss.backward()
    squares = 0.0
    for key, parameter in student.named_parameters():
        moment = dict(engine.named_state())[f"exp_avg/model.{key}"]
        gradient = moment / (1 - BETA)  # the first step's: moments start at zero
        error = (gradient - parameter.grad).abs().max().item()
        assert error <= 2e-5 * max(parameter.grad.abs().max().item(), 1e-3), f"{key}: {error}"
        squares += parameter.grad.double().square().sum().item()
    assert engine.grad_norm == pytest.approx(squares**0.5, rel=1e-5)

    ce_sum, kl_sum = sums.ce_sum.item(), sums.kl_sum.item()
    value = objective.value(Totals(ce_sum, kl_sum), sums.counts)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert ce_sum / batch.num_labelled == pytest.approx(ce.item(), rel=1e-5)
    assert kl_sum / batch.num_valid == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize(("reduction", "kl_count"), [("sequence", 5), ("token", 5 * LENGTH)])
def test_counts_are_those_of_the_global_batch(
    reduction: Any, kl_count: int, tiny_model: Callable[..., Any]
) -> None:
    spec = DistillationSpec(soft_reduction=reduction)
    objective = Objective(tiny_model("llama"), vocab_size=VOCAB, distillation=spec)
    counts = objective.counts(batch_of(5, 4), num_ranks=3, accumulation_steps=4)
    assert counts == Counts(
        ce=5 * (LENGTH - 1),
        kl=kl_count,
        scale=12.0,
        valid=5 * LENGTH,
        balance=Balance(alpha=0.5, temperature=2.0),
    )


def test_a_batch_with_nothing_to_count_has_loss_zero_and_a_graph(
    tiny_model: Callable[..., Any],
) -> None:
    objective = Objective(tiny_model("llama"), vocab_size=VOCAB, distillation=None)
    batch = batch_of(0, 1)
    counts = objective.counts(batch, num_ranks=1, accumulation_steps=1)
    parts = objective(batch.micro_batches[0], [], counts)
    parts.loss.backward()
    assert parts.loss.item() == 0
    assert objective.value(Totals(0.0, 0.0), counts) == 0
    assert not any(parameter.grad.any() for parameter in objective.parameters())


@pytest.mark.parametrize("num_windows", [8, 5])
def test_without_teachers_the_z_loss_is_there_too(
    num_windows: int, tiny_model: Callable[..., Any]
) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    objective = Objective(model, vocab_size=VOCAB, distillation=None, z_loss=0.07)
    batch = batch_of(num_windows, 1)
    counts = objective.counts(batch, num_ranks=1, accumulation_steps=1)
    parts = objective(batch.micro_batches[0], [], counts)
    parts.loss.backward()

    tokens_BS = real_tokens(batch)
    logits_NV = plain(input_ids=tokens_BS).logits[:, :-1, :VOCAB].flatten(0, 1)
    squares_N = logits_NV.logsumexp(-1).square()
    loss = cross_entropy(logits_NV, tokens_BS[:, 1:].flatten()) + 0.07 * squares_N.mean()
    loss.backward()
    assert parts.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert parts.z_sum is not None
    assert parts.z_sum.item() == pytest.approx(squares_N.sum().item(), rel=1e-5)
    logged = objective.value(Totals(parts.ce_sum.item(), 0.0, z=parts.z_sum.item()), counts)
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 2e-5 * max(other.grad.abs().max(), 1e-3)


# As their papers name the weights: GKD (equation 1), DistiLLM (section 3.1).
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q: divergence(p, q),
    "reverse_kl": lambda p, q: divergence(q, p),
    "jensen_shannon beta": lambda p, q: (
        0.2 * divergence(p, 0.2 * p + 0.8 * q) + 0.8 * divergence(q, 0.2 * p + 0.8 * q)
    ),
    "skewed_forward_kl skew": lambda p, q: divergence(p, 0.2 * p + 0.8 * q),
    "skewed_reverse_kl skew": lambda p, q: divergence(q, 0.8 * p + 0.2 * q),
}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_jobs_divergence_has_the_share_that_its_paper_means(name: str) -> None:
    kind, *weight = name.split()
    spec = DistillationSpec.model_validate(
        {"divergence": {"kind": kind, **dict.fromkeys(weight, 0.2)}}
    )
    student_NV, teacher_NV = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(3))
    identity = Head.identity(11, torch.float32, torch.device("cpu"))
    sums = distillation_loss(
        student_NV,
        identity,
        torch.full((7,), IGNORED_LABEL),
        torch.ones(7, dtype=torch.bool),
        [TeacherStates(teacher_NV, identity)],
        alpha=0.5,
        temperature=1.0,
        mean_of="logits",
        ce_count=1,
        kl_count=1,
        vocab_size=11,
        divergence=divergence_of(spec.divergence),
    )
    p, q = softmax(teacher_NV.double(), -1), softmax(student_NV.double(), -1)
    assert sums.kl_sum.item() == pytest.approx(DIVERGENCES[name](p, q).item(), rel=1e-5)


def test_the_engines_division_is_undone() -> None:
    assert engine_scale(1, 1) == 1
    assert engine_scale(3, 4) == 12


def test_value_by_hand(tiny_model: Callable[..., Any]) -> None:
    """0.25 · 60/20 + 0.75 · 2² · 14/7 = 6.75; without teachers 60/20."""
    spec = DistillationSpec(alpha=0.25, temperature=2.0)
    model, counts = tiny_model("llama"), Counts(ce=20, kl=7, scale=8.0)
    distilled = Objective(model, vocab_size=VOCAB, distillation=spec)
    assert distilled.value(Totals(60.0, 14.0), counts) == pytest.approx(6.75)
    alone = Objective(model, vocab_size=VOCAB, distillation=None)
    assert alone.value(Totals(60.0, 14.0), counts) == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["sequence", "none"])
def test_a_compiled_backbone_is_compiled_once_and_changes_nothing(
    name: str, alone: torch.device, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a batch counts, and whether it is watched; without generating code."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    frozen = FrozenModel(tiny_model("gpt2", seed=1), device=alone, dtype=torch.float32)
    ensemble = Ensemble([Member("t", frozen, 1.0)])
    plain, fast = (
        Objective(tiny_model("llama"), vocab_size=VOCAB, distillation=DISTILLATIONS[name])
        for _ in range(2)
    )
    fast.compile_layers()
    seen = []
    for num_windows, watch in ((8, False), (5, name != "none"), (3, False)):
        (micro,) = batch_of(num_windows, 1).micro_batches
        counts = Counts(ce=num_windows * (LENGTH - 1), kl=num_windows, scale=1.0)
        values = []
        for objective in (plain, fast):
            objective.zero_grad()
            loss = objective(micro, ensemble.targets(micro), counts, watch=watch).loss
            loss.backward()
            values.append([loss, *(parameter.grad for parameter in objective.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
        seen.append(counter.frame_count)
    assert seen[0] > 0
    assert seen == [seen[0]] * 3, "compiled anew"
    assert list(fast.state_dict()) == list(plain.state_dict())
    fast.release()
    assert not any("forward" in vars(module) for module in fast.modules()), "still compiled"
    forget_compiled()
