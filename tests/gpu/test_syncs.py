"""On a GPU: a step waits for the device only for the gradient's norm, as CUDA itself counts it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEP = """
import sys, warnings
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from babyllama_ds.engine import distributed
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.spec.deepspeed import deepspeed_config
from babyllama_ds.spec.deepspeed_file import read_config
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.job import DeepSpeedSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import BatchPlan
from babyllama_ds.training.objective import Objective
from babyllama_ds.training.step import train_step

device = distributed.start("cuda")
training = TrainingSpec(batch_windows=4, micro_batch=2, epochs=1.0, learning_rate=1e-3)
config = deepspeed_config(
    load_job(find_job("nursery")), training, device="cuda", ranks=1,
    base=read_config(DeepSpeedSpec(), "cuda"),
)
llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=64))
gpt2 = GPT2LMHeadModel(GPT2Config(
    vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=64, pad_token_id=0))
objective = Objective(llama, vocab_size=64, distillation=DistillationSpec())
engine = TrainingEngine(objective, training=training, config=config, device=device)
ensemble = Ensemble([Member("t", FrozenModel(gpt2, device=device, dtype=torch.bfloat16), 1.0)])

class Windows:
    num_windows, length = 16, 16
    def batch(self, epoch, k, n): return np.arange(k * n, (k + 1) * n)
    def windows(self, epoch, ids): return np.random.default_rng(0).integers(0, 64, (len(ids), 16))
    def numbers(self, epoch, ids): return ids
    def begins(self, epoch, ids): return None

plan = BatchPlan(Windows(), training, rank=0, num_ranks=1, micro_batch=2, device=device)

def step(number):
    batch = plan.batch(number)
    train_step(engine, objective, ensemble, batch, rate=1e-3, seed=1, step=number)

step(0); step(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    step(2)
    torch.cuda.set_sync_debug_mode("default")
# Not the mode's own notice, at its first use, that it does not detect all synchronizing operations.
waits = [w for w in caught if "called a synchronizing" in str(w.message)]
for wait in waits:
    print(f"{wait.filename}:{wait.lineno}")
sys.exit(any("lean.py" not in wait.filename for wait in waits) or len(waits) > 1)
"""


def test_a_step_waits_only_for_the_norm() -> None:
    """Reading the batch included; once, as `unit/training/test_step.py` counts."""
    own = ("DS_ACCELERATOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in own}
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
