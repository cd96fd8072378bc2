"""Any causal LM, ready to be used: what a user calls a model enters, model and tokenizer leave.

A user's name for a model is a directory, a run's directory (its student) or a hub id. Only
safetensors are read, and no code of theirs runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from babyllama_ds.errors import ModelError
from babyllama_ds.models.build import load_model

WHERE = "MODEL"
_PROBE_TOKENS = 8


def model_directory(path: str) -> str:
    """The path itself; of a run's folder, that of its student.

    Raises:
        ModelError: a run that has no student yet, or a file.
    """
    student = Path(path) / "student"
    if (Path(path) / "config.json").exists():
        return path
    if (student / "config.json").exists():
        return str(student)
    if (Path(path) / "job.yaml").exists():
        raise ModelError.of(
            WHERE,
            got=f"{path}, a run without a student yet",
            expected="a model, or a run that has one",
            hint="one of its teachers may be done: RUN/teachers/NAME",
        )
    if Path(path).is_file():
        raise ModelError.of(
            WHERE,
            got=f"{path}, a file",
            expected="a directory",
            hint="unpack it first: tar --extract --file" if path.endswith(".tar") else None,
        )
    return path


def check_model_directory(path: str, *, where: str = WHERE) -> None:
    """A local directory holds a model that can be read; hub ids are left to the hub.

    Raises:
        ModelError: nothing there, a file, no `config.json`, or weights that are pickles only.
    """
    directory = Path(path)
    if not directory.is_dir():
        if directory.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise _no_model(path, "a file" if directory.exists() else "no such directory", where)
        return
    if not (directory / "config.json").exists():
        raise _no_model(path, "a directory without config.json", where)
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        raise ModelError.of(
            where,
            got=f"{path}: {f'pickled weights only ({pickles[0]})' if pickles else 'no weights'}",
            expected="weights as safetensors, since a pickle can run any code when it is read",
            hint="load the model with transformers where you trust it, and `save_pretrained` it",
        )


def load_causal_lm(path: str, *, device: torch.device, where: str = WHERE) -> nn.Module:
    """The model in the dtype it was saved in, in eval mode on `device`.

    Raises:
        ModelError: not loadable, or its predictions look at later tokens.
    """
    model = load_model(path, attention=None, where=where, dtype="auto").to(device).eval()
    _check_causal(model, where=where)
    return model


@torch.no_grad()
def _check_causal(model: nn.Module, *, where: str) -> None:
    """An encoder's head loads as a causal LM too, but sees the tokens it is asked about."""
    device = next(model.parameters()).device
    rows = embedding_rows(model)
    first_S = torch.arange(_PROBE_TOKENS, device=device) % rows
    other_S = first_S.clone()
    other_S[-1] = (first_S[-1] + 1) % rows
    logits_2SV: Any = model(input_ids=torch.stack([first_S, other_S]), use_cache=False).logits
    seen_SV, unseen_SV = logits_2SV[:, :-1].float()
    if not torch.allclose(seen_SV, unseen_SV, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ModelError.of(
            where,
            got=f"{type(model).__name__}, whose predictions change with later tokens",
            expected="a causal language model: each token predicted from those before it",
        )


def embedding_rows(model: nn.Module) -> int:
    """Token ids that the model has an embedding for."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return rows


def _no_model(path: str, got: str, where: str) -> ModelError:
    return ModelError.of(
        where,
        got=f"{path}: {got}",
        expected="a causal language model directory (config.json, *.safetensors), a run's directory"
        " or a hub id",
    )
