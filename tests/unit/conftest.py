"""What rooms share: tiny models, a world of one rank, the engine, the launcher, other processes."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Read once, at the first import of deepspeed in this process: tests compute on the CPU, also where
# there is a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

TESTS = Path(__file__).parents[1]
LAUNCH_LIMIT_S = 180
CHILD_LIMIT_S = 30
VOCAB = 61


@pytest.fixture(scope="module")
def alone() -> Iterator[torch.device]:
    """The process group of a world of one, as `start` makes it without the launcher."""
    from babyllama_ds.engine import distributed

    before = dict(os.environ)
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(key, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        # Every engine that is freed has garbage collected: there should be as little as may be.
        gc.collect()
        yield distributed.start("cpu")
    finally:
        distributed.stop()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """A LLaMA (grouped-query heads, untied) or GPT-2 (tied) of some ten thousand parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    def llama(**changes: Any) -> nn.Module:
        config: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        }
        return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))

    def gpt2(**changes: Any) -> nn.Module:
        config: dict[str, Any] = {
            "vocab_size": VOCAB,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 128,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return GPT2LMHeadModel(GPT2Config(**{**config, **changes}))

    def make(kind: str, *, seed: int = 0, **changes: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {"llama": llama, "gpt2": gpt2}[kind](**changes)

    return make


@pytest.fixture
def muon_of(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """Muon of these weights and gradients, owned whole by one rank; every other one has rows that
    are inputs. With it their slice and where each lies in it."""
    from babyllama_ds.engine.muon import MOMENTUM, AdamWWithMuon, Matrix
    from babyllama_ds.spec.training import TrainingSpec

    def make(
        training: TrainingSpec, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[AdamWWithMuon, nn.Parameter, list[Matrix]]:
        flat = nn.Parameter(torch.cat([weight.flatten() for weight in weights]))
        flat.grad = torch.cat([gradient.flatten() for gradient in gradients])
        sizes = [weight.numel() for weight in weights]
        matrices = [
            Matrix(weight.shape, bool(number % 2), False, 0, end - weight.numel(), weight.numel())
            for number, (weight, end) in enumerate(zip(weights, accumulate(sizes), strict=True))
        ]
        optimizer = AdamWWithMuon(tiny_model("llama"), training)
        (group, *_) = optimizer.param_groups
        group |= {"params": [flat]}
        optimizer.param_groups = [group]
        optimizer.state[flat][MOMENTUM] = torch.zeros_like(flat)
        optimizer._matrices[flat] = matrices
        return optimizer, flat, matrices

    return make


@pytest.fixture(scope="session")
def training_spec() -> Callable[..., Any]:
    """A `TrainingSpec` with short defaults."""
    from babyllama_ds.spec.training import TrainingSpec

    def make(**changes: Any) -> TrainingSpec:
        values = {"batch_windows": 4, "epochs": 1.0, "learning_rate": 1e-2, **changes}
        return TrainingSpec(**values)

    return make


@pytest.fixture(scope="session")
def engine_config() -> Callable[..., dict[str, Any]]:
    """DeepSpeed's dict for a training, made from the shipped files as the pipeline makes it."""
    from babyllama_ds.spec.deepspeed import deepspeed_config
    from babyllama_ds.spec.deepspeed_file import read_config
    from babyllama_ds.spec.job import DeepSpeedSpec
    from babyllama_ds.spec.loading import load_job
    from babyllama_ds.spec.shipped import find_job

    job = load_job(find_job("nursery"))
    shipped = {"bf16": "zero2_cpu", "fp32": "zero2_cpu_fp32", "offloaded": "zero2_offload"}

    def make(training: Any, *, precision: str = "fp32", ranks: int = 1) -> dict[str, Any]:
        base = read_config(DeepSpeedSpec(config=shipped[precision]), "cpu")
        return deepspeed_config(job, training, device="cpu", ranks=ranks, base=base)

    return make


@pytest.fixture
def make_engine(
    alone: torch.device, engine_config: Callable[..., dict[str, Any]]
) -> Iterator[Callable[..., Any]]:
    """A `TrainingEngine` in a world of one; destroyed after the test."""
    from babyllama_ds.engine.training import TrainingEngine

    made = []

    def make(module: nn.Module, training: Any, *, precision: str = "fp32") -> TrainingEngine:
        config = engine_config(training, precision=precision)
        made.append(TrainingEngine(module, training=training, config=config, device=alone))
        return made[-1]

    yield make
    for engine in made:
        engine.destroy()


@pytest.fixture(scope="session")
def launch_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Run a script on two CPU ranks by the real launcher, without a compiler on the path.

    What tests share (`trainings`) it imports as they do.
    """
    nothing, before = tmp_path_factory.mktemp("path"), os.environ.get("PYTHONPATH")
    extensions = tmp_path_factory.mktemp("torch_extensions")

    def start(script: str | Path, *words: str | Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ours = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": str(nothing),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), before])),
            "TORCH_EXTENSIONS_DIR": str(extensions),
        }
        dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
        theirs = {key: value for key, value in os.environ.items() if key not in dropped}
        deepspeed = Path(sys.executable).with_name("deepspeed")
        options = ["--quiet", "--num_gpus", "2", "--master_port", str(port)]
        process = subprocess.Popen(
            [str(deepspeed), *options, str(script), *map(str, words)],
            env=theirs | ours,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LAUNCH_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks
            output, _ = process.communicate()
        assert process.returncode == 0, output
        assert list(extensions.iterdir()) == [], "DeepSpeed built an operator"

    return start


class Child(subprocess.Popen[str]):
    """A Python process that is spoken with line by line."""

    def __init__(self, code: str, *arguments: object) -> None:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        """The next line it prints; "" at its end."""
        assert self.stdout is not None
        return self.stdout.readline().strip()

    def say(self, text: str) -> None:
        assert self.stdin is not None
        self.stdin.write(text + "\n")
        self.stdin.flush()


@pytest.fixture
def start_python() -> Iterator[Callable[..., Child]]:
    """Start a Python process on `code` with string arguments; all are killed in the end."""
    children: list[Child] = []

    def start(code: str, *arguments: object) -> Child:
        children.append(Child(code, *arguments))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate(timeout=CHILD_LIMIT_S)
