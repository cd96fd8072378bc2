"""A compiled objective beside the same one uncompiled: errors of its loss and of all gradients.

Both in bf16, judged by their distance from float64, as `babyllama-ds doctor --compile` judges
trainings.

Shapes: B windows, S positions, N = B * S.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from babyllama_ds.engine.compiling import what_compiling_lacks
from babyllama_ds.engine.proof.case import VOCAB
from babyllama_ds.engine.proof.judge import COMPILED_ERROR
from babyllama_ds.losses.distillation import TeacherStates
from babyllama_ds.models.compiled import forget_compiled
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.training.batches import MicroBatch, micro_batch
from babyllama_ds.training.objective import Counts, Objective
from gpu.measures import Measure, at_most, told
from gpu.parts.models import cast, make_model
from references.errors import relative_error

SIZES = {True: (2, 12, 32), False: (16, 128, 256)}
"""Windows, their length, the models' width."""
DIVERGENCES = ("forward_kl", "reverse_kl")
SPARED = 1e-3
"""An error below this needs no comparison: relative."""


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    lacking = what_compiling_lacks(device.type)
    if lacking is not None:
        yield told("torch.compile", f"not tried: {lacking}")
        return
    for kind in ("llama", "gpt2")[: 1 if small else 2]:
        for divergence in DIVERGENCES[: 1 if small else 2]:
            yield from _compared(kind, divergence, device, small=small)
            forget_compiled()


def _compared(
    kind: str, divergence: str, device: torch.device, *, small: bool
) -> Iterator[Measure]:
    windows, length, width = SIZES[small]
    student, teacher = (make_model(each, width=width, length=length) for each in (kind, "llama"))
    tokens_BS = torch.randint(
        0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(2)
    )
    micro = micro_batch(tokens_BS.to(device), torch.ones(windows, dtype=torch.bool, device=device))

    def run(dtype: torch.dtype, *, compiled: bool) -> dict[str, Tensor]:
        ours, theirs = (cast(copy.deepcopy(each), dtype).to(device) for each in (student, teacher))
        spec = DistillationSpec(alpha=0.5, temperature=2.0, divergence={"kind": divergence})
        objective = Objective(ours, vocab_size=VOCAB, distillation=spec)
        if compiled:
            objective.compile_layers()
        return _step(objective, _targets(theirs, micro), micro)

    exact = run(torch.float64, compiled=False)
    plain, fast = (run(torch.bfloat16, compiled=compiled) for compiled in (False, True))
    ratios = {
        name: relative_error(fast[name], exact[name])
        / max(relative_error(plain[name], exact[name]), SPARED)
        for name in exact
    }
    worst = max(ratios, key=ratios.__getitem__)
    name = f"{kind}, {divergence}: largest error / that of uncompiled code ({worst})"
    yield at_most(name, ratios[worst], COMPILED_ERROR)


def _step(
    objective: Objective, targets: list[TeacherStates], micro: MicroBatch
) -> dict[str, Tensor]:
    windows, length = micro.input_ids_BS.shape
    counts = Counts(ce=windows * (length - 1), kl=windows, scale=1.0)
    parts = objective(micro, targets, counts)
    parts.loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": parts.loss.detach(), **gradients}


def _targets(teacher: nn.Module, micro: MicroBatch) -> list[TeacherStates]:
    backbone, head = split_causal_lm(teacher)
    with torch.inference_mode():
        return [TeacherStates(backbone(micro.input_ids_BS).flatten(0, 1), head)]
