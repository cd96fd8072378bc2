"""A kernel asked for by name is honoured or refused; only `auto` chooses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama_ds.errors import MachineError, ModelError
from babyllama_ds.models import attention
from babyllama_ds.models.attention import FLASH_KERNELS, resolve_attention

WHERE = "student.model.attention"


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    capability: int,
    installed: tuple[str, ...],
    broken: bool = False,
) -> None:
    """A card, and packages that can be loaded unless `broken` leaves that to be tried."""
    if not broken:
        monkeypatch.setattr(attention, "why_broken", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(attention, "_installed", lambda kernel: kernel in installed)


def resolve(
    requested: Any, device: Any = "cuda", precision: Any = "bf16", training: bool = True
) -> str:
    return resolve_attention(
        requested, device=device, precision=precision, training=training, where=WHERE
    )


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        (9, (), "sdpa"),
        (8, FLASH_KERNELS, "flash_attention_2"),
        (9, ("flash_attention_2",), "flash_attention_2"),
        (9, ("flash_attention_2", "flash_attention_3"), "flash_attention_3"),
        (10, FLASH_KERNELS, "flash_attention_4"),
        (7, FLASH_KERNELS, "sdpa"),
    ],
)
def test_auto_takes_the_newest_usable_kernel(
    capability: int,
    installed: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, capability=capability, installed=installed)
    for training in (False, True):
        assert resolve("auto", training=training) == expected
        assert resolve("auto", precision="fp32", training=training) == "sdpa"


@pytest.mark.parametrize(
    ("precision", "training", "expected"),
    [
        ("bf16", True, "eager"),  # the fused kernel's backward pass is the slower one
        ("bf16", False, "sdpa"),
        ("fp32", True, "sdpa"),
        ("fp32", False, "sdpa"),
    ],
)
def test_auto_on_a_cpu(
    precision: str, training: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability=9, installed=FLASH_KERNELS)
    assert resolve("auto", "cpu", precision, training) == expected


@pytest.mark.parametrize("requested", ["sdpa", "eager"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("training", [False, True])
def test_pytorchs_own_are_always_there(
    requested: str, device: str, precision: str, training: bool
) -> None:
    assert resolve(requested, device, precision, training) == requested


@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_a_usable_kernel_asked_for_by_name_is_honoured(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability=9, installed=FLASH_KERNELS)
    assert resolve(kernel) == kernel


@pytest.mark.parametrize("kernel", FLASH_KERNELS)
@pytest.mark.parametrize(
    ("device", "precision", "capability", "installed", "reason"),
    [
        ("cpu", "bf16", 9, True, "the device is cpu"),
        ("cuda", "fp32", 9, True, "the precision is fp32"),
        ("cuda", "bf16", 7, True, "the card's compute capability is 7.x"),
        ("cuda", "bf16", 9, False, "it is not installed"),
    ],
)
def test_an_unusable_kernel_asked_for_by_name_is_refused(
    kernel: str,
    device: str,
    precision: str,
    capability: int,
    installed: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, capability=capability, installed=(kernel,) if installed else ())
    with pytest.raises(MachineError) as caught:
        resolve(kernel, device, precision)
    (problem,) = caught.value.problems
    assert problem.where == WHERE
    assert problem.got.startswith(f"{kernel}, but {reason}")
    assert "sdpa" in (problem.hint or "")


@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_transformers_is_asked_about_each_kernel(kernel: str) -> None:
    """The question exists under the name that is put together."""
    from transformers.utils import import_utils

    expected = getattr(import_utils, f"is_flash_attn_{kernel[-1]}_available")()
    assert attention._installed(kernel) is bool(expected)


# -- families --------------------------------------------------------------------------------------


def resolve_lacking(requested: Any, *missing: str, device: Any = "cuda") -> str:
    return resolve_attention(
        requested,
        device=device,
        precision="bf16",
        training=False,
        where=WHERE,
        missing=frozenset(missing),
    )


def test_auto_takes_what_the_family_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability=9, installed=FLASH_KERNELS)
    assert resolve_lacking("auto", "sdpa") == "flash_attention_4"
    assert resolve_lacking("auto", "flash_attention") == "sdpa"
    assert resolve_lacking("auto", "sdpa", "flash_attention") == "eager"
    assert resolve_lacking("auto", "sdpa", device="cpu") == "eager"


@pytest.mark.parametrize("kernel", ["sdpa", *FLASH_KERNELS])
def test_a_kernel_that_the_family_has_not_is_refused(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability=9, installed=FLASH_KERNELS)
    assert resolve_lacking(kernel) == kernel
    missing = "sdpa" if kernel == "sdpa" else "flash_attention"
    with pytest.raises(ModelError, match=f"{kernel}, which transformers has not for models of"):
        resolve_lacking(kernel, missing)


# -- dropout ---------------------------------------------------------------------------------------


def resolve_with_dropout(requested: Any, dropout: float, *, training: bool = True) -> str:
    return resolve_attention(
        requested, device="cuda", precision="bf16", training=training, where=WHERE, dropout=dropout
    )


def test_auto_takes_no_kernel_that_would_leave_dropout_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability=9, installed=FLASH_KERNELS)
    assert resolve_with_dropout("auto", 0.1) == "flash_attention_2"
    assert resolve_with_dropout("auto", 0.0) == "flash_attention_4"
    assert resolve_with_dropout("auto", 0.1, training=False) == "flash_attention_4"
    pretend(monkeypatch, capability=9, installed=FLASH_KERNELS[:2])
    assert resolve_with_dropout("auto", 0.1) == "sdpa"


@pytest.mark.parametrize("kernel", FLASH_KERNELS)
def test_a_kernel_asked_for_by_name_that_would_is_refused(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability=9, installed=FLASH_KERNELS)
    assert resolve_with_dropout(kernel, 0.1, training=False) == kernel
    if kernel == "flash_attention_2":
        assert resolve_with_dropout(kernel, 0.1) == kernel
        return
    with pytest.raises(MachineError, match=r"but it has no dropout, .* has one of 0\.1"):
        resolve_with_dropout(kernel, 0.1)


def attend(kernel: str, p: float, *, seed: int) -> torch.Tensor:
    """Attended values of one head whose values are the identity: its weights, after dropout."""
    import transformers
    from torch import nn

    from babyllama_ds.models import fused

    functions = transformers.AttentionInterface()
    name = fused.PLAIN_ATTENTION if kernel == "eager" else kernel
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 1, 64, 64, generator=generator) for _ in range(2))
    causal = torch.full((64, 64), -torch.inf).triu(1)[None, None]
    module = nn.Module().train()
    module.is_causal = True  # type: ignore[assignment]
    torch.manual_seed(seed)
    values = torch.eye(64)[None, None]
    attended, _ = functions[name](module, query, key, values, causal, scaling=0.125, dropout=p)
    return attended[0, :, 0]  # [S, T]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_dropout_is_honoured(kernel: str) -> None:
    """Each weight is 0 with probability p, else divided by 1 - p: its mean stays."""
    p = 0.25
    whole = attend(kernel, 0.0, seed=0)
    drawn = torch.stack([attend(kernel, p, seed=seed) for seed in range(40)])
    there = whole > 0
    kept = drawn[:, there] > 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.01)
    expected = whole[there].expand_as(kept)[kept] / (1 - p)
    torch.testing.assert_close(drawn[:, there][kept], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(attend(kernel, p, seed=3), attend(kernel, p, seed=3))


# -- installed, but for another torch --------------------------------------------------------------


@pytest.fixture
def built_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `flash_attn` whose compiled part does not fit, as pip would leave it."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10\\nmore')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    attention.why_broken.cache_clear()
    pretend(monkeypatch, capability=9, installed=("flash_attention_2",), broken=True)
    yield
    attention.why_broken.cache_clear()


@pytest.mark.usefixtures("built_for_another_torch")
def test_a_kernel_built_for_another_torch_is_refused_with_the_loaders_words() -> None:
    assert resolve("auto") == "sdpa"
    with pytest.raises(MachineError) as caught:
        resolve("flash_attention_2")
    (problem,) = caught.value.problems
    assert f"it cannot be loaded beside torch {torch.__version__}" in problem.got
    assert "undefined symbol: _ZN3c10)" in problem.got


@pytest.mark.parametrize(("capability", "usable"), [(8, False), (9, True), (10, False)])
def test_flash_attention_3_is_for_hopper_alone(
    capability: int, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability=capability, installed=("flash_attention_3",))
    assert resolve("auto") == ("flash_attention_3" if usable else "sdpa")
