"""A teacher in its inference engine against the plain module: the same numbers, to the bit.

Compiled it rounds elsewhere, and is judged by its distance from float64.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from babyllama_ds.engine import distributed
from babyllama_ds.engine.compiling import what_compiling_lacks
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.proof.case import VOCAB
from babyllama_ds.engine.proof.judge import COMPILED_ERROR
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.models.compiled import forget_compiled
from babyllama_ds.models.parts import split_causal_lm
from gpu.measures import Measure, at_most, holds, told
from gpu.parts.models import cast, make_model
from references.errors import relative_error

SIZES = {True: (3, 24, 32), False: (32, 128, 512)}
"""Windows, their length, the models' width."""


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    distributed.start(device.type)
    kernel = resolve_attention(
        "auto", device=device.type, precision="bf16", training=False, where="teacher"
    )
    yield told("attention", kernel)
    for kind in ("llama", "gpt2"):
        yield from _compared(kind, kernel, device, small=small)
    distributed.stop()


def _compared(kind: str, kernel: str, device: torch.device, *, small: bool) -> Iterator[Measure]:
    windows, length, width = SIZES[small]
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(0, VOCAB, (windows, length), generator=generator).to(device)
    model = make_model(kind, width=width, length=length, kernel="eager").eval()
    exact_BSD = _states(cast(copy.deepcopy(model), torch.float64).to(device), tokens_BS)
    model.set_attn_implementation(kernel)  # type: ignore[operator]
    plain = cast(copy.deepcopy(model), torch.bfloat16).to(device)
    plain_BSD = _states(plain, tokens_BS)
    frozen = FrozenModel(copy.deepcopy(model), device=device, dtype=torch.bfloat16)
    states_BSD = frozen.hidden_states(tokens_BS)
    same = torch.equal(states_BSD, plain_BSD)
    error = relative_error(plain_BSD, exact_BSD)
    found = "equal to the bit" if same else f"differ by {relative_error(states_BSD, plain_BSD):.2g}"
    yield holds(f"{kind}: states are the plain module's", same, found)
    yield told(f"{kind}: error in bf16, relative to float64", error)
    frozen.destroy()
    lacking = what_compiling_lacks(device.type)
    if lacking is None and not small:
        fast = FrozenModel(
            copy.deepcopy(model), device=device, dtype=torch.bfloat16, with_compiler=True
        )
        ratio = relative_error(fast.hidden_states(tokens_BS), exact_BSD) / error
        yield at_most(f"{kind}, compiled: error / the plain module's", ratio, COMPILED_ERROR)
        fast.destroy()
        forget_compiled()


@torch.inference_mode()
def _states(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    backbone, _ = split_causal_lm(model)
    return backbone(tokens_BS)
