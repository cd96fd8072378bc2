"""Dropout is a function of (seed, step, rank, micro-batch), and of nothing that ran before; and a
step waits for the device nowhere but for the norm of its gradients.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from babyllama_ds import ranks
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import Batch, micro_batch
from babyllama_ds.training.objective import Objective
from babyllama_ds.training.step import seed_device, train_step

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


def test_a_device_is_seeded_as_torch_seeds_all() -> None:
    torch.manual_seed(7 * 2**60 + 5)
    expected = torch.rand(9)
    seed_device(7 * 2**60 + 5, torch.device("cpu"))
    assert torch.equal(torch.rand(9), expected)


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


# -- waiting for the device ------------------------------------------------------------------------

WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")
"""What brings a number from the device to the host, or its shape."""


def asking(frame: FrameType | None) -> str:
    """The package, or file of ours, that waits: the innermost caller that is not torch itself."""
    package = ""
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        installed = "site-packages" in parts
        package = parts[parts.index("site-packages") + 1] if installed else parts[-1]
        if package not in ("torch", "_bootstrap"):
            return package
        frame = frame.f_back
    return package


@contextmanager
def counted_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often which package waits for the device, meanwhile."""
    waits: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def wait(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            waits[asking(sys._getframe(1))] += 1
            return method(tensor, *arguments, **named)

        return wait

    with monkeypatch.context() as patch:
        for name in WAITING:
            patch.setattr(Tensor, name, counted(name))
        yield waits


def test_a_step_waits_only_for_the_norm(
    alone: torch.device,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., Any],
    make_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Is the norm of the gradients finite: once, whatever is accumulated."""
    objective = Objective(
        tiny_model("llama"), vocab_size=VOCAB, distillation=DistillationSpec(chunk_tokens=7)
    )
    engine = make_engine(
        objective, training_spec(batch_windows=4, micro_batch=2, clip_norm=0.1), precision="bf16"
    )
    teacher = tiny_model("gpt2", seed=1, pad_token_id=0)
    frozen = FrozenModel(teacher, device=alone, dtype=torch.bfloat16)
    ensemble = Ensemble([Member("t", frozen, 1.0)])
    micro = micro_batch(torch.arange(20).view(2, 10), torch.tensor([True, False]))
    ids = torch.arange(2).numpy()
    batch = Batch(epoch=0, window_ids=ids, length=10, micro_batches=(micro,) * 2)
    train_step(engine, objective, ensemble, batch, rate=1e-3, seed=1, step=0)
    with counted_waits(monkeypatch) as waits:
        sums = train_step(engine, objective, ensemble, batch, rate=1e-3, seed=1, step=1)
    assert waits == {"lean.py": 1}
    with counted_waits(monkeypatch) as waits:
        sums.ce_sum.item()
    assert waits == {"test_step.py": 1}, "what a log costs; and that anything is counted at all"
