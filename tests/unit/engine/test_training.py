"""ZeRO-2 against one plain PyTorch process, parameter by parameter, on one rank and on two.

Run as a script, this file is one of two ranks under the `deepspeed` launcher.

Shapes: B windows, S positions.
"""

from __future__ import annotations

import json
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from babyllama_ds import ranks
from babyllama_ds.engine import distributed, muon
from babyllama_ds.engine.checkpoint import BestWeights, CheckpointFolder, Progress
from babyllama_ds.engine.training import TrainingEngine, adamw
from babyllama_ds.spec.training import MovingAverage, Muon, TrainingSpec

BATCH, LENGTH, VOCAB = 8, 12, 61
RATES = (3e-3, 1e-2, 5e-3, 2e-3)


class NextTokenLoss(nn.Module):
    """Mean cross-entropy over all labelled positions, of full logits; times a factor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BS: Tensor, factor: float = 1.0) -> Tensor:
        logits_BSV = self.model(input_ids=tokens_BS).logits
        labels = tokens_BS[:, 1:].flatten()
        return factor * cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), labels)


def batches_of(seed: int, steps: int = len(RATES)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (steps, BATCH, LENGTH), generator=generator)


def train(engine: TrainingEngine, batches: Tensor, rates: Sequence[float]) -> list[float]:
    """Steps of this rank on its share of each batch; the gradient norms."""
    norms = []
    for batch_BS, rate in zip(batches, rates, strict=True):
        mine_BS = batch_BS.chunk(ranks.world_size())[ranks.rank()]
        for micro_BS in mine_BS.chunk(engine.accumulation_steps):
            engine.backward(engine.forward(micro_BS))
            engine.step(rate)
        norms.append(engine.grad_norm)
    return norms


# -- the reference ---------------------------------------------------------------------------------


def undecayed(names: Sequence[str]) -> set[str]:
    """Norms and biases of LLaMA and GPT-2, by name."""
    pattern = re.compile(
        r"(ln_[12f]|(input|post_attention)_layernorm|model\.norm)\.weight|.*\.bias"
    )
    return {name for name in names if pattern.search(name)}


def plain_training(
    module: nn.Module, training: TrainingSpec, batches: Tensor, rates: Sequence[float]
) -> tuple[dict[str, Tensor], list[float]]:
    """Whole batches, torch's own AdamW, gradients clipped by hand; what the engine should give."""
    named = dict(module.named_parameters())
    still = undecayed(list(named))
    groups = [
        {"params": [p for n, p in named.items() if n not in still]},
        {"params": [p for n, p in named.items() if n in still], "weight_decay": 0.0},
    ]
    matrices = plain_matrices(named) if training.muon is not None else {}
    momenta = {name: torch.zeros_like(named[name]) for name in matrices}
    averages = {name: parameter.detach().double() for name, parameter in named.items()}
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not m for m in matrices.values())]
    adam = torch.optim.AdamW(
        groups,
        betas=training.betas,
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        foreach=False,
    )
    norms = []
    for step, (batch_BS, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        for parameter in named.values():
            parameter.grad = None
        module(batch_BS).backward()
        squares = [p.grad.double().square().sum() for p in named.values()]
        norms.append(torch.stack(squares).sum().sqrt().item())
        if training.clip_norm is not None and norms[-1] > training.clip_norm:
            for parameter in named.values():
                parameter.grad *= training.clip_norm / norms[-1]
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        for name, matrix in matrices.items():
            plain_muon(matrix, momenta[name], training, rate, inputs_first="c_" in name)
        for name, parameter in named.items():
            averages[name] = plain_average(averages[name], parameter, training, step)
    state = {}
    for name, parameter in named.items():
        state[f"master/{name}"] = parameter.detach().clone()
        if name in matrices:
            state[f"momentum_buffer/{name}"] = momenta[name]
        else:
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key}/{name}"] = adam.state[parameter][key].clone()
        if training.ema is not None:
            state[f"ema/{name}"] = averages[name].float()
    return state, norms


