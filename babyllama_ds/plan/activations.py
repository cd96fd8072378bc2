"""Activations: what autograd keeps of a model's forward pass until the backward pass.

Enters: a model's sizes, a micro-batch, the attention kernel. Leaves: bytes. The terms are the
tensors that transformers' LLaMA and GPT-2 blocks save, with what `models.fused` makes of them,
counted one by one; other families are run on shapes (`plan.traced`). Tests compare both with what
`torch.autograd.graph.saved_tensors_hooks` sees of real models. Weights are not counted.

Shapes: N tokens of the micro-batch, S a window's, D width, A and K widths of all heads and of all
key-value heads, F width inside the MLP, H heads, e bytes of a number (bf16 2, fp32 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from babyllama_ds.models.documents import varies_in_shape
from babyllama_ds.models.sizes import ModelSizes
from babyllama_ds.plan.traced import NotTracedError, kept_bytes
from babyllama_ds.spec.deepspeed_file import Device

_ID_BYTES = 8
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class MicroBatchShape:
    """What one forward pass of one rank sees, and how."""

    windows: int
    length: int
    kernel: str
    """`eager`, `sdpa` or a FlashAttention."""
    element_bytes: int
    """Bytes of a parameter or an activation: 2 in bf16, 4 in fp32."""
    device: Device
    documents: bool = False
    """Whether attention stays within documents: kernels but FlashAttention then need a mask."""

    @property
    def masked(self) -> bool:
        """Whether a mask of S numbers for each of the N positions exists."""
        return self.documents and not varies_in_shape(self.kernel)

    checkpointed: bool = False
    """Whether layers keep their inputs alone (`gradient_checkpointing`)."""

    @property
    def tokens(self) -> int:
        """N, the tokens of the micro-batch."""
        return self.windows * self.length


def saved_bytes(sizes: ModelSizes, shape: MicroBatchShape) -> int:
    """Bytes that the backbone's forward pass leaves for its backward pass.

    A family that is neither LLaMA nor GPT-2 and cannot be run on shapes (`is_estimated`) is counted
    as a LLaMA of its widths.
    """
    if sizes.config is not None and not is_estimated(sizes, shape):
        return _traced(sizes.config, shape) + (_masks(shape) if shape.checkpointed else 0)
    layer, rest = _gpt2(sizes, shape) if sizes.family == "gpt2" else _llama(sizes, shape)
    if shape.checkpointed:
        layer = _input_bytes(sizes, shape)
        rest += _masks(shape)
    return sizes.num_layers * layer + rest


def recomputed_bytes(sizes: ModelSizes, shape: MicroBatchShape) -> int:
    """Bytes that one layer's forward pass leaves when it is computed again, before it goes back."""
    if not shape.checkpointed:
        return 0
    if sizes.config is not None and not is_estimated(sizes, shape):
        whole = _traced(sizes.config, replace(shape, checkpointed=False))
        layers = whole - _traced(sizes.config, shape)
        return layers // sizes.num_layers + _input_bytes(sizes, shape)
    return (_gpt2(sizes, shape) if sizes.family == "gpt2" else _llama(sizes, shape))[0]


def is_estimated(sizes: ModelSizes, shape: MicroBatchShape) -> bool:
    """Whether these are no more than a LLaMA's of these widths."""
    if sizes.config is None:
        return False
    try:
        _traced(sizes.config, shape)
        if shape.checkpointed:
            _traced(sizes.config, replace(shape, checkpointed=False))
    except NotTracedError:
        return True
    return False


def _traced(config: PretrainedConfig, shape: MicroBatchShape) -> int:
    return kept_bytes(
        config,
        windows=shape.windows,
        length=shape.length,
        eager=shape.kernel == "eager",
        element_bytes=shape.element_bytes,
        on_cpu=shape.device == "cpu",
        documents=shape.masked,
        checkpointed=shape.checkpointed,
    )


def _input_bytes(sizes: ModelSizes, shape: MicroBatchShape) -> int:
    """A layer's input: all that is kept of it where it is computed again."""
    return shape.element_bytes * shape.tokens * sizes.hidden_size


def _masks(shape: MicroBatchShape) -> int:
    """The mask of all layers, which recomputed ones share."""
    if shape.kernel != "eager":
        return 0
    return shape.element_bytes * shape.tokens * shape.length


