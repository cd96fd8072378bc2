"""DeepSpeed's own reduction and update against the lean ones: the same bits, on one rank and on
two, and no more operators for a deeper model.

Run as a script, this file is one of two ranks under the `deepspeed` launcher.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from babyllama_ds import ranks
from babyllama_ds.engine import distributed, lean
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.spec.training import MovingAverage, Muon, TrainingSpec

BATCH, LENGTH, VOCAB = 8, 12, 61
RATES = (3e-3, 1e-2, 5e-3)
TRAINING = {"batch_windows": BATCH, "epochs": 1.0, "learning_rate": 1e-2, "weight_decay": 0.3}
# What the model is, what its training is, and how many elements are reduced at a time: fewer than
# in a matrix, than in the model, or more.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "clipped": ({"kind": "llama"}, {"micro_batch": 2, "clip_norm": 0.05}, 2_000),
    "too short to clip": ({"kind": "llama"}, {"clip_norm": 1e4}, 2_000),
    "tied": ({"kind": "gpt2"}, {"clip_norm": None}, 1_000_000),
    "small buckets": ({"kind": "llama", "tie_word_embeddings": True}, {"micro_batch": 1}, 500),
    "muon": (
        {"kind": "llama"},
        {"muon": Muon(learning_rate=3e-2, momentum=0.8), "ema": MovingAverage(decay=0.9)},
        2_000,
    ),
}


class Loss(nn.Module):
    """Cross-entropy of full logits; one parameter of it is used by nobody."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(torch.full((7, 5), 0.3))

    def forward(self, tokens_BS: Tensor, factor: float = 1.0) -> Tensor:
        logits_BSV = self.model(input_ids=tokens_BS).logits[:, :-1].float()
        return factor * cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())


def batches() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCAB, (len(RATES), BATCH, LENGTH), generator=generator)


def in_buckets(config: dict[str, Any], size: int, **zero: Any) -> dict[str, Any]:
    """The same with buckets of so many elements."""
    changed = {**config["zero_optimization"], "reduce_bucket_size": size, **zero}
    return {**config, "zero_optimization": changed}


