"""A model in memory and development windows enter; a few texts that it wrote leave, to be read.

They begin as the development text does, in whatever language that is, and are drawn with a seed of
their own: the same weights write the same on one kind of device, and no other random number of the
process is moved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from babyllama_ds.evaluation.cross_entropy import WindowsOf
from babyllama_ds.evaluation.generate import Sampling, continued
from babyllama_ds.models.families import positions_of

PROMPT_TOKENS = 12
"""Given of a window; of a shorter one, half."""
SAMPLE_TOKENS = 48
"""Written by the model, at most."""


def write_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    windows_of: WindowsOf,
    num_windows: int,
    *,
    number: int,
    device: torch.device | str,
) -> list[dict[str, str]]:
    """`number` texts, each `{"prompt": …, "text": …}`: the beginning of a window, and the rest.

    The windows are spread over the development text. The model is left in the mode that it was in.
    """
    device = torch.device(device)
    windows_NS = np.asarray(windows_of(_spread(number, num_windows)))
    given = min(PROMPT_TOKENS, windows_NS.shape[1] // 2)
    sampling = Sampling(tokens=_room(model, given))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            return [
                _sample(model, tokenizer, torch.tensor(ids_S[:given]), sampling, device)
                for ids_S in windows_NS.astype(np.int64)
            ]
    finally:
        for module, training in modes:
            module.training = training


def _spread(number: int, num_windows: int) -> list[int]:
    """Indices of at most `number` windows, evenly spaced from the first on."""
    number = min(number, num_windows)
    return [k * num_windows // number for k in range(number)]


def _room(model: Any, given: int) -> int:
    positions = positions_of(model.config)
    return SAMPLE_TOKENS if positions is None else max(1, min(SAMPLE_TOKENS, positions - given))


def _sample(
    model: nn.Module,
    tokenizer: Any,
    prompt_S: torch.Tensor,
    sampling: Sampling,
    device: torch.device,
) -> dict[str, str]:
    ids_1S = prompt_S[None].to(device)
    with torch.no_grad():
        (ids_S,) = continued(model, ids_1S, sampling, pad_id=tokenizer.pad_token_id)
    whole = str(tokenizer.decode(ids_S, skip_special_tokens=True))
    prompt = str(tokenizer.decode(prompt_S, skip_special_tokens=True))
    # A character that the prompt's last token only begins belongs to the text.
    if not whole.startswith(prompt):
        prompt = prompt.rstrip("\ufffd")
    return {"prompt": prompt, "text": whole[len(prompt) :]}
