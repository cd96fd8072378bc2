"""The faster modules of `models.fused` beside transformers' own: errors from float64, and time.

On CUDA it is RMSNorm above all that differs: PyTorch's kernels instead of a dozen operators.

Shapes: B windows, S positions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from babyllama_ds.models.fused import FusedRMSNorm, fuse
from gpu.measures import Measure, at_most, told
from references.errors import relative_error
from references.modules import ExactRMSNorm, exact, logits_and_gradients

NORM_ERROR, MODEL_ERROR = 1.3, 1.2
"""Times transformers', as in tests/unit/models/test_fused.py."""
NORMS = {True: (2, 12, (48,)), False: (32, 128, (512, 960, 1024))}
"""Windows, positions, widths: of the published students and teachers."""
VOCAB, LENGTH = 61, 32
TIMED_S = 0.5


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    windows, length, widths = NORMS[small]
    for width in widths:
        yield from _norm((windows, length, width), device)
    for kind in ("llama", "gpt2"):
        yield from _model(kind, device)


def _norm(shape_BSD: tuple[int, int, int], device: torch.device) -> Iterator[Measure]:
    """States, their gradient and the weight's, which is a sum over all positions."""
    width = shape_BSD[-1]
    generator = torch.Generator().manual_seed(8)
    states, gradient = (
        (torch.randn(shape_BSD, generator=generator) + 0.25).bfloat16() for _ in range(2)
    )
    weight = (torch.rand(width, generator=generator) + 0.5).bfloat16()

    def made(kind: type[LlamaRMSNorm], dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
        norm = kind(width, 1e-6)
        norm.weight.data = weight.to(device, dtype)
        return norm, states.to(device, dtype).requires_grad_(), gradient.to(device, dtype)

    def results(kind: type[LlamaRMSNorm], dtype: torch.dtype) -> dict[str, Tensor]:
        norm, inputs, of_outputs = made(kind, dtype)
        outputs = norm(inputs)
        outputs.backward(of_outputs)
        assert inputs.grad is not None
        return {"states": outputs, "gradient": inputs.grad, "weight's gradient": norm.weight.grad}

    reference = results(ExactRMSNorm, torch.float64)
    theirs, ours = (results(kind, torch.bfloat16) for kind in (LlamaRMSNorm, FusedRMSNorm))
    for name, value in reference.items():
        ratio = relative_error(ours[name], value) / relative_error(theirs[name], value)
        yield at_most(f"RMSNorm of {width}, {name}: error / transformers'", ratio, NORM_ERROR)
    times = [_seconds(*made(kind, torch.bfloat16)) for kind in (FusedRMSNorm, LlamaRMSNorm)]
    yield told(
        f"RMSNorm of {width}, forward and backward: time / transformers'", times[0] / times[1]
    )


def _seconds(norm: nn.Module, inputs: Tensor, of_outputs: Tensor) -> float:
    """The median of a forward and a backward pass; the timer waits for the card."""
    passes = Timer("norm(inputs).backward(of_outputs)", globals=locals())
    return float(passes.blocked_autorange(min_run_time=TIMED_S).median)


def _model(kind: str, device: torch.device) -> Iterator[Measure]:
    """All logits and all gradients of a small model."""
    torch.manual_seed(3)
    theirs = _unfused(kind)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = theirs.bfloat16().to(device).eval()
    ours = copy.deepcopy(theirs)
    fuse(ours)
    ids_BS = torch.randint(VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(4))
    run = partial(logits_and_gradients, ids_BS=ids_BS.to(device))
    reference, expected, got = (run(model) for model in (exact(theirs), theirs, ours))
    for name, part in {"logits": ["logits"], "gradients": reference.keys() - {"logits"}}.items():
        value, beside, own = (
            torch.cat([result[each].flatten() for each in sorted(part)])
            for result in (reference, expected, got)
        )
        ratio = relative_error(own, value) / relative_error(beside, value)
        yield at_most(f"{kind}, {name}: error / transformers'", ratio, MODEL_ERROR)


def _unfused(kind: str) -> nn.Module:
    """As transformers builds it, with weights that bend gradients."""
    if kind == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": LENGTH}
        names = {"bos_token_id": 1, "eos_token_id": 2, "activation_function": "gelu_new"}
        config = GPT2Config(vocab_size=VOCAB, initializer_range=0.2, **sizes, **drops, **names)
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.2,
            rms_norm_eps=1e-2,  # so large that one left out shows
        )
    )