def plain_average(average: Tensor, weight: Tensor, training: TrainingSpec, step: int) -> Tensor:
    """One step of the moving average in float64, as its formula has it."""
    if training.ema is None:
        return average
    decay = training.ema.decay
    if training.ema.ramp:
        decay = min(decay, (1 + step) / (10 + step))
    return decay * average + (1 - decay) * weight.detach().double()


def plain_matrices(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The matrices inside the layers of LLaMA and GPT-2, by name."""
    pattern = re.compile(r"\.(layers|h)\.\d+\..*(proj|c_attn|c_fc)\.weight")
    return {name: parameter for name, parameter in named.items() if pattern.search(name)}


@torch.no_grad()
def plain_muon(
    matrix: Tensor, momentum: Tensor, training: TrainingSpec, rate: float, *, inputs_first: bool
) -> None:
    """One step of Muon as its authors write it, in float64."""
    muon, gradient = training.muon, matrix.grad
    assert muon is not None
    assert gradient is not None
    momentum.mul_(muon.momentum).add_(gradient, alpha=1 - muon.momentum)
    update = (muon.momentum * momentum + (1 - muon.momentum) * gradient).double()
    if inputs_first:
        update = update.T
    x = update / update.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x * max(1.0, x.shape[0] / x.shape[1]) ** 0.5
    rate = rate * muon.learning_rate / training.learning_rate
    matrix.mul_(1 - rate * training.weight_decay)
    matrix.sub_(rate * (x.T if inputs_first else x).float())


def assert_same_training(
    state: dict[str, Tensor], norms: list[float], reference: tuple[dict[str, Tensor], list[float]]
) -> None:
    expected, expected_norms = reference
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert list(state) == list(expected)
    for key, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert_close_fp32(tensor, expected[key], key)


def assert_close_fp32(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Equal but for sums taken in another order, relative to the tensor's own size."""
    error = (ours - theirs).abs().max().item()
    assert error <= 2e-5 * theirs.abs().max().item(), f"{name}: off by {error}"


# -- one rank --------------------------------------------------------------------------------------

MUON = Muon(learning_rate=3e-2, momentum=0.8)
CASES: dict[str, dict[str, Any]] = {
    # Gradient norms of these models lie around 1.5, so 0.5 always clips and 100 never does.
    "llama, clipped": {"kind": "llama", "clip_norm": 0.5, "micro_batch": 2},
    "llama, whole batch at once": {"kind": "llama", "clip_norm": None},
    "llama, tied": {"kind": "llama", "tie_word_embeddings": True, "clip_norm": 100.0},
    "gpt2, tied, windows one by one": {"kind": "gpt2", "clip_norm": 0.5, "micro_batch": 1},
    "gpt2, untied": {"kind": "gpt2", "tie_word_embeddings": False, "micro_batch": 4},
    # From the third step on the ramp is above it.
    "llama, averaged": {"kind": "llama", "micro_batch": 2, "ema": MovingAverage(decay=0.3)},
    "gpt2, averaged without a ramp": {"kind": "gpt2", "ema": MovingAverage(decay=0.7, ramp=False)},
    "llama, muon": {"kind": "llama", "micro_batch": 2, "clip_norm": 0.5, "muon": MUON},
    "gpt2, muon, averaged": {"kind": "gpt2", "muon": MUON, "ema": MovingAverage(decay=0.9)},
}
# Epsilon drowns gradients that are rounding alone, and would be updates of random sign otherwise:
# GPT-2's bias of keys has no effect.
TRAINING = {"batch_windows": BATCH, "weight_decay": 3.0, "betas": (0.8, 0.95), "epsilon": 1e-4}


def split_case(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes the model, and what makes its training."""
    made_by = ("kind", "tie_word_embeddings", "num_hidden_layers", "n_layer")
    of_model = {key: case[key] for key in made_by if key in case}
    of_training = {key: value for key, value in case.items() if key not in of_model}
    return of_model, {**TRAINING, **of_training}


@pytest.mark.parametrize("name", CASES)
def test_one_rank_trains_as_a_plain_process(
    name: str,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    of_model, of_training = split_case(CASES[name])
    training = training_spec(**of_training)
    engine = make_engine(NextTokenLoss(tiny_model(**of_model)), training)
    batches = batches_of(1)
    norms = train(engine, batches, RATES)
    reference = plain_training(NextTokenLoss(tiny_model(**of_model)), training, batches, RATES)
    assert_same_training(dict(engine.named_state()), norms, reference)
    assert engine.accumulation_steps == BATCH // of_training.get("micro_batch", BATCH)
    # The module holds what the masters say.
    for key, parameter in engine.module.named_parameters():
        assert_close_fp32(parameter.detach(), reference[0][f"master/{key}"], key)


def test_collectives_can_be_timed_and_are_left_as_they_were(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    from deepspeed.comm import comm

    engine = make_engine(NextTokenLoss(tiny_model("llama")), training_spec(batch_windows=BATCH))
    before, told = dict(vars(comm.cdb)), []

    @contextmanager
    def part() -> Iterator[None]:
        told.append("in")
        yield
        told.append("out")

    with engine.communicating(part):
        train(engine, batches_of(1)[:1], RATES[:1])
    of_a_step = len(told)
    train(engine, batches_of(1)[:1], RATES[:1])
    assert of_a_step == len(told) > 0
    assert told == ["in", "out"] * (of_a_step // 2)  # one after another, and each ended
    assert dict(vars(comm.cdb)) == before


def test_bf16_weights_are_the_masters_rounded(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    engine = make_engine(
        NextTokenLoss(tiny_model("llama")), training_spec(batch_windows=BATCH), precision="bf16"
    )
    train(engine, batches_of(1), RATES)
    state = dict(engine.named_state())
    for name, parameter in engine.module.named_parameters():
        master = state[f"master/{name}"]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.detach(), master.bfloat16())
        assert not torch.equal(master, master.bfloat16().float()), "masters carry no more than bf16"


@pytest.mark.parametrize("options", [{}, {"muon": MUON}], ids=["adamw", "muon"])
def test_bf16_gradients_are_accumulated_in_fp32(
    options: dict[str, Any],
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    """Eight equal micro-batches sum to eight times one; bf16 sums would stray by 2^-9 each."""
    batch = batches_of(1)[:1, :1].repeat(1, BATCH, 1)
    moments = []
    for micro_batch in (1, BATCH):
        training = training_spec(
            batch_windows=BATCH, micro_batch=micro_batch, clip_norm=None, **options
        )
        engine = make_engine(NextTokenLoss(tiny_model("gpt2")), training, precision="bf16")
        micro_batches = batch[0].chunk(engine.accumulation_steps)
        for micro_BS in micro_batches:
            # A single window either way: the same bf16 arithmetic in every forward pass.
            engine.backward(engine.forward(micro_BS[:1]))
            engine.step(1e-3)
        first = ("exp_avg/", "momentum_buffer/")
        moments.append({k: v for k, v in engine.named_state() if k.startswith(first)})
    summed, once = moments
    for key in once:
        torch.testing.assert_close(summed[key], once[key], rtol=1e-6, atol=1e-12, msg=key)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_muon_computes_in_the_jobs_precision(
    precision: str,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, found = muon.orthogonalised, []

    def seen(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        made = real(matrices, dtype)
        found.extend([(matrices.dtype, made.dtype)] * len(matrices))
        return made

    monkeypatch.setattr(muon, "orthogonalised", seen)
    training = training_spec(batch_windows=BATCH, muon=MUON)
    engine = make_engine(NextTokenLoss(tiny_model("llama")), training, precision=precision)
    train(engine, batches_of(1)[:1], RATES[:1])
    in_steps = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert found == [(torch.float32, in_steps)] * (2 * 7)


@pytest.mark.parametrize("options", [{}, {"muon": MUON}], ids=["adamw", "muon"])
def test_deepspeed_warns_of_neither_optimizer(
    options: dict[str, Any],
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from deepspeed.runtime.zero import utils
    from deepspeed.utils import logger

    # As in a new process, whatever engines were made in this one.
    monkeypatch.setattr(utils, "ZERO_SUPPORTED_OPTIMIZERS", [torch.optim.AdamW])
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("WARNING", logger=logger.name):
        make_engine(
            NextTokenLoss(tiny_model("llama")), training_spec(batch_windows=BATCH, **options)
        )
    assert not caplog.messages


def test_a_model_that_comes_in_eval_mode_is_trained_with_its_dropout(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    module = NextTokenLoss(tiny_model("gpt2", resid_pdrop=0.5)).eval()
    engine = make_engine(module, training_spec(batch_windows=BATCH))
    assert all(part.training for part in module.modules())
    batch_BS = batches_of(1)[0]
    assert engine.forward(batch_BS).item() != engine.forward(batch_BS).item()


# -- decay groups ----------------------------------------------------------------------------------


def trainers_decayed(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """What transformers' Trainer decays: all but parameters of norm layers, and biases."""
    for name, child in model.named_children():
        if not isinstance(child, nn.LayerNorm) and "norm" not in type(child).__name__.lower():
            yield from trainers_decayed(child, f"{prefix}{name}.")
    for name in model._parameters:
        if "bias" not in name:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_biases_are_not_decayed_and_embeddings_are(
    kind: str,
    tied: bool,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = adamw(model, training_spec(weight_decay=0.3)).param_groups
    found = {g["weight_decay"]: {name_of[id(p)] for p in g["params"]} for g in groups}
    assert set(found) == {0.3, 0.0}
    expected = set(trainers_decayed(model)) & set(name_of.values())  # a tied weight has one name
    assert found[0.3] == expected
    assert found[0.0] == set(name_of.values()) - expected == undecayed(list(name_of.values()))
    embeddings = {"llama": {"model.embed_tokens.weight"}, "gpt2": {"transformer.wpe.weight"}}[kind]
    assert embeddings < found[0.3]


def test_frozen_parameters_are_left_out(
    tiny_model: Callable[..., Any], training_spec: Callable[..., TrainingSpec]
) -> None:
    model = tiny_model("llama")
    model.model.requires_grad_(False)
    (group,) = adamw(model, training_spec()).param_groups
    assert group["params"] == [model.lm_head.weight]


# -- the state by name -----------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"ema": MovingAverage(decay=0.9)},
    {"muon": MUON},
    {"muon": MUON, "ema": MovingAverage(decay=0.9)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_new_engine_goes_on_bit_for_bit(
    kind: str,
    precision: str,
    options: dict[str, Any],
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    training = training_spec(**TRAINING, **options, micro_batch=4, clip_norm=0.5)
    batches, half = batches_of(2), len(RATES) // 2
    engine = make_engine(NextTokenLoss(tiny_model(kind)), training, precision=precision)
    train(engine, batches[:half], RATES[:half])
    saved = {key: tensor.clone() for key, tensor in engine.named_state()}
    asked = []

    def read(key: str, shape: torch.Size) -> Tensor:
        asked.append(key)
        assert saved[key].shape == shape
        return saved[key]

    other = make_engine(NextTokenLoss(tiny_model(kind, seed=9)), training, precision=precision)
    other.load_named_state(read, step=half)
    assert asked == list(saved)
    assert_equal_states(dict(other.named_state()), saved)
    norms = [train(one, batches[half:], RATES[half:]) for one in (engine, other)]
    assert norms[0] == norms[1]
    assert_equal_states(dict(other.named_state()), dict(engine.named_state()))
    for ours, theirs in zip(other.module.parameters(), engine.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_model_keeps_frozen_is_in_no_state(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    """As some families' routers have it: the optimizer never heard of it."""
    frozen = "model.model.norm.weight"

    def new_engine() -> TrainingEngine:
        module = NextTokenLoss(tiny_model("llama"))
        module.get_parameter(frozen).requires_grad_(False)
        return make_engine(module, training_spec(batch_windows=BATCH))

    engine, other = new_engine(), new_engine()
    train(engine, batches_of(3)[:1], RATES[:1])
    saved = {key: tensor.clone() for key, tensor in engine.named_state()}
    others = {name for name, _ in engine.module.named_parameters()} - {frozen}
    assert {key.partition("/")[2] for key in saved} == others
    other.load_named_state(lambda key, _: saved[key], step=1)
    assert_equal_states(dict(other.named_state()), saved)
    assert torch.equal(other.module.get_parameter(frozen), torch.ones(24))


def assert_equal_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_the_number_of_updates_matters(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    """AdamW's bias correction goes by the step: loading without it would go on differently."""
    training, batches = training_spec(batch_windows=BATCH), batches_of(2)
    engine = make_engine(NextTokenLoss(tiny_model("gpt2")), training)
    train(engine, batches[:2], RATES[:2])
    saved = {key: tensor.clone() for key, tensor in engine.named_state()}
    results = []
    for step in (2, 0):
        engine.load_named_state(lambda key, _: saved[key], step=step)
        train(engine, batches[2:], RATES[2:])
        results.append(dict(engine.named_state())["master/model.transformer.wpe.weight"].clone())
    assert not torch.allclose(*results, atol=1e-4)


# -- numbers that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_overflow_is_seen_and_nothing_is_updated(
    precision: str,
    factor: float,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    training = training_spec(batch_windows=BATCH, micro_batch=4)
    engine = make_engine(NextTokenLoss(tiny_model("llama")), training, precision=precision)
    batch_BS = batches_of(3)[0]
    before = {key: tensor.clone() for key, tensor in engine.named_state()}
    for micro_BS, one in zip(batch_BS.chunk(2), (1.0, factor), strict=True):
        engine.backward(engine.forward(micro_BS, one))
        engine.step(1e-2)
    assert engine.overflowed
    assert_equal_states(dict(engine.named_state()), before)
    train(engine, batch_BS[None], [1e-2])
    assert not engine.overflowed


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_broken_weight_is_an_overflow(
    precision: str,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = float("nan")
    training = training_spec(batch_windows=BATCH)
    engine = make_engine(NextTokenLoss(model), training, precision=precision)
    train(engine, batches_of(3)[:1], [1e-2])
    assert engine.overflowed


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_destroyed_it_keeps_no_memory_beside_the_module(
    precision: str,
    alone: torch.device,
    tiny_model: Callable[..., Any],
    engine_config: Callable[..., dict[str, Any]],
) -> None:
    """Whoever measures what is free, or makes the next engine, comes right after."""
    training = TrainingSpec(
        batch_windows=BATCH, epochs=1.0, learning_rate=1e-2, muon=MUON, ema=MovingAverage()
    )
    module = NextTokenLoss(tiny_model("llama"))
    config = engine_config(training, precision=precision)
    engine = TrainingEngine(module, training=training, config=config, device=alone)
    train(engine, batches_of(1), RATES)
    held = {key: weakref.ref(tensor) for key, tensor in held_tensors(engine)}
    assert {"master", "momentum_buffer", "exp_avg", "exp_avg_sq", "ema"} <= held.keys()
    engine.destroy()
    assert [key for key, tensor in held.items() if tensor() is not None] == []
    assert module(batches_of(1)[0]).isfinite()
    weight = weakref.ref(module.model.lm_head.weight)
    del engine, module
    assert weight() is None


def test_destroyed_on_a_card_it_leaves_nothing_with_torch(
    alone: torch.device,
    tiny_model: Callable[..., Any],
    engine_config: Callable[..., dict[str, Any]],
    training_spec: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a block that the next stage takes a part of, torch could not give back the rest."""
    training = training_spec(batch_windows=BATCH)
    module, config = NextTokenLoss(tiny_model("llama")), engine_config(training)
    engine = TrainingEngine(module, training=training, config=config, device=alone)
    train(engine, batches_of(1)[:1], RATES[:1])
    held = [weakref.ref(tensor) for _, tensor in held_tensors(engine)]
    left: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: left.append(sum(one() is not None for one in held))
    )
    engine._device = torch.device("cuda")
    engine.destroy()
    assert left == [0], "given back once, when nothing of the engine is there"


def held_tensors(engine: TrainingEngine) -> Iterator[tuple[str, Tensor]]:
    """What the engine has of a rank's weights: masters, moments, average."""
    for state in engine._engine.optimizer.optimizer.state.values():
        yield from state.items()
    for master in engine._engine.optimizer.single_partition_of_fp32_groups:
        yield "master", master


# -- buffers that stay fp32 ------------------------------------------------------------------------


@torch.no_grad()
def test_the_engine_computes_what_transformers_loads_again(
    tmp_path: Path,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    from transformers import AutoModelForCausalLM

    tokens_BS = torch.randint(0, VOCAB, (2, 128), generator=torch.Generator().manual_seed(4))
    module = NextTokenLoss(tiny_model("llama"))
    make_engine(module, training_spec(), precision="bf16")
    rotary = module.model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    trained = module.model.eval()(input_ids=tokens_BS).logits
    module.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(loaded.model.rotary_emb.inv_freq, rotary)
    assert torch.equal(loaded(input_ids=tokens_BS).logits, trained)
    # Rounded as the weights are, the frequencies would point later positions elsewhere.
    rounded = tiny_model("llama").eval().bfloat16()
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    difference_S = (rounded(input_ids=tokens_BS).logits - trained).abs().amax((0, 2))
    assert difference_S[100:].max() > 10 * difference_S[:2].max()


# -- two ranks -------------------------------------------------------------------------------------

TWO_RANK_CASES = {
    "llama": {"kind": "llama", "clip_norm": 0.5, "micro_batch": 2},
    "gpt2": {"kind": "gpt2", "clip_norm": 0.5, "micro_batch": 1},
    "gpt2_unclipped": {"kind": "gpt2", "clip_norm": None},
    "gpt2_averaged": {"kind": "gpt2", "micro_batch": 2, "ema": MovingAverage(decay=0.9)},
    # Three layers: of two, each rank's slice would be one, and no matrix lie in both.
    "llama_muon": {
        **{"kind": "llama", "num_hidden_layers": 3},
        **{"clip_norm": 0.5, "micro_batch": 2, "muon": MUON},
    },
    "gpt2_muon_averaged": {
        **{"kind": "gpt2", "n_layer": 3},
        **{"muon": MUON, "ema": MovingAverage(decay=0.9)},
    },
}


@pytest.fixture(scope="module")
def two_ranks(
    once: Callable[..., Any],
    launch_script: Callable[..., None],
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    engine_config: Callable[..., dict[str, Any]],
) -> Path:
    """The folder with what two ranks, started once, wrote of every case."""

    def make(scene: Any) -> list[Any]:
        folder = scene.folder
        save_file({"first": batches_of(5), "then": batches_of(6)}, folder / "batches.safetensors")
        for name, case in TWO_RANK_CASES.items():
            of_model, of_training = split_case(case)
            (folder / name).mkdir()
            tiny_model(**of_model).save_pretrained(folder / name / "model")
            training = training_spec(**of_training)
            (folder / name / "training.json").write_text(training.model_dump_json())
            configs = {p: engine_config(training, precision=p, ranks=2) for p in ("fp32", "bf16")}
            (folder / name / "deepspeed.json").write_text(json.dumps(configs))
        launch_script(__file__, folder)
        return []

    folder: Path = once("engine_on_two_ranks", make).folder
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("name", TWO_RANK_CASES)
def test_two_ranks_train_as_a_plain_process(
    name: str,
    two_ranks: Path,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
) -> None:
    of_model, of_training = split_case(TWO_RANK_CASES[name])
    training = training_spec(**of_training)
    results = [json.loads((two_ranks / name / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert results[0] == results[1]
    assert results[0]["accumulation"] == BATCH // 2 // of_training.get("micro_batch", BATCH // 2)
    reference = plain_training(
        NextTokenLoss(tiny_model(**of_model)), training, batches_of(5), RATES
    )
    state = load_file(two_ranks / name / "checkpoints" / "step-00000004" / "state.safetensors")
    ordered = {key: state[key] for key in reference[0]}
    assert_same_training(ordered, results[0]["norms"], reference)


@pytest.mark.launch
def test_what_is_not_compiled_does_without_the_compiler(two_ranks: Path) -> None:
    """DeepSpeed would import it for its own Muon, and every rank start seconds later."""
    results = [json.loads(path.read_text()) for path in two_ranks.glob("*/rank*.json")]
    assert len(results) == 2 * len(TWO_RANK_CASES)
    assert not any(result["compiler"] for result in results)


@pytest.mark.launch
@pytest.mark.parametrize("name", TWO_RANK_CASES)
def test_two_ranks_go_on_bit_for_bit(name: str, two_ranks: Path) -> None:
    undisturbed = load_file(two_ranks / name / "undisturbed.safetensors")
    resumed = load_file(two_ranks / name / "resumed.safetensors")
    assert_equal_states(resumed, undisturbed)


@pytest.mark.launch
@pytest.mark.parametrize("name", ["llama", "gpt2_averaged", "llama_muon", "gpt2_muon_averaged"])
def test_one_rank_reads_the_checkpoint_of_two(
    name: str,
    two_ranks: Path,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    of_model, of_training = split_case(TWO_RANK_CASES[name])
    engine = make_engine(
        NextTokenLoss(tiny_model(**of_model, seed=8)), training_spec(**of_training)
    )
    folder = CheckpointFolder(two_ranks / name / "checkpoints", fingerprint=name)
    progress = folder.resume(engine, BestWeights())
    assert progress.step == len(RATES)
    train(engine, batches_of(6), RATES)
    expected = load_file(two_ranks / name / "undisturbed.safetensors")
    for key, tensor in engine.named_state():
        assert_close_fp32(tensor, expected[key], key)


@pytest.mark.launch
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overflow_on_one_rank_is_seen_on_both(precision: str, two_ranks: Path) -> None:
    for rank in (0, 1):
        result = json.loads((two_ranks / "llama" / f"rank{rank}.json").read_text())
        assert result["overflowed"][precision] == [False, True]
        assert result["kept"][precision], "the weights were updated all the same"


def run_as_rank(folder: Path) -> None:
    device = distributed.start("cpu")
    for name in TWO_RANK_CASES:
        (folder / name / f"rank{ranks.rank()}.json").write_text(
            json.dumps(train_case(folder / name, name, device))
        )
    distributed.stop()


def train_case(folder: Path, name: str, device: torch.device) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    training = TrainingSpec.model_validate_json((folder / "training.json").read_text())
    configs = json.loads((folder / "deepspeed.json").read_text())
    batches = load_file(folder.parent / "batches.safetensors")
    checkpoints = CheckpointFolder(folder / "checkpoints", fingerprint=name)

    def new_engine(precision: str = "fp32") -> TrainingEngine:
        module = NextTokenLoss(AutoModelForCausalLM.from_pretrained(folder / "model"))
        config = configs[precision]
        return TrainingEngine(module, training=training, config=config, device=device)

    engine = new_engine()
    if training.muon is not None:
        (matrices,) = engine._engine.optimizer.optimizer._matrices.values()
        assert any(matrix.shared for matrix in matrices), "no matrix lies on both ranks"
    norms = train(engine, batches["first"], RATES)
    checkpoints.save(engine, Progress(step=len(RATES)), BestWeights())
    norms += train(engine, batches["then"], RATES)
    keep(engine, folder / "undisturbed.safetensors")
    engine.destroy()

    engine = new_engine()
    progress = checkpoints.resume(engine, BestWeights())
    assert progress.step == len(RATES)
    train(engine, batches["then"], RATES)
    keep(engine, folder / "resumed.safetensors")
    result = {
        "norms": norms[: len(RATES)],
        "accumulation": engine.accumulation_steps,
        "compiler": "torch._inductor.compile_fx" in sys.modules,
    }
    engine.destroy()
    if name == "llama":
        result |= {"overflowed": {}, "kept": {}}
        for precision in configs:
            engine = new_engine(precision)
            result["overflowed"][precision], result["kept"][precision] = overflow_on_one(
                engine, batches["first"]
            )
            engine.destroy()
    return result


def keep(engine: TrainingEngine, path: Path) -> None:
    state = dict(engine.named_state())
    if ranks.rank() == 0:
        save_file(state, path)


def overflow_on_one(engine: TrainingEngine, batches: Tensor) -> tuple[list[bool], bool]:
    """Whether a sound step and one that is broken on rank 1 overflow; whether weights stayed."""
    train(engine, batches[:1], [1e-3])
    seen = [engine.overflowed]
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    for number in range(engine.accumulation_steps):
        broken = ranks.rank() == 1 and number == 0
        engine.backward(engine.forward(batches[0, :2], float("inf") if broken else 1.0))
        engine.step(1e-3)
    after = engine.module.parameters()
    stayed = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return [*seen, engine.overflowed], stayed


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[-1]))
