"""Activation bytes against what autograd is seen to save, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from babyllama_ds.models.documents import Pieces, model_inputs
from babyllama_ds.models.fused import fuse
from babyllama_ds.models.recomputing import recompute_layers
from babyllama_ds.models.sizes import sizes_of
from babyllama_ds.plan.activations import MicroBatchShape, recomputed_bytes, saved_bytes

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40}),
    ("gpt2", DROPOUT),
    ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.1}),
    ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}),
    ("llama", {"attention_dropout": 0.1}),
]


def saved_by_autograd(
    model: nn.Module, *, windows: int, length: int, pieces: Pieces | None = None
) -> int:
    """Bytes of every storage that the backbone's forward pass saves, weights left out."""
    weights = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor  # held: no address comes twice
        return tensor

    ids_BS = torch.randint(0, 61, (windows, length), device=model.device)  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = model_inputs(model, ids_BS, pieces)
        model.train().base_model(**inputs, use_cache=False)  # type: ignore[operator]
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In which models are made: fake tensors cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _storage(tensor: Tensor) -> int:
    """Which one it is; fake tensors have no address."""
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_what_autograd_saves(
    kind: str,
    changes: dict[str, Any],
    kernel: str,
    precision: torch.dtype,
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model(kind, attn_implementation=kernel, **changes).to(precision)
    shape = MicroBatchShape(
        windows=3, length=17, kernel=kernel, element_bytes=precision.itemsize, device="cpu"
    )
    fuse(model)
    measured = saved_by_autograd(model, windows=3, length=17)
    assert saved_bytes(sizes_of(model.config), shape) == measured


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that is built for CUDA")
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_what_autograd_saves_on_cuda(
    kind: str, changes: dict[str, Any], precision: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    """Of tensors without contents, which need no card; one alone chooses a fused attention."""
    shape = MicroBatchShape(
        windows=3, length=17, kernel="eager", element_bytes=precision.itemsize, device="cuda"
    )
    with FakeTensorMode(), torch.device("cuda"), default_dtype(precision):
        model = tiny_model(kind, attn_implementation="eager", **changes)
        fuse(model)
        measured = saved_by_autograd(model, windows=3, length=17)
    assert saved_bytes(sizes_of(model.config), shape) == measured


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_what_autograd_saves_of_recomputed_layers(
    kind: str,
    changes: dict[str, Any],
    kernel: str,
    precision: torch.dtype,
    tiny_model: Callable[..., Any],
) -> None:
    """Their inputs; what LLaMA hands to them by name is held where autograd is not asked."""
    model = tiny_model(kind, attn_implementation=kernel, **changes).to(precision)
    shape = MicroBatchShape(
        windows=3,
        length=17,
        kernel=kernel,
        element_bytes=precision.itemsize,
        device="cpu",
        checkpointed=True,
    )
    fuse(model)
    whole = saved_by_autograd(model, windows=3, length=17)
    recompute_layers(model)
    measured = saved_by_autograd(model, windows=3, length=17)
    sizes = sizes_of(model.config)
    mask = precision.itemsize * 3 * 17 * 17 if kernel == "eager" else 0
    by_name = 2 * precision.itemsize * 17 * sizes.head_size + mask if kind == "llama" else 0
    saved = saved_bytes(sizes, shape)
    assert saved == measured + by_name
    # What a layer leaves when it is computed again: the difference, but for its input.
    each = (whole - saved + mask) / sizes.num_layers
    assert recomputed_bytes(sizes, shape) == each + precision.itemsize * 3 * 17 * sizes.hidden_size


def test_layers_that_are_not_recomputed_leave_nothing_later(tiny_model: Callable[..., Any]) -> None:
    shape = MicroBatchShape(windows=3, length=17, kernel="sdpa", element_bytes=2, device="cpu")
    assert recomputed_bytes(sizes_of(tiny_model("llama").config), shape) == 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "changes"), MODELS[:4])
def test_what_autograd_saves_of_documents_kept_apart(
    kind: str,
    changes: dict[str, Any],
    kernel: str,
    precision: torch.dtype,
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model(kind, attn_implementation=kernel, **changes).to(precision)
    shape = MicroBatchShape(
        windows=3,
        length=17,
        kernel=kernel,
        element_bytes=precision.itemsize,
        device="cpu",
        documents=True,
    )
    fuse(model)
    begins_BS = np.isin(np.arange(3 * 17).reshape(3, 17), (0, 5, 17, 34, 50))
    pieces = Pieces.of(begins_BS)
    measured = saved_by_autograd(model, windows=3, length=17, pieces=pieces)
    assert saved_bytes(sizes_of(model.config), shape) == measured
