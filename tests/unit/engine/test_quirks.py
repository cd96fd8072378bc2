"""What libraries do by themselves and should not."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

from babyllama_ds.engine import quirks


def test_only_known_noise_is_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        quirks.quiet_known_noise()
        for module, category in (
            ("deepspeed.comm", FutureWarning),
            ("deepspeed.comm", UserWarning),
            ("torch.distributed.c10d", FutureWarning),
            ("torch.nn.modules", FutureWarning),
        ):
            warnings.warn_explicit("text", category, "file.py", 1, module=module)
    assert [(one.category, one.filename) for one in caught] == [
        (UserWarning, "file.py"),
        (FutureWarning, "file.py"),
    ]


def test_the_free_memory_of_a_card_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As clusters name parts of one: NVML would be asked for card number `MIG-…`."""
    from deepspeed.accelerator import cuda_accelerator

    found = types.SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda _: types.SimpleNamespace(free=3),
        nvmlInit=lambda: None,
    )
    asked = cuda_accelerator.CUDA_Accelerator
    monkeypatch.setattr(cuda_accelerator, "pynvml", found)
    monkeypatch.setattr(asked, "available_memory", asked.available_memory)  # put back
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0b1c")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 9))
    with pytest.raises(ValueError, match="MIG-0b1c"):
        asked().available_memory()
    quirks.ask_torch_for_free_memory()
    assert asked().available_memory() == 7
