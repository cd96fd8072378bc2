"""ZeRO-2 on one card against a plain process, with a model of millions of parameters.

`doctor` proves small models on all cards and on two CPU ranks; here the products are as large as a
job's, so that other kernels are taken. Muon's orthogonalisation is tried beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from babyllama_ds.engine import distributed
from babyllama_ds.engine.muon import orthogonalised
from babyllama_ds.engine.proof.case import LENGTH, Case
from babyllama_ds.engine.proof.judge import judge
from babyllama_ds.engine.proof.models import LLAMA, small_loss
from babyllama_ds.engine.proof.sharded import train_sharded
from gpu.measures import Measure, at_most, holds

LARGE = LLAMA.model_copy(
    update={
        "hidden_size": 512,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 4,
        "intermediate_size": 1024,
        "initializer_range": 0.05,
        "max_positions": LENGTH,
    }
)
STEPS = 5
SINGULAR = (0.3, 1.5)
"""Where five steps of Muon's iteration leave singular values that were not tiny."""


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    distributed.start(device.type)
    spec = LLAMA if small else LARGE
    for precision in ("fp32", "bf16"):
        case = Case(
            name=f"large-{precision}",
            make=partial(small_loss, spec),
            precision=precision,
            accumulation_steps=2,
            clip_norm=0.5,
            steps=STEPS,
        )
        verdict = judge(case, train_sharded(case, device), num_ranks=1, device=device)
        wrong = "; ".join(map(str, verdict.differences[:3]))
        unit = "relative to float64" if precision == "fp32" else "/ a plain bf16 training's error"
        found = wrong or f"largest error of a gradient {verdict.error:.2g}, {unit}"
        yield holds(f"{precision}: gradients and weights of a plain process", not wrong, found)
    yield from _muon(device, small=small)
    distributed.stop()


def _muon(device: torch.device, *, small: bool) -> Iterator[Measure]:
    size = (24, 40) if small else (1024, 512)
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    spread = left @ torch.diag(torch.linspace(1, 0.2, min(size))) @ right
    exact = orthogonalised(spread.double()[None], torch.float64)[0]
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        got = orthogonalised(spread.to(device)[None], dtype)[0].cpu().double()
        error = float((got - exact).norm() / exact.norm())
        yield at_most(f"Muon's iteration in {dtype}: relative error", error, allowed)
    singular = torch.linalg.svdvals(exact)
    inside = SINGULAR[0] <= float(singular.min()) and float(singular.max()) <= SINGULAR[1]
    found = f"{float(singular.min()):.2f} to {float(singular.max()):.2f}"
    yield holds("Muon's singular values are about one", inside, found)
