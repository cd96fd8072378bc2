"""What a model is tried with before it is trusted: the model enters, a few token ids leave."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def embedding_rows(model: nn.Module) -> int:
    """Token ids that the model has an embedding for."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return rows


def probe_tokens(model: nn.Module, num_tokens: int) -> Tensor:
    """Ids `[1, num_tokens]` on the model's device, that differ as far as its vocabulary goes."""
    device = next(model.parameters()).device
    return torch.arange(num_tokens, device=device)[None] % embedding_rows(model)
