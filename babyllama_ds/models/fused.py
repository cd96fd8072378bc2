"""Faster equals of transformers' own modules: a model enters, and leaves computing the same.

Weights, their names, the configuration and what is saved stay as they are; a module is given
another forward pass of the same function. What each gains: docs/decisions/fused-modules.md.

    GELU         GPT-2's tanh form as one operation, not eight; on a CPU, in bf16 without
                 autograd, at the end of the product before it
    RMSNorm      one kernel forward and two backward on CUDA; on a CPU half the passes over the
                 states, and no fp32 copies of them
    attention    plain products: scale and mask at the end of the first of them

Shapes: B windows, H heads, S positions, T positions looked at, D width, P inner width, N = B * S.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm

PLAIN_ATTENTION = "babyllama_plain"
"""transformers' name for `plain_attention`."""

_PLAIN_FAMILIES = ("llama", "gpt2")
"""Families whose attention is no more than a softmax of scaled, masked products."""


def fuse(model: nn.Module) -> None:
    """Give the modules of `model` their faster forward passes, in place."""
    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = GELUTanh()
        # The same object with the same weights and hooks, and another forward pass.
        if type(module) is LlamaRMSNorm:
            module.__class__ = FusedRMSNorm
        if type(module) is GPT2MLP and isinstance(module.act, GELUTanh) and _fuses_products():
            module.__class__ = FusedGPT2MLP
    config: Any = getattr(model, "config", None)
    if (
        getattr(config, "model_type", None) in _PLAIN_FAMILIES
        and config._attn_implementation == "eager"
        and not getattr(config, "reorder_and_upcast_attn", False)
    ):
        cast(PreTrainedModel, model).set_attn_implementation(PLAIN_ATTENTION)


# -- attention -------------------------------------------------------------------------------------


def plain_attention(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling · q kᵀ + mask) v, as transformers' eager attention, in fewer passes.

    The softmax is computed in fp32 and rounded once, without an fp32 copy.

    Returns:
        The attended values [B, S, H, D], and the weights [B, H, S, T].
    """
    groups = query_BHSD.shape[1] // key_BHTD.shape[1]
    if groups > 1:
        key_BHTD = key_BHTD.repeat_interleave(groups, dim=1)
        value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
    shape_BHST = (*query_BHSD.shape[:3], key_BHTD.shape[2])
    scores = torch.baddbmm(
        attention_mask.expand(shape_BHST).flatten(0, 1),
        query_BHSD.flatten(0, 1),
        key_BHTD.flatten(0, 1).transpose(1, 2),
        alpha=scaling,
    )
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    attended_BHSD = torch.bmm(weights, value_BHTD.flatten(0, 1)).view(query_BHSD.shape)
    return attended_BHSD.transpose(1, 2).contiguous(), weights.view(shape_BHST)


AttentionInterface.register(PLAIN_ATTENTION, plain_attention)
AttentionMaskInterface.register(PLAIN_ATTENTION, eager_mask)


# -- RMSNorm ---------------------------------------------------------------------------------------


class FusedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """LLaMA's RMSNorm; under torch.compile that of transformers, which is fused there."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The normed states, of the same shape and type."""
        if torch.compiler.is_compiling():
            return cast(Tensor, super().forward(hidden_states))
        if hidden_states.is_cpu:  # where `rms_norm` is no kernel of its own
            normed: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
                hidden_states, self.weight, self.variance_epsilon
            )
            return normed
        return nn.functional.rms_norm(
            hidden_states, self.weight.shape, self.weight, self.variance_epsilon
        )


class _RMSNorm(torch.autograd.Function):
    """y = x · r · w with r = 1 / sqrt(mean(x²) + ε), out of PyTorch's kernels for other norms."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        states_ND = states.reshape(-1, states.shape[-1])
        precise = torch.promote_types(states.dtype, torch.float32)
        norm_N = torch.linalg.vector_norm(states_ND, dim=1, dtype=precise)
        square_N = norm_N.square_().div_(states.shape[-1])
        # Batch norm in evaluation divides each channel by a given deviation: here, each row.
        unit_ND = torch.batch_norm(
            states_ND[None],
            *(None, None, torch.zeros_like(square_N), square_N),
            *(False, 0.0, epsilon, False),
        )[0]
        ctx.save_for_backward(states_ND, unit_ND, weight_D, square_N.add(epsilon).rsqrt_())
        return unit_ND.mul(weight_D).view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = r (w dy − x̂ mean(w dy x̂)): layer norm's at mean 0, and what that takes off for it.

        Layer norm, y = (x − m) r w, gives dx = r (w dy − mean(w dy) − x̂ mean(w dy x̂)).
        """
        states_ND, unit_ND, weight_D, inverse_N = ctx.saved_tensors
        gradient_ND = gradient.reshape(states_ND.shape)
        inverse_N1 = inverse_N[:, None]
        of_states_ND, _, _ = torch.ops.aten.native_layer_norm_backward(
            *(gradient_ND, states_ND, [states_ND.shape[1]]),
            *(torch.zeros_like(inverse_N1), inverse_N1, weight_D.to(inverse_N.dtype), None),
            [True, False, False],  # its gradient of the weight is summed in bf16
        )
        of_weight_D = (gradient_ND * unit_ND).sum(0)
        taken_off_N = gradient_ND.mv(weight_D).mul_(inverse_N).div_(states_ND.shape[1])
        of_states_ND.add_(taken_off_N[:, None].to(of_states_ND.dtype))
        return of_states_ND.view(gradient.shape), of_weight_D, None


# -- GPT-2's feed-forward layer --------------------------------------------------------------------


class FusedGPT2MLP(GPT2MLP):  # type: ignore[misc]
    """GPT-2's feed-forward layer; frozen, in bf16 on a CPU, GELU is part of the first product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The layer's output, of the same shape and type."""
        frozen = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not (frozen and hidden_states.is_cpu and hidden_states.dtype == torch.bfloat16):
            return cast(Tensor, super().forward(hidden_states))
        inner_BSP = torch.ops.mkldnn._linear_pointwise(
            *(hidden_states, self.c_fc.weight.t(), self.c_fc.bias), "gelu", [], "tanh"
        )
        return cast(Tensor, self.dropout(self.c_proj(inner_BSP)))


def _fuses_products() -> bool:
    """Whether oneDNN is here and this CPU multiplies bf16: what torch.compile asks, too."""
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built_in and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
