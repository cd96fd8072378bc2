"""Attention kernels are judged by their errors beside eager attention's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from babyllama_ds.doctor import attention as module
from babyllama_ds.models.fused import PLAIN_ATTENTION, FusedRMSNorm

REAL_DEVICE = torch.device


def test_the_kernels_of_a_cpu() -> None:
    plain, sdpa, flash = module.attention("cpu")
    assert (plain.check, plain.status) == ("plain attention", "ok")
    assert "gradient error" in plain.found
    assert (sdpa.check, sdpa.status) == ("sdpa", "ok")
    assert "gradient error" in sdpa.found
    assert (flash.check, flash.status) == ("flash attention", "ok")
    assert flash.found == "not in use: the device is cpu"


def plant(
    monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[Tensor], Tensor] | Exception
) -> None:
    """Change what a kernel gives, or let it fail."""
    honest = ALL_ATTENTION_FUNCTIONS[kernel]

    def changed(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if isinstance(change, Exception):
            raise change
        output, _ = honest(*args, **kwargs)
        return change(output), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kernel, changed)


@pytest.mark.parametrize("kernel", ["sdpa", PLAIN_ATTENTION])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda output: output * 1.1, "differs from eager attention: forward error"),
        (lambda output: output * float("nan"), "differs from eager attention"),
        # Right forward, half a gradient backward.
        (lambda output: (output + output.detach()) / 2, "differs from eager attention"),
        (RuntimeError("no kernel image\nmore"), "does not run: no kernel image"),
    ],
)
def test_a_kernel_that_is_wrong_is_a_failure(
    kernel: str, change: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, kernel, change)
    plain, sdpa, _ = module.attention("cpu")
    found, sound = (plain, sdpa) if kernel == PLAIN_ATTENTION else (sdpa, plain)
    assert (found.status, sound.status) == ("failure", "ok")
    assert told in found.found
    expected = "make setup" if kernel == PLAIN_ATTENTION else "attention: eager"
    assert expected in (found.remedy or "")


def test_a_norm_that_is_wrong_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FusedRMSNorm.forward
    monkeypatch.setattr(FusedRMSNorm, "forward", lambda *args: honest(*args) * 1.02)
    plain, sdpa, _ = module.attention("cpu")
    assert (plain.status, sdpa.status) == ("failure", "ok")
    assert "differs from eager attention" in plain.found


def test_every_usable_flash_attention_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"flash_attention_3": "it is not installed", "flash_attention_4": "it is too new"}
    monkeypatch.setattr(module, "why_unusable", lambda kernel, *_: reasons.get(kernel))
    _, sdpa, flash, rest = module.attention("cpu")
    assert (sdpa.status, flash.check) == ("ok", "flash 2")
    assert flash.status == "failure", "it cannot run on a CPU"
    assert rest.found == "not in use: it is too new; it is not installed"


def test_a_flash_attention_that_cannot_be_loaded_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Installed for another torch: jobs do without it, and its owner should know."""
    why = {"flash_attention_2": "it cannot be loaded beside torch 9 (undefined symbol)"}
    monkeypatch.setattr(module, "why_broken", why.get)
    monkeypatch.setattr(module, "why_unusable", lambda kernel, *_: why.get(kernel, "not there"))
    monkeypatch.setattr(module.torch, "device", lambda _: REAL_DEVICE("cpu"))
    *_, flash, rest = module.attention("cuda")
    assert (flash.check, flash.status) == ("flash 2", "warning")
    assert flash.found == "installed, but it cannot be loaded beside torch 9 (undefined symbol)"
    assert "built for this torch" in (flash.remedy or "")
    assert rest.check == "flash attention"
