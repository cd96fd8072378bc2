"""Attention kernels: what the job asks for and the machine has enters, one kernel's name leaves.

A kernel asked for by name is honoured or refused; only `auto` chooses.
"""

from __future__ import annotations

import importlib
from collections.abc import Set
from functools import cache
from typing import Literal

import torch
from transformers.utils import import_utils

from babyllama_ds.errors import MachineError, ModelError
from babyllama_ds.spec.models import Attention

Device = Literal["cpu", "cuda"]

# Newest first: `auto` takes the first that is usable.
FLASH_KERNELS: tuple[Attention, ...] = (
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
)
# The least compute capability (major version) that each kernel is built for.
LEAST_CAPABILITY = {"flash_attention_2": 8, "flash_attention_3": 9, "flash_attention_4": 9}
# The greatest one: Hopper's own instructions are in no other card.
MOST_CAPABILITY = {"flash_attention_3": 9}
# What transformers imports for each kernel (`modeling_flash_attention_utils`).
MODULES = {
    "flash_attention_2": ("flash_attn", "flash_attn.bert_padding"),
    "flash_attention_3": ("flash_attn_interface",),
    "flash_attention_4": ("flash_attn.cute",),
}
# Those whose functions take a dropout probability.
DROPPING_KERNELS = ("flash_attention_2",)


def resolve_attention(
    requested: Attention,
    *,
    device: Device,
    precision: Literal["bf16", "fp32"],
    training: bool,
    where: str,
    dropout: float = 0.0,
    missing: Set[str] = frozenset(),
) -> str:
    """The kernel to give to transformers as `attn_implementation`.

    `auto` is the newest usable FlashAttention, else PyTorch's fused SDPA; but a model trained in
    bf16 on a CPU takes `eager`: there the backward pass of PyTorch's fused kernel is slower than
    the plain products by a factor of four to six at windows of 64 and 128 tokens. So does a family
    that has nothing else.

    `dropout` is that of attention, which has an effect in training alone; `missing` are the kinds
    of kernels that the model's family has not (`families.missing_kernels`).

    Raises:
        ModelError: the family has not what is asked for by name.
        MachineError: a FlashAttention asked for by name is not usable here, with the reason.
    """
    dropout = dropout if training else 0.0
    if requested == "auto":
        usable = (
            kernel
            for kernel in FLASH_KERNELS
            if kind_of(kernel) not in missing
            and not why_unusable(kernel, device, precision, dropout)
        )
        slow_backward = training and device == "cpu" and precision == "bf16"
        return next(usable, "eager" if slow_backward or "sdpa" in missing else "sdpa")
    if kind_of(requested) in missing:
        raise ModelError.of(
            where,
            got=f"{requested}, which transformers has not for models of this family",
            expected="a kernel that the family has",
            hint="ask for `auto` or `eager`",
        )
    if requested in FLASH_KERNELS:
        reason = why_unusable(requested, device, precision, dropout)
        if reason:
            raise MachineError.of(
                where,
                got=f"{requested}, but {reason}",
                expected="a kernel that is usable here",
                hint="ask for `auto` or `sdpa`, or install the kernel (extra `flash`)",
            )
    return requested


def kind_of(kernel: str) -> str:
    """Its name, FlashAttention's without the version."""
    return "flash_attention" if kernel in FLASH_KERNELS else kernel


def why_unusable(kernel: str, device: Device, precision: str, dropout: float = 0.0) -> str | None:
    """Why a FlashAttention kernel cannot run here; none if it can."""
    if device != "cuda":
        return f"the device is {device}"
    if precision != "bf16":
        return f"the precision is {precision}, it needs bf16"
    major = torch.cuda.get_device_capability()[0]
    if not LEAST_CAPABILITY[kernel] <= major <= MOST_CAPABILITY.get(kernel, major):
        return f"the card's compute capability is {major}.x"
    if not _installed(kernel):
        return "it is not installed"
    if (broken := why_broken(kernel)) is not None:
        return broken
    if dropout and kernel not in DROPPING_KERNELS:
        # transformers would leave it out without a word.
        return f"it has no dropout, and the model's attention has one of {dropout:g}"
    return None


@cache
def why_broken(kernel: str) -> str | None:
    """Why a FlashAttention that is installed cannot be loaded; none if it can, or is not there.

    Its compiled part fits one build of torch: transformers looks at the package's name alone, and
    would fail in the first forward pass.
    """
    if not _installed(kernel):
        return None
    try:
        for module in MODULES[kernel]:
            importlib.import_module(module)
    except Exception as error:  # an ImportError or OSError, or whatever its import runs into
        told = str(error).strip().splitlines() or [type(error).__name__]
        return f"it cannot be loaded beside torch {torch.__version__} ({told[0]})"
    return None


@cache
def _installed(kernel: str) -> bool:
    return bool(getattr(import_utils, f"is_flash_attn_{kernel[-1]}_available")())
