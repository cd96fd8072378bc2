"""What families of transformers differ in: a configuration or a loaded model enters; whether and
how this stack can use it leaves.

Shapes: S positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from babyllama_ds.errors import ModelError, first_line
from babyllama_ds.models.directories import causal_lm_class
from babyllama_ds.models.probe import probe_tokens

PROBE_TOKENS = 8
LEAK = 1e-6
"""How large a gradient may be beside another to be taken for rounding."""

_POSITIONS = ("max_position_embeddings", "max_seq_len")
"""What families call the number of positions; the second: MPT."""


def positions_of(config: PretrainedConfig) -> int | None:
    """The longest sequence; none: the family has no limit (BLOOM)."""
    found = (getattr(config, name, None) for name in _POSITIONS)
    return next((int(positions) for positions in found if positions is not None), None)


def missing_kernels(config: PretrainedConfig) -> frozenset[str]:
    """Kinds of attention kernels, `sdpa` and `flash_attention`, that the family has not.

    PyTorch's kernel has no cap on scores (Gemma 2): transformers' releases before the one that says
    so of the family (5.17, say) take it and leave the cap out without a word.
    """
    family = causal_lm_class(config)
    uncapped = getattr(config, "attn_logit_softcapping", None) is None
    has = {
        "sdpa": family._supports_sdpa and uncapped,
        "flash_attention": family._supports_flash_attn,
    }
    return frozenset(kind for kind, there in has.items() if not there)


# -- by trying -------------------------------------------------------------------------------------


def check_causal(model: nn.Module, *, where: str) -> None:
    """No prediction looks at later tokens.

    An encoder's head (BERT's) loads as a causal language model too, but sees what it is asked.

    Raises:
        ModelError: it does.
    """
    if _logits_change(model) or _gradients_leak(model):
        raise ModelError.of(
            where,
            got=f"{type(model).__name__}, whose predictions change with later tokens",
            expected="a causal language model: each token predicted from those before it",
        )


@torch.no_grad()
def _logits_change(model: nn.Module) -> bool:
    """Whether another last token gives other predictions before it."""
    first_S = probe_tokens(model, PROBE_TOKENS)[0]
    other_S = first_S.clone()
    other_S[-1] = first_S[-2]
    logits_2SV: Tensor = _run(model, torch.stack([first_S, other_S]))
    seen_SV, unseen_SV = logits_2SV[:, :-1].float()
    return not torch.allclose(seen_SV, unseen_SV, rtol=1e-2, atol=1e-2, equal_nan=True)


@torch.enable_grad()
def _gradients_leak(model: nn.Module) -> bool:
    """Whether predictions before the last token have a gradient in its embedding, beside that of
    its own prediction.

    The logits of a model that is hardly trained, or not at all, hardly move whatever it looks at.
    The ratio of two gradients tells that at any scale, and in any precision: in a causal model one
    of them is 0. Not finite numbers tell nothing.
    """
    embedded: list[Tensor] = []

    def watched(*inputs_and_output: Any) -> Tensor:
        embedded.append(inputs_and_output[-1].detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(watched)  # type: ignore[operator]
    try:
        logits_SV = _run(model, probe_tokens(model, PROBE_TOKENS))[0].float()
    finally:
        hook.remove()
    if not embedded:  # a family that looks its embeddings up by itself
        return False
    # Weighted: the columns of a head may cancel each other in a plain sum.
    scores_S = (logits_SV * torch.arange(logits_SV.shape[1], device=logits_SV.device).sin()).sum(-1)
    (of_own,) = torch.autograd.grad(scores_S[-1], embedded[0], retain_graph=True)
    (of_earlier,) = torch.autograd.grad(scores_S[:-1].sum(), embedded[0])
    own, earlier = (gradient[0, -1].float().norm() for gradient in (of_own, of_earlier))
    return bool(earlier > LEAK * own)


@torch.no_grad()
def check_runs(model: nn.Module, *, where: str) -> None:
    """A forward pass in the type of the model's own parameters.

    Raises:
        ModelError: it fails, as in families that keep some of their numbers in fp32.
    """
    try:
        _run(model, probe_tokens(model, PROBE_TOKENS))
    except (RuntimeError, ValueError, TypeError) as error:
        kind = str(next(model.parameters()).dtype).removeprefix("torch.")
        reason = first_line(error)
        raise ModelError.of(
            where,
            got=f"{type(model).__name__}, which does not run in {kind} ({reason})",
            expected="a model that runs in the job's precision",
            hint="use another precision (deepspeed.config), attention kernel or model",
        ) from error


def check_trainable(config: PretrainedConfig, *, where: str) -> None:
    """A training goes through every layer.

    Ranks that left out different layers would give each other no gradients of them.

    Raises:
        ModelError: the configuration leaves layers out at random.
    """
    chance = getattr(config, "layerdrop", None) or 0.0
    if chance:
        raise ModelError.of(
            where,
            got=f"layers left out at random in training (layerdrop {chance:g})",
            expected="no layerdrop: ranks would leave out different ones",
            hint='set "layerdrop": 0.0 in its config.json',
        )


def _run(model: nn.Module, input_ids_BS: Tensor) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        outputs: Any = model(input_ids=input_ids_BS, use_cache=False)
    finally:
        for module, training in modes.items():
            module.training = training
    return cast(Tensor, outputs.logits)
