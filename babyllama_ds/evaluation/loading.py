"""Any causal LM, ready to be used: what a user calls a model enters, model and tokenizer leave.

A user's name for a model is a directory, a run's directory (its student) or a hub id. Only
safetensors are read, and no code of theirs runs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from babyllama_ds.errors import ModelError
from babyllama_ds.hub import can_only_be_local
from babyllama_ds.models.build import load_model
from babyllama_ds.models.directories import check_weight_files
from babyllama_ds.models.families import check_causal
from babyllama_ds.store import STORE_LOST, lost_target

WHERE = "MODEL"


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
        ModelError: nothing there, a link of a run whose store is gone, a file, no `config.json`,
            or weights that are pickles only.
    """
    directory = Path(path)
    if target := lost_target(directory):
        got = f"a link to {target}, which is not there"
        raise _no_model(path, got, where, hint=STORE_LOST if "store" in target.parts else None)
    if not directory.is_dir():
        if directory.exists() or can_only_be_local(path):
            raise _no_model(path, "a file" if directory.exists() else "no such directory", where)
        return
    if not (directory / "config.json").exists():
        raise _no_model(path, "a directory without config.json", where)
    check_weight_files(path, where=where)


def load_causal_lm(path: str, *, device: torch.device, where: str = WHERE) -> nn.Module:
    """The model in the dtype it was saved in, in eval mode on `device`.

    Raises:
        ModelError: not loadable, or its predictions look at later tokens.
    """
    model = load_model(path, attention=None, where=where, dtype="auto").to(device).eval()
    check_causal(model, where=where)
    return model


def _no_model(path: str, got: str, where: str, *, hint: str | None = None) -> ModelError:
    return ModelError.of(
        where,
        got=f"{path}: {got}",
        expected="a causal language model directory (config.json, *.safetensors), a run's directory"
        " or a hub id",
        hint=hint,
    )
