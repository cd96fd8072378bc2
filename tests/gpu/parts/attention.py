"""Attention kernels against eager attention, both in bf16 and judged by their errors from float64.

Each FlashAttention that is usable, our plain attention, and PyTorch's fused attention with each of
its backends; on whole windows, and on windows of several documents, where the reference runs every
document by itself.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from babyllama_ds.engine import quirks
from babyllama_ds.engine.proof.case import VOCAB
from babyllama_ds.models.attention import FLASH_KERNELS, why_unusable
from babyllama_ds.models.documents import Pieces
from babyllama_ds.models.fused import PLAIN_ATTENTION
from babyllama_ds.models.parts import split_causal_lm
from gpu.measures import Measure, at_most, holds, told
from gpu.parts.models import cast, make_model
from references.errors import relative_error

ERROR = 1.5
"""Times eager attention's, as `babyllama-ds doctor` has it."""
LENGTHS = {True: (48,), False: (128, 1024)}
WINDOWS = 4
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    quirks.skip_looks_at_windows()  # as in every job
    usable = [PLAIN_ATTENTION, "sdpa"]
    for kernel in FLASH_KERNELS:
        reason = why_unusable(kernel, device.type, "bf16")
        yield told(kernel, "usable" if reason is None else f"not usable: {reason}")
        usable += [kernel] if reason is None else []
    for length in LENGTHS[small]:
        for head in (64,) if small else (64, 128):
            for kind in ("llama", "gpt2"):
                yield from _kernels(kind, length, head, usable, device)


def _kernels(
    kind: str, length: int, head: int, usable: list[str], device: torch.device
) -> Iterator[Measure]:
    for documents in (False, True):
        exact = _states_and_gradient(
            kind, length, head, "eager", torch.float64, device, apart=documents
        )
        # What doctor judges by: eager attention, of whole windows or of one document at a time.
        eager = _states_and_gradient(
            kind, length, head, "eager", torch.bfloat16, device, apart=documents
        )
        unit = _errors(eager, exact)
        for kernel in usable:
            name = f"{kind}, {length} tokens, heads of {head}"
            name += f", documents: {kernel}" if documents else f": {kernel}"
            yield from _one(name, kind, length, head, kernel, documents, device, exact, unit)
        if device.type == "cuda" and not documents:
            for backend in BACKENDS:
                name = f"{kind}, {length} tokens, heads of {head}: sdpa's {backend}"
                yield from _one(
                    name, kind, length, head, "sdpa", False, device, exact, unit, backend=backend
                )


def _one(
    name: str,
    kind: str,
    length: int,
    head: int,
    kernel: str,
    documents: bool,
    device: torch.device,
    exact: tuple[Tensor, Tensor],
    unit: tuple[float, float],
    *,
    backend: str | None = None,
) -> Iterator[Measure]:
    try:
        with _only(backend):
            got = _states_and_gradient(
                kind, length, head, kernel, torch.bfloat16, device, packed=documents
            )
    except Exception as error:  # whatever a kernel's library raises
        line = str(error).strip().splitlines() or [type(error).__name__]
        # PyTorch's choice among its backends is its own; what is asked for by jobs must run.
        yield told(name, line[0]) if backend else holds(name, False, f"does not run: {line[0]}")
        return
    for what, ours, theirs in zip(("states", "gradient"), _errors(got, exact), unit, strict=True):
        yield at_most(f"{name}: error of {what} / eager's", ours / theirs, ERROR)


def _only(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else sdpa_kernel([BACKENDS[backend]])


def _states_and_gradient(
    kind: str,
    length: int,
    head: int,
    kernel: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packed: bool = False,
    apart: bool = False,
) -> tuple[Tensor, Tensor]:
    """Final states [B, S, D], and the gradient of the embedding; weights are values of bf16.

    `packed`: several documents in a window, kept apart by positions; `apart`: the same documents,
    each a window of its own.
    """
    model = make_model(kind, width=4 * head, length=length, kernel=kernel, num_kv_heads=2)
    cast(model, dtype).to(device)
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(0, VOCAB, (WINDOWS, length), generator=generator).to(device)
    backbone, _ = split_causal_lm(model)
    if packed:
        pieces = Pieces.of(_begins(length), lambda tensor: tensor.to(device))
        states_BSD = backbone(tokens_BS, pieces)
    elif apart:
        states_BSD = torch.stack(
            [
                torch.cat([backbone(piece[None])[0] for piece in row.split(_lengths(length))])
                for row in tokens_BS
            ]
        )
    else:
        states_BSD = backbone(tokens_BS)
    weights_BSD = torch.randn(states_BSD.shape, generator=generator).to(device)
    (states_BSD.to(torch.promote_types(dtype, torch.float32)) * weights_BSD).sum().backward()
    gradient = model.get_input_embeddings().weight.grad  # type: ignore[operator]
    return states_BSD.detach().double(), gradient.double()


def _lengths(length: int) -> list[int]:
    """Documents of a window: short, long, of one token."""
    return [length // 8, length // 2, 1, length - length // 8 - length // 2 - 1]


def _begins(length: int) -> np.ndarray:
    begins_BS = np.zeros((WINDOWS, length), np.bool_)
    begins_BS[:, np.cumsum([0, *_lengths(length)[:-1]])] = True
    return begins_BS


def _errors(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    states, gradient = map(relative_error, got, exact)
    return states, gradient
