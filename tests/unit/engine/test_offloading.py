"""An optimizer in the host's memory trains as one beside the model, here where both are the same.

Run as a script, this file is one of two ranks under the `deepspeed` launcher.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.checkpoint import BestWeights, CheckpointFolder, Progress
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.spec.training import MovingAverage, TrainingSpec

BATCH, LENGTH, VOCAB = 8, 12, 61
RATES = (3e-3, 1e-2, 5e-3, 2e-3)


class NextTokenLoss(nn.Module):
    """Mean cross-entropy over all labelled positions; times a factor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BS: Tensor, factor: float = 1.0) -> Tensor:
        logits_BSV = self.model(input_ids=tokens_BS).logits
        labels = tokens_BS[:, 1:].flatten()
        return factor * cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), labels)


def batches(steps: int = len(RATES)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (steps, BATCH, LENGTH), generator=generator)


def train(engine: TrainingEngine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        mine_BS = batches()[step].chunk(ranks.world_size())[ranks.rank()]
        for micro_BS in mine_BS.chunk(engine.accumulation_steps):
            engine.backward(engine.forward(micro_BS))
            engine.step(RATES[step])
        norms.append(engine.grad_norm)
    return norms


def assert_equal_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated, clipped": {"micro_batch": 2, "clip_norm": 0.5},
    "at once": {"clip_norm": None},
    "averaged": {"micro_batch": 4, "ema": MovingAverage(decay=0.9)},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_trains_as_one_beside_the_model(
    name: str,
    kind: str,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    training = training_spec(batch_windows=BATCH, weight_decay=0.5, **OPTIONS[name])
    seen = []
    for precision in ("bf16", "offloaded"):
        engine = make_engine(NextTokenLoss(tiny_model(kind)), training, precision=precision)
        norms = train(engine, range(len(RATES)))
        weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
        seen.append((norms, dict(engine.named_state()), weights))
    (norms, state, weights), (norms_off, state_off, weights_off) = seen
    assert norms_off == pytest.approx(norms, rel=1e-6)
    assert list(state_off) == list(state)
    for key, tensor in state.items():
        # The gradient's norm is summed in another order.
        torch.testing.assert_close(state_off[key], tensor, rtol=1e-5, atol=1e-7, msg=key)
    for ours, theirs in zip(weights_off, weights, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_new_engine_goes_on_bit_for_bit(
    name: str,
    tmp_path: Path,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    training = training_spec(batch_windows=BATCH, **OPTIONS[name])
    folder = CheckpointFolder(tmp_path / "checkpoints", fingerprint="f" * 64)
    engine = make_engine(NextTokenLoss(tiny_model("llama")), training, precision="offloaded")
    train(engine, range(2))
    folder.save(engine, Progress(step=2), BestWeights())
    other = make_engine(NextTokenLoss(tiny_model("llama", seed=9)), training, precision="offloaded")
    assert folder.resume(other, BestWeights()).step == 2
    for one in (engine, other):
        train(one, range(2, 4))
    assert_equal_states(dict(other.named_state()), dict(engine.named_state()))


def test_gradients_are_accumulated_in_fp32(
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    """Eight equal micro-batches sum to eight times one; bf16 sums would stray by 2^-9 each."""
    batch_BS = batches()[0, :1].repeat(BATCH, 1)
    moments = []
    for micro_batch in (1, BATCH):
        training = training_spec(batch_windows=BATCH, micro_batch=micro_batch, clip_norm=None)
        engine = make_engine(NextTokenLoss(tiny_model("gpt2")), training, precision="offloaded")
        for micro_BS in batch_BS.chunk(engine.accumulation_steps):
            engine.backward(engine.forward(micro_BS[:1]))
            engine.step(1e-3)
        moments.append({k: v for k, v in engine.named_state() if k.startswith("exp_avg/")})
    summed, once = moments
    for key in once:
        torch.testing.assert_close(summed[key], once[key], rtol=1e-6, atol=1e-12, msg=key)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_overflow_is_seen_and_nothing_is_updated(
    factor: float,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    training = training_spec(batch_windows=BATCH, micro_batch=4)
    engine = make_engine(NextTokenLoss(tiny_model("llama")), training, precision="offloaded")
    before = {key: tensor.clone() for key, tensor in engine.named_state()}
    for micro_BS, one in zip(batches()[0].chunk(2), (1.0, factor), strict=True):
        engine.backward(engine.forward(micro_BS, one))
        engine.step(1e-2)
    assert engine.overflowed
    assert_equal_states(dict(engine.named_state()), before)  # and training ends


# -- two ranks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(
    once: Callable[..., Any],
    launch_script: Callable[..., None],
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    engine_config: Callable[..., dict[str, Any]],
) -> Path:
    """The folder with what two ranks, started once, trained beside the model and offloaded."""

    def make(scene: Any) -> list[Any]:
        tiny_model("llama").save_pretrained(scene.folder / "model")
        training = training_spec(batch_windows=BATCH, micro_batch=2, clip_norm=0.5)
        (scene.folder / "training.json").write_text(training.model_dump_json())
        configs = {p: engine_config(training, precision=p, ranks=2) for p in ("bf16", "offloaded")}
        (scene.folder / "deepspeed.json").write_text(json.dumps(configs))
        launch_script(__file__, scene.folder)
        return []

    folder: Path = once("offloading_on_two_ranks", make).folder
    return folder


@pytest.mark.launch
def test_two_ranks_train_as_those_that_do_not_offload(two_ranks: Path) -> None:
    beside, offloaded = (
        load_file(two_ranks / name / "step-00000004" / "state.safetensors")
        for name in ("bf16", "offloaded")
    )
    for key, tensor in beside.items():
        torch.testing.assert_close(offloaded[key], tensor, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.launch
def test_one_rank_reads_what_two_offloaded(
    two_ranks: Path,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    make_engine: Callable[..., TrainingEngine],
) -> None:
    training = training_spec(batch_windows=BATCH, micro_batch=2, clip_norm=0.5)
    for precision in ("offloaded", "bf16"):
        engine = make_engine(
            NextTokenLoss(tiny_model("llama", seed=8)), training, precision=precision
        )
        CheckpointFolder(two_ranks / "offloaded", fingerprint="f" * 64).resume(
            engine, BestWeights()
        )
        expected = load_file(two_ranks / "offloaded" / "step-00000004" / "state.safetensors")
        for key, tensor in engine.named_state():
            assert torch.equal(tensor, expected[key]), key


def run_as_rank(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    device = distributed.start("cpu")
    training = TrainingSpec.model_validate_json((folder / "training.json").read_text())
    for name, config in json.loads((folder / "deepspeed.json").read_text()).items():
        module = NextTokenLoss(AutoModelForCausalLM.from_pretrained(folder / "model"))
        engine = TrainingEngine(module, training=training, config=config, device=device)
        train(engine, range(len(RATES)))
        checkpoints = CheckpointFolder(folder / name, fingerprint="f" * 64)
        checkpoints.save(engine, Progress(step=len(RATES)), BestWeights())
        engine.destroy()
    distributed.stop()


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[-1]))
