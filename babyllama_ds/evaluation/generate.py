"""What a model says: the directory of any causal LM and a prompt enter, its continuations leave.

The sampling is transformers' own. Nothing here is a measurement: it is for people, who want to see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from babyllama_ds.corpus.tokenizer import load_tokenizer, vocabulary_size
from babyllama_ds.errors import ModelError
from babyllama_ds.evaluation.loading import WHERE, check_model_directory, model_directory
from babyllama_ds.models.build import check_vocabulary_fits, load_model
from babyllama_ds.models.directories import MODEL
from babyllama_ds.models.families import positions_of


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    tokens: int = 60
    """New tokens, at most: an end-of-text token ends earlier."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token always."""
    top_p: float = 0.95
    """Of the likeliest tokens, those that hold this much probability are drawn from."""
    number: int = 1
    """Continuations of each prompt."""
    seed: int = 0


def generate(
    path: str, prompts: list[str], sampling: Sampling, *, device: torch.device
) -> Iterator[str]:
    """Prompt and continuation, `sampling.number` times for each prompt, one after another.

    The same seed gives the same texts, in fp32, on the same kind of device.

    Raises:
        ModelError, DataError: no model or no tokenizer in the directory, or they do not belong
            together; a prompt without a token, or too long for the model's positions; several
            continuations without sampling.
    """
    if sampling.number > 1 and not sampling.temperature:
        raise ModelError.of(
            "--number",
            got=f"{sampling.number} at temperature 0",
            expected="1, for all would be the same",
            hint="give a higher --temperature",
        )
    directory = model_directory(path)
    check_model_directory(directory)
    tokenizer = load_tokenizer(directory, where=WHERE, what=MODEL)
    model: Any = load_model(directory, attention=None, where=WHERE).to(device).eval()
    check_vocabulary_fits(model, vocabulary_size(tokenizer), where=WHERE)
    torch.manual_seed(sampling.seed)
    for prompt in prompts:
        ids_1S = _encoded(prompt, tokenizer, model, sampling.tokens).to(device)
        # A tokenizer that puts a space before the first word gives it back.
        added = "" if prompt.startswith(" ") else " "
        yield from (
            cast(str, tokenizer.decode(ids_S, skip_special_tokens=True)).removeprefix(added)
            for ids_S in continued(model, ids_1S, sampling, pad_id=tokenizer.pad_token_id)
        )


def continued(
    model: Any, ids_1S: torch.Tensor, sampling: Sampling, *, pad_id: int | None
) -> torch.Tensor:
    """The ids `[1, S]` and what the model makes follow, `sampling.number` times: `[B, S + new]`.

    Draws from torch's own generator, which the caller seeds.
    """
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = model.generation_config
    named, settings.max_length = settings.max_length, None  # `sampling.tokens` says how long
    try:
        ids_BS: torch.Tensor = model.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=sampling.tokens,
            num_return_sequences=sampling.number,
            pad_token_id=pad_id or 0,
            **({"do_sample": True, **drawn} if sampling.temperature else {"do_sample": False}),
        )
    finally:
        settings.max_length = named
    return ids_BS


def _encoded(prompt: str, tokenizer: Any, model: Any, new_tokens: int) -> torch.Tensor:
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    positions = positions_of(model.config)
    if not ids:
        raise ModelError.of(
            "PROMPT", got=f"{prompt!r}, which has no tokens", expected="a word to go on from"
        )
    if positions is not None and len(ids) + new_tokens > positions:
        raise ModelError.of(
            "PROMPT",
            got=f"{len(ids)} tokens and {new_tokens} to come",
            expected=f"at most {positions} together, the positions of the model",
            hint="shorten the prompt, or give fewer --tokens",
        )
    return torch.tensor([ids])
