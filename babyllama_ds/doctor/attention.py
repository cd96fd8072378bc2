"""Attention: each kernel that is usable here, and our own modules, against transformers' eager.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from babyllama_ds.doctor.findings import Finding, failure, ok, warning
from babyllama_ds.engine.distributed import Device
from babyllama_ds.models.attention import FLASH_KERNELS, why_broken, why_unusable
from babyllama_ds.models.fused import PLAIN_ATTENTION, fuse

WINDOWS, LENGTH, VOCAB = 2, 96, 61
FACTOR = 1.5
"""How much larger a kernel's errors may be than those of eager attention in bf16."""


def attention(device: Device) -> list[Finding]:
    """A finding for each usable kernel; FlashAttention that is not is named with the reason.

    What jobs have where they ask for eager attention, our plain attention, comes first, together
    with our RMSNorm.
    """
    place = torch.device(device)
    exact = _states_and_gradient("eager", torch.float32, place)
    eager = _errors(_states_and_gradient("eager", torch.bfloat16, place), exact)
    unusable = {kernel: why_unusable(kernel, device, "bf16") for kernel in FLASH_KERNELS}
    usable = [
        PLAIN_ATTENTION,
        "sdpa",
        *(kernel for kernel, reason in unusable.items() if reason is None),
    ]
    found = [_agreement(kernel, place, exact, eager) for kernel in usable]
    if device == "cuda":
        found += [_broken(kernel, why) for kernel in FLASH_KERNELS if (why := why_broken(kernel))]
    reasons = {reason: None for reason in unusable.values() if reason}  # each once, in order
    if reasons:
        found.append(ok("flash attention", f"not in use: {'; '.join(reasons)}"))
    return found


def _broken(kernel: str, why: str) -> Finding:
    """Installed, and of no use: jobs that ask for it are refused, others do without it."""
    return warning(
        _check(kernel),
        f"installed, but {why}",
        remedy="install the flash-attn that is built for this torch and CUDA, or uninstall it",
    )


def _check(kernel: str) -> str:
    return "plain attention" if kernel == PLAIN_ATTENTION else kernel.replace("_attention_", " ")


def _agreement(
    kernel: str, place: torch.device, exact: tuple[Tensor, Tensor], eager: tuple[float, float]
) -> Finding:
    check = _check(kernel)
    try:
        errors = _errors(_states_and_gradient(kernel, torch.bfloat16, place), exact)
    except Exception as error:  # whatever a kernel's library raises
        told = str(error).strip().splitlines() or [type(error).__name__]
        return failure(check, f"does not run: {told[0]}", remedy=_remedy(kernel))
    found = ", ".join(_told(errors, eager))
    if all(ours <= FACTOR * theirs for ours, theirs in zip(errors, eager, strict=True)):
        return ok(check, f"agrees with eager attention: {found}")
    return failure(
        check, f"differs from eager attention: {found}, allowed {FACTOR}", remedy=_remedy(kernel)
    )


def _told(errors: tuple[float, float], eager: tuple[float, float]) -> Iterator[str]:
    for what, ours, theirs in zip(("forward", "gradient"), errors, eager, strict=True):
        yield f"{what} error {ours / theirs:.2f} × eager's"


def _remedy(kernel: str) -> str:
    if kernel == PLAIN_ATTENTION:
        return "install the pinned torch and transformers (make setup); do not train here before"
    if kernel == "sdpa":
        return "set `attention: eager` in the job's models, and install the pinned torch"
    return "set `attention: sdpa` in the job's models, or install another flash-attn"


def _states_and_gradient(
    kernel: str, dtype: torch.dtype, place: torch.device
) -> tuple[Tensor, Tensor]:
    """Final hidden states [B, S, D], and the gradient of the embedding, of a grouped-query LLaMA.

    The weights are the same every time, and values of bf16.
    """
    model = _model(kernel).to(place)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(0, VOCAB, (WINDOWS, LENGTH), generator=generator).to(place)
    states_BSD = model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    weights_BSD = torch.randn(states_BSD.shape, generator=generator).to(place)
    (states_BSD.float() * weights_BSD).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    return states_BSD.detach().float(), gradient.float()


def _model(kernel: str) -> LlamaModel:
    """A head size of 64, which every kernel has; transformers' own modules, save for our kernel."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        attn_implementation="eager" if kernel == PLAIN_ATTENTION else kernel,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaModel(config)
    if kernel == PLAIN_ATTENTION:
        fuse(model)
        assert model.config._attn_implementation == PLAIN_ATTENTION, "eager attention was kept"
    return model


def _errors(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative errors of states and gradient (Euclidean)."""
    forward, backward = (float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
    return forward, backward
