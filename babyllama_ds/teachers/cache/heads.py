"""A teacher's head without the teacher: a model's directory enters, its output head leaves.

Only the head's tensors are read; the model is built without memory, to learn their names. Some
families have others in their files (GPT-NeoX): of these the whole model is read, once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from babyllama_ds.errors import ModelError
from babyllama_ds.losses.heads import Head
from babyllama_ds.models.build import load_model


def load_head(model_dir: Path, *, device: torch.device, dtype: torch.dtype) -> Head:
    """The plain head of a model that `export_model` wrote, as the frozen model has it.

    Raises:
        ModelError: the model has no such head, or the directory not all of its tensors.
    """
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError.of(
            model_dir,
            got=f"a head of type {type(head).__name__}",
            expected="a linear one, for distillation.cache=hidden",
            hint="set distillation.cache=topk or none",
        )
    names = [_names(model, each) for each in (head.weight, head.bias) if each is not None]
    found = [_tensor(model_dir, each) for each in names]
    if any(tensor is None for tensor in found):
        whole = load_model(str(model_dir), attention=None, where=str(model_dir), dtype=dtype)
        head = whole.get_output_embeddings()  # type: ignore[operator]
        found = [each.detach() for each in (head.weight, head.bias) if each is not None]
    weight, *biases = (tensor.to(device, dtype) for tensor in found if tensor is not None)
    return Head(weight, biases[0] if biases else None)


def _names(model: nn.Module, wanted: object) -> set[str]:
    """What a parameter is called in the model: a tied one has two names, and a file one of them."""
    return {name for name, one in model.named_parameters(remove_duplicate=False) if one is wanted}


def _tensor(model_dir: Path, names: set[str]) -> Tensor | None:
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for name in names & set(stream.keys()):
                found: Tensor = stream.get_tensor(name)
                return found
    return None