def trained(engine: TrainingEngine) -> dict[str, Tensor]:
    """All that a training leaves: gradients and norm of every step, weights, masters, moments."""
    from deepspeed.utils.tensor_fragment import get_full_hp_grad

    found: dict[str, Tensor] = {}
    for step, (batch_BS, rate) in enumerate(zip(batches(), RATES, strict=True)):
        mine_BS = batch_BS.chunk(ranks.world_size())[ranks.rank()]
        for number, micro_BS in enumerate(mine_BS.chunk(engine.accumulation_steps), start=1):
            engine.backward(engine.forward(micro_BS))
            if number == engine.accumulation_steps:
                for name, parameter in engine.module.named_parameters():
                    found[f"{step}/gradient/{name}"] = get_full_hp_grad(parameter)
            engine.step(rate)
        found[f"{step}/norm"] = torch.tensor(engine.grad_norm)
        assert not engine.overflowed
    found |= {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return found | {name: tensor.clone() for name, tensor in engine.named_state()}


def differing(make: Callable[[], TrainingEngine]) -> list[str]:
    """What DeepSpeed's own way and ours do not have in common to the bit."""
    with patch("babyllama_ds.engine.training.make_lean"):
        engine = make()
    stock = trained(engine)
    assert not is_lean(engine)
    engine.destroy()
    engine = make()
    ours = trained(engine)
    assert is_lean(engine), "the same way was taken twice"
    engine.destroy()
    assert list(ours) == list(stock)
    return [name for name in ours if not torch.equal(ours[name], stock[name])]


def is_lean(engine: TrainingEngine) -> bool:
    """Whether DeepSpeed's optimizer was changed."""
    way = engine._engine.optimizer.scaled_global_norm
    return isinstance(way.__self__, lean._Reduction)


# -- one rank --------------------------------------------------------------------------------------


@pytest.fixture
def make_engine(
    alone: torch.device, engine_config: Callable[..., dict[str, Any]]
) -> Iterator[Callable[..., TrainingEngine]]:
    """An engine in a world of one, by its model, its training and what is changed of ZeRO."""
    made = []

    def make(
        module: nn.Module, of_training: dict[str, Any], precision: str = "bf16", **zero: Any
    ) -> TrainingEngine:
        training = TrainingSpec(**{**TRAINING, **of_training})
        size = zero.pop("reduce_bucket_size", 10_000)
        config = in_buckets(engine_config(training, precision=precision), size, **zero)
        made.append(TrainingEngine(module, training=training, config=config, device=alone))
        return made[-1]

    yield make
    for engine in made:
        if hasattr(engine, "_engine"):
            engine.destroy()


@pytest.mark.parametrize("case", CASES)
def test_one_rank_trains_to_the_same_bits(
    case: str,
    tiny_model: Callable[..., Any],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    of_model, of_training, size = CASES[case]

    def make() -> TrainingEngine:
        return make_engine(Loss(tiny_model(**of_model)), of_training, reduce_bucket_size=size)

    assert differing(make) == []


def test_a_gradient_that_is_not_finite_leaves_everything_and_the_next_step_goes_on(
    tiny_model: Callable[..., Any], make_engine: Callable[..., TrainingEngine]
) -> None:
    """In any micro-batch; and what was added of the broken batch is gone."""
    of_training = {"micro_batch": 2, "ema": MovingAverage()}
    engine = make_engine(Loss(tiny_model("llama")), of_training)
    undisturbed = trained(make_engine(Loss(tiny_model("llama")), of_training))
    for broken in range(engine.accumulation_steps):
        before = {name: tensor.clone() for name, tensor in engine.named_state()}
        for number, micro_BS in enumerate(batches()[0].chunk(engine.accumulation_steps)):
            engine.backward(engine.forward(micro_BS, float("nan") if number == broken else 1.0))
            engine.step(1e-2)
        assert engine.overflowed
        assert all(torch.equal(before[name], tensor) for name, tensor in engine.named_state())
    after = trained(engine)
    assert [name for name in after if not torch.equal(after[name], undisturbed[name])] == []


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("bf16", {"overlap_comm": True}),
    ("bf16", {"reduce_scatter": True}),
    ("bf16", {"parameter_alignment": True}),
    ("offloaded", {}),
    ("offloaded", {"reduce_scatter": False}),
]


@pytest.mark.parametrize(("precision", "zero"), OTHERS, ids=str)
def test_another_configuration_stays_deepspeeds(
    precision: str,
    zero: dict[str, Any],
    tiny_model: Callable[..., Any],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    if precision == "offloaded":
        pytest.importorskip("deepspeed.ops.adam")
    engine = make_engine(Loss(tiny_model("gpt2")), {}, precision, **zero)
    assert not is_lean(engine)


@pytest.mark.parametrize(("precision", "zero"), OTHERS, ids=str)
def test_a_plan_knows_it_of_the_configuration(
    precision: str, zero: dict[str, Any], engine_config: Callable[..., dict[str, Any]]
) -> None:
    training = TrainingSpec(**TRAINING)
    assert lean.is_lean(engine_config(training, precision="bf16"))
    assert not lean.is_lean(in_buckets(engine_config(training, precision=precision), 500, **zero))


def test_gradients_wait_for_a_full_bucket_and_no_longer(
    tiny_model: Callable[..., Any], make_engine: Callable[..., TrainingEngine]
) -> None:
    """And none is held by its parameter, where it would stay until the pass has ended."""
    reduce, waited, held = lean._Reduction.reduce, [], []

    def noted(self: lean._Reduction) -> None:
        waited.append(sum(gradient.numel() for gradient, _ in self._waiting))
        held.append(sum(one.grad is not None for one in engine.module.parameters()))
        reduce(self)

    with patch.object(lean._Reduction, "reduce", noted):
        engine = make_engine(Loss(tiny_model("llama")), {}, reduce_bucket_size=2_000)
        loss = engine.forward(batches()[0])
        torch.autograd.backward(loss)
    sizes = [parameter.numel() for parameter in engine.module.parameters()]
    assert max(sizes) < 2_000 < sum(waited)
    assert len(waited) > 2
    assert max(waited) <= 2_000
    assert min(waited) > 2_000 - max(sizes)
    assert max(held) == 1  # that of the parameter for which there is no room


class Operators(TorchDispatchMode):
    """How many run within that read or write numbers: on a card each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("optimizer", "of_a_layer"), [({}, 0), ({"muon": {"learning_rate": 0.02}}, 7)]
)
def test_a_deeper_model_takes_no_more_operators(
    optimizer: dict[str, Any],
    of_a_layer: int,
    tiny_model: Callable[..., Any],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    """Neither to reduce a bucket of gradients nor to update; Muon adds to each of the matrices."""
    numbers = []
    for layers in (1, 4):
        model = tiny_model("llama", num_hidden_layers=layers)
        engine = make_engine(Loss(model), optimizer, reduce_bucket_size=1_000_000)
        zero = engine._engine.optimizer
        for _ in range(2):  # the first makes what the others find
            loss = engine.forward(batches()[0])
            with patch.object(zero, "reduce_ipg_grads", lambda: None):
                torch.autograd.backward(loss)
            with Operators() as operators:
                zero.reduce_ipg_grads()
                engine._engine._backward_epilogue()
                engine.step(1e-3)
        numbers.append(operators.number)
    assert numbers[1] - numbers[0] == 3 * of_a_layer


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Where the host asks a tensor for its value."""
    seen: list[str] = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Looking():
        yield seen


def test_an_update_waits_for_the_device_once(
    tiny_model: Callable[..., Any], make_engine: Callable[..., TrainingEngine]
) -> None:
    """Whether the norm is finite: with a number that is not, nothing may be updated."""
    engine = make_engine(Loss(tiny_model("llama")), {"clip_norm": 0.1})
    for _ in range(2):
        engine.backward(engine.forward(batches()[0]))
        with counted_waits() as waits:
            engine.step(1e-3)
    assert len(waits) == 1


# -- two ranks -------------------------------------------------------------------------------------


@pytest.mark.launch
def test_two_ranks_train_to_the_same_bits(
    tmp_path: Path,
    tiny_model: Callable[..., Any],
    engine_config: Callable[..., dict[str, Any]],
    launch_script: Callable[..., None],
) -> None:
    for case, (of_model, of_training, size) in CASES.items():
        folder = tmp_path / case
        tiny_model(**of_model).save_pretrained(folder / "model")
        training = TrainingSpec(**{**TRAINING, **of_training})
        (folder / "training.json").write_text(training.model_dump_json())
        config = in_buckets(engine_config(training, precision="bf16", ranks=2), size)
        (folder / "deepspeed.json").write_text(json.dumps(config))
    launch_script(__file__, tmp_path)
    for case in CASES:
        for rank in (0, 1):
            found = json.loads((tmp_path / case / f"rank{rank}.json").read_text())
            assert found == {"differing": []}, f"{case}, rank {rank}"


def run_as_rank(folder: Path) -> None:
    device = distributed.start("cpu")
    for case in CASES:
        path = folder / case
        training = TrainingSpec.model_validate_json((path / "training.json").read_text())
        config = json.loads((path / "deepspeed.json").read_text())

        def make() -> TrainingEngine:
            module = Loss(AutoModelForCausalLM.from_pretrained(path / "model"))  # noqa: B023
            return TrainingEngine(module, training=training, config=config, device=device)  # noqa: B023

        (path / f"rank{ranks.rank()}.json").write_text(json.dumps({"differing": differing(make)}))
    distributed.stop()


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[-1]))