def working_bytes(sizes: ModelSizes, shape: MicroBatchShape) -> int:
    """Bytes that come and go inside one layer: the larger of its two halves' intermediates.

    MLP: the product's gradient and those of its factors, 3eNF. Eager attention: the gradients of
    scores and probabilities, 2e N·H·S. Attention within documents: their mask, (1 + e) N·S.
    """
    n, e = shape.tokens, shape.element_bytes
    mlp = 3 * e * n * sizes.intermediate_size
    scores = n * sizes.num_heads * shape.length
    eager = 2 * e * scores if _keeps_scores(sizes, shape) else 0
    # The mask of the micro-batch, as booleans and as numbers, which no layer keeps.
    mask = (1 + e) * n * shape.length if shape.masked else 0
    return max(mlp, eager) + mask


def _llama(sizes: ModelSizes, shape: MicroBatchShape) -> tuple[int, int]:
    """Bytes kept of a layer, and of what is in no layer."""
    n, e, d = shape.tokens, shape.element_bytes, sizes.hidden_size
    # Input, 1/rms, and on a CPU the normalised input, which CUDA's kernel computes again.
    norm = e * n * d + _FP32 * n + (e * n * d if shape.device == "cpu" else 0)
    layer = (
        2 * (norm + e * n * d)  # and the norm's output, which the next products keep
        + _attention(sizes, shape)
        + 4 * e * n * sizes.intermediate_size  # gate, silu(gate), up, their product
    )
    counted = n if shape.documents else shape.length  # anew in each window, or once for all
    cos_and_sin = 2 * e * counted * sizes.head_size
    return layer, norm + cos_and_sin + _ID_BYTES * n


def _gpt2(sizes: ModelSizes, shape: MicroBatchShape) -> tuple[int, int]:
    """Bytes kept of a layer, and of what is in no layer."""
    n, e, d = shape.tokens, shape.element_bytes, sizes.hidden_size
    # The CPU keeps mean and 1/deviation in the input's dtype, CUDA in fp32.
    norm = e * n * d + 2 * n * (e if shape.device == "cpu" else _FP32)
    mask = _dropout_mask(sizes.dropout, shape) * n * d
    layer = (
        2 * (norm + e * n * d)
        + _attention(sizes, shape)
        + 2 * e * n * sizes.intermediate_size  # before and after GELU
        + 2 * mask
    )
    return layer, norm + mask + _ID_BYTES * n + _positions(shape)


def _positions(shape: MicroBatchShape) -> int:
    """Places that a learned embedding is asked for: of each window in turn, or once for all."""
    return 4 * shape.tokens if shape.documents else _ID_BYTES * shape.length


def _attention(sizes: ModelSizes, shape: MicroBatchShape) -> int:
    """q, k, v and the heads' output, and what the kernel keeps to come back by."""
    n, e = shape.tokens, shape.element_bytes
    scores = n * sizes.num_heads * shape.length
    if not _keeps_scores(sizes, shape):
        log_sums = _FP32 * n * sizes.num_heads
        if shape.masked:  # grouped keys and values are repeated, and each layer makes its own mask
            return e * n * 4 * sizes.attention_size + e * n * shape.length + log_sums
        return e * n * (2 * sizes.attention_size + 2 * sizes.kv_size) + log_sums
    heads = 4 * e * n * sizes.attention_size  # grouped keys and values are repeated
    if shape.kernel != "eager":  # fused, with dropout, on a CPU: plain products in fp32
        heads = (e + 3 * _FP32) * n * sizes.attention_size
        return heads + 3 * _FP32 * scores
    if sizes.attention_dropout:
        return heads + (2 * e + _dropout_mask(sizes.attention_dropout, shape)) * scores
    return heads + e * scores


def _keeps_scores(sizes: ModelSizes, shape: MicroBatchShape) -> bool:
    """Whether all S × S probabilities exist: not in the fused kernels, but for one case."""
    plain_fallback = shape.device == "cpu" and sizes.attention_dropout > 0
    return shape.kernel == "eager" or plain_fallback


def _dropout_mask(dropout: float, shape: MicroBatchShape) -> int:
    """Bytes of a number's place in a dropout mask: a boolean on CUDA, a factor on a CPU."""
    if not dropout:
        return 0
    return shape.element_bytes if shape.device == "cpu" else 1
