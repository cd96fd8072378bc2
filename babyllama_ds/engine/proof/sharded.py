"""The training under proof: a case and this rank enter; what ZeRO-2 did, gathered, leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from babyllama_ds import ranks
from babyllama_ds.engine.distributed import Device
from babyllama_ds.engine.proof.case import Case, Trace
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.spec.deepspeed import deepspeed_config
from babyllama_ds.spec.deepspeed_file import read_config
from babyllama_ds.spec.job import DeepSpeedSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job

BUCKET_ELEMENTS = 4_000
"""Elements reduced at a time: several buckets even for a small model."""


def trace_path(folder: Path, case: Case) -> Path:
    """The file in which `trace_cases` keeps what a case showed."""
    return folder / f"{case.name}.safetensors"


def trace_cases(cases: Sequence[Case], folder: Path, device: torch.device) -> None:
    """Train every case; rank 0 writes each trace as soon as there is one (collective)."""
    for case in cases:
        trace = train_sharded(case, device)
        if ranks.rank() == 0:
            unfinished = folder / f"{case.name}.tmp"
            save_file(trace, unfinished)
            unfinished.rename(trace_path(folder, case))


def train_sharded(case: Case, device: torch.device) -> Trace:
    """All steps of a case through `TrainingEngine` on all ranks, each on its share (collective)."""
    training = case.training(ranks.world_size())
    config = engine_config(case, "cuda" if device.type == "cuda" else "cpu")
    module = case.start()
    if case.compiled:
        module.compile_layers()  # type: ignore[operator]
    engine = TrainingEngine(module, training=training, config=config, device=device)
    start = _masters(engine)
    trace: Trace = {}
    for batch_BS in case.batches(ranks.world_size()).to(device):
        mine_BS = batch_BS.chunk(ranks.world_size())[ranks.rank()]
        for number, micro_BS in enumerate(mine_BS.chunk(case.accumulation_steps), start=1):
            engine.backward(engine.forward(micro_BS))
            if number == case.accumulation_steps and not trace:
                trace |= _gradients(engine)
            engine.step(training.learning_rate)
        trace.setdefault("gradient norm", torch.tensor([engine.grad_norm]))
    for name, master in _masters(engine).items():
        trace[f"change of {name}"] = master - start[name]
    engine.destroy()
    return trace


def engine_config(case: Case, device: Device) -> dict[str, Any]:
    """DeepSpeed's dict, from the file that jobs use on this device, as the case wants it."""
    base = read_config(DeepSpeedSpec(), device)
    if case.precision == "fp32":
        base.pop("bf16", None)
    base["zero_optimization"] = {
        **base["zero_optimization"],
        "overlap_comm": case.overlap_comm,
        "reduce_bucket_size": BUCKET_ELEMENTS,
    }
    num_ranks = ranks.world_size()
    job = load_job(find_job("nursery"))  # any: its numbers are not those of a case
    return deepspeed_config(
        job, case.training(num_ranks), device=device, ranks=num_ranks, base=base
    )


def _gradients(engine: TrainingEngine) -> Trace:
    """The batch's gradients, whole, from what the update is made of.

    DeepSpeed's `safe_get_full_grad` would prefer `parameter.grad`, which after a reduction that
    did not happen is this rank's own, and can look right.
    """
    from deepspeed.utils.tensor_fragment import get_full_hp_grad

    named = engine.module.named_parameters()
    return {f"gradient of {name}": get_full_hp_grad(parameter).cpu() for name, parameter in named}


def _masters(engine: TrainingEngine) -> dict[str, Tensor]:
    state = ((key.partition("/"), tensor) for key, tensor in engine.named_state())
    return {name: tensor.clone() for (kind, _, name), tensor in state if kind == "master"}
