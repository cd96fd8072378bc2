"""A trained model enters; a Hugging Face directory leaves that needs nothing of this package."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.models.build import count_parameters
from babyllama_ds.models.families import positions_of


def export_model(
    model: nn.Module,
    tokenizer_dir: Path,
    directory: Path,
    summary: Mapping[str, Any],
    *,
    dtype: torch.dtype,
) -> None:
    """Cast the model to `dtype`, and write it as `write_model` does.

    `dtype` is what the model was trained and evaluated in, so what is measured is what is given
    away.

    Raises:
        RunError: the disk refuses.
    """
    model.to(dtype)
    write_model(model, tokenizer_dir, directory, summary)


def write_model(
    model: nn.Module, tokenizer_dir: Path, directory: Path, summary: Mapping[str, Any]
) -> None:
    """Weights (safetensors), configuration, generation defaults, tokenizer, summary.

    The model may go on training afterwards: its parameters and buffers (a cast would round RoPE's
    frequencies) stay as they are. Generation ends at the positions that the model has, where it did
    not say so itself: a pipeline asked for nothing in particular writes 256 tokens, which is beyond
    small models. The tokenizer's files are copied as they are. `training.json` holds the summary
    that the report reads.

    Raises:
        RunError: the disk refuses.
    """
    model.config.dtype = next(model.parameters()).dtype
    try:
        _save(model, directory)
        _let_others_read(directory)
        for path in tokenizer_dir.glob("*.json"):
            if path.name != files.MANIFEST_NAME:
                shutil.copy(path, directory)
    except (OSError, SafetensorError) as error:  # the latter: what safetensors makes of it
        raise RunError.of(
            directory,
            got=f"{getattr(error, 'strerror', None) or error} while writing a model",
            expected="room for the model",
            hint="free some space and start again: training goes on from its last checkpoint",
        ) from error
    params = count_parameters(model)
    files.write_json(directory / "training.json", {**summary, "params": params})


def _save(model: Any, directory: Path) -> None:
    """As transformers does, but for how texts are written, which is saved as the model has it.

    transformers loads settings that do not go together with no more than a warning (a temperature,
    and no word of sampling), and refuses to save them once `max_length` stands beside them: a
    training that started from such a model would end without one.
    """
    generation = model.generation_config
    if generation.max_length is None:
        generation.max_length = positions_of(model.config)
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(directory)
    finally:
        model.generation_config = generation
    generation.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def _let_others_read(directory: Path) -> None:
    """Weights get the permissions of any new file: safetensors writes them for their owner alone,
    and a model is often read by others than who trained it (a container's user, a group)."""
    permissions = stat.S_IMODE((directory / "config.json").stat().st_mode)
    for path in directory.glob("*.safetensors"):
        path.chmod(permissions)
