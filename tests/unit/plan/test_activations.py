"""Activation bytes against what autograd is seen to save, tensor by tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoder

from babyllama_ds.models.documents import Pieces, model_inputs, sequences_of
from babyllama_ds.models.families import missing_kernels
from babyllama_ds.models.fused import fuse
from babyllama_ds.models.recomputing import recompute_layers
from babyllama_ds.models.sizes import sizes_of
from babyllama_ds.plan.activations import (
    MicroBatchShape,
    is_estimated,
    recomputed_bytes,
    saved_bytes,
)
from babyllama_ds.plan.traced import NotTracedError

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


# -- other families, run on shapes -----------------------------------------------------------------

WIDTHS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 6}),
    "gemma2": ("gemma2", {"head_dim": 6}),
    "opt": ("opt", {"ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.1}),
    "opt with dropout in attention": (
        "opt",
        {"ffn_dim": 40, "word_embed_proj_dim": 24, "attention_dropout": 0.1},
    ),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neo": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    "olmo2": ("olmo2", {}),
}


def of_family(name: str, kernel: str, precision: torch.dtype) -> Any:
    family, changes = FAMILIES[name]
    if family == "opt" and "self.training:" in inspect.getsource(OPTDecoder.forward):
        pytest.skip("this transformers draws a number for each layer of OPT: it is estimated")
    config = AutoConfig.for_model(family, **{**WIDTHS, **changes})
    if kernel not in ("eager", *({"sdpa"} - missing_kernels(config))):
        pytest.skip("the family has no fused attention")
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=precision)


@pytest.mark.parametrize(
    ("name", "kernel", "within", "windows"),
    [
        *product(FAMILIES, ("eager", "sdpa"), ("window", "document", "recomputed"), (5,)),
        ("gpt-neox", "eager", "window", 1),
        ("qwen2", "sdpa", "document", 1),
    ],
)
def test_what_autograd_saves_of_other_families(
    name: str, kernel: str, within: str, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = torch.float32 if name == "qwen3" else torch.bfloat16
    # As in a run: whether windows hold several documents is told, not looked for.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", sequences_of)
    model = of_family(name, kernel, precision)
    sizes = sizes_of(model.config)
    shape = MicroBatchShape(
        windows=windows,
        length=17,
        kernel=kernel,
        element_bytes=precision.itemsize,
        device="cpu",
        documents=within == "document",
        checkpointed=within == "recomputed",
    )
    fuse(model)
    begins_BS = np.arange(windows * 17).reshape(windows, 17) % 17 % 5 == 0
    pieces = Pieces.of(begins_BS) if shape.documents else None
    whole = saved_by_autograd(model, windows=windows, length=17, pieces=pieces)
    assert not is_estimated(sizes, shape)
    if within != "recomputed":
        assert saved_bytes(sizes, shape) == whole
        return
    recompute_layers(model)
    measured = saved_by_autograd(model, windows=windows, length=17)
    mask = precision.itemsize * windows * 17 * 17 if kernel == "eager" else 0
    assert saved_bytes(sizes, shape) == measured + mask
    each = (whole - measured) / sizes.num_layers
    assert recomputed_bytes(sizes, shape) == each + precision.itemsize * windows * 17 * 24


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gpt2", DROPOUT)])
def test_terms_and_shapes_agree(
    kind: str,
    changes: dict[str, Any],
    kernel: str,
    device: Literal["cpu", "cuda"],
    tiny_model: Callable[..., Any],
) -> None:
    """The two ways of counting: of fused attention on a card, which no test can see, too."""
    config = tiny_model(kind, **changes).config
    sizes = sizes_of(config)
    shape = MicroBatchShape(windows=3, length=17, kernel=kernel, element_bytes=2, device=device)
    # A card's layer norms keep two numbers for each position in fp32: of two layers, and the last.
    in_fp32 = (2 * 2 + 1) * 2 * 3 * 17 * (4 - 2) if (kind, device) == ("gpt2", "cuda") else 0
    traced = saved_bytes(replace(sizes, config=config), shape)
    assert saved_bytes(sizes, shape) == traced + in_fp32


def test_a_family_that_cannot_be_run_on_shapes_is_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise NotTracedError

    model = of_family("qwen2", "eager", torch.float32)
    sizes = sizes_of(model.config)
    shape = MicroBatchShape(windows=3, length=17, kernel="eager", element_bytes=4, device="cpu")
    monkeypatch.setattr("babyllama_ds.plan.activations.kept_bytes", refuse)
    assert is_estimated(sizes, shape)
    llama = replace(sizes, config=None, family="llama")
    assert saved_bytes(sizes, shape) == saved_bytes(llama, shape)
    assert not is_estimated(llama, shape)
