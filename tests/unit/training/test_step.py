"""Dropout is a function of (seed, step, rank, micro-batch), and of nothing that ran before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from babyllama_ds import ranks
from babyllama_ds.training.batches import Batch, micro_batch
from babyllama_ds.training.objective import Objective
from babyllama_ds.training.step import train_step

VOCAB = 61


@pytest.fixture
def step_once(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., Any],
    make_engine: Callable[..., Any],
) -> Callable[..., float]:
    """The summed CE of one step of a model with dropout."""

    def run(*, seed: int = 1, step: int = 1, copies: int = 1, dropout: float = 0.3) -> float:
        model = tiny_model("gpt2", resid_pdrop=dropout)
        objective = Objective(model, vocab_size=VOCAB, distillation=None)
        training = training_spec(batch_windows=2 * copies, micro_batch=2)
        engine = make_engine(objective, training)
        tokens_BS = torch.arange(20).view(2, 10)
        micro = micro_batch(tokens_BS, torch.ones(2, dtype=torch.bool))
        ids = torch.arange(2 * copies).numpy()
        batch = Batch(epoch=0, window_ids=ids, length=10, micro_batches=(micro,) * copies)
        sums = train_step(engine, objective, None, batch, rate=0.0, seed=seed, step=step)
        return sums.ce_sum.item()

    return run


def test_the_same_step_drops_the_same_whatever_was_drawn_before(
    step_once: Callable[..., float],
) -> None:
    torch.manual_seed(1)
    first = step_once()
    torch.manual_seed(2)
    torch.rand(17)
    assert step_once() == first


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 2}])
def test_another_step_or_seed_drops_another(
    change: dict[str, int], step_once: Callable[..., float]
) -> None:
    assert step_once(**change) != step_once()
    assert step_once(**change, dropout=0.0) == step_once(dropout=0.0)


def test_another_rank_drops_another(
    step_once: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = step_once()
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert step_once() != here


def test_each_micro_batch_drops_another(step_once: Callable[..., float]) -> None:
    assert step_once(copies=2) != pytest.approx(2 * step_once(), rel=1e-6)
    assert step_once(copies=2, dropout=0.0) == pytest.approx(2 * step_once(dropout=0.0), rel=1e-6)


def test_the_rate_is_the_updates(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., Any],
    make_engine: Callable[..., Any],
) -> None:
    """AdamW's first update moves every weight with a gradient by the rate, or a little less."""
    model = tiny_model("llama")
    before = model.lm_head.weight.detach().clone()
    objective = Objective(model, vocab_size=VOCAB, distillation=None)
    engine = make_engine(objective, training_spec(batch_windows=2, weight_decay=0.0))
    micro = micro_batch(torch.arange(20).view(2, 10), torch.ones(2, dtype=torch.bool))
    ids = torch.arange(2).numpy()
    batch = Batch(epoch=0, window_ids=ids, length=10, micro_batches=(micro,))
    train_step(engine, objective, None, batch, rate=0.0, seed=0, step=0)
    assert torch.equal(model.lm_head.weight, before)
    train_step(engine, objective, None, batch, rate=2e-3, seed=0, step=1)
    moved = (model.lm_head.weight - before).abs()
    assert 1e-3 < moved.max().item() < 2.1e-3
