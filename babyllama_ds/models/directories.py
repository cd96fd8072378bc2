"""A model's directory before its weights are read: a path or hub id enters, its configuration
leaves, or the reason why the model cannot be taken.

Neither pickles nor code of a model's own are read, so what would need them is refused here, in
words, and not wherever transformers comes to it. The same is done for what loads without an error
and would be another model than its directory holds: the decoder of an encoder-decoder, the
language part of a model that sees or hears, weights that are quantised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from babyllama_ds.errors import ModelError, UserError, first_line
from babyllama_ds.hub import commit_of

MODEL = "a causal language model: its directory (config.json, *.safetensors), or a hub id"
"""What a model's path is expected to name."""

_GIT_LFS = b"version https://git-lfs"
"""How the small file begins that `git clone` leaves in place of a large one, without git-lfs."""

_OF_ONE_MODEL = {"attn_config", "ffn_config"}
"""Parts of a configuration that describe no model of their own (MPT, DBRX)."""


def read_config(path: str, *, revision: str | None = None, where: str) -> PretrainedConfig:
    """The configuration of the causal language model in a directory, or of a hub id.

    Raises:
        HubError: nothing there, neither here nor on the hub.
        ModelError: none that can be read, a family of its own code or one that transformers does
            not know, an encoder-decoder, a model of more than text, quantised weights.
    """
    commit = commit_of(path, revision, where=where, what=MODEL)
    _check_place(Path(path), where=where)
    try:
        found, _ = PretrainedConfig.get_config_dict(path, revision=commit)
        _check_found(found, path, where=where)
        config = AutoConfig.from_pretrained(path, revision=commit, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise ModelError.of(where, got=f"{path}: {reason_of(error)}", expected=MODEL) from error
    _check_config(config, path, where=where)
    return config


def reason_of(error: Exception) -> str:
    """In a line, what transformers ran into: of a value that a configuration may not have, itself.

    It raises what it likes: assertions of its own, and of torch, of what a file says among them.
    """
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    return first_line(cause or error)


def causal_lm_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that transformers makes a causal language model of."""
    found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found


def check_weight_files(path: str, *, where: str) -> None:
    """A local directory has weights that can be read; hub ids are left to the hub.

    Raises:
        ModelError: no weights, none but pickles, or a file that is not whole.
    """
    directory = Path(path)
    if not directory.is_dir():
        return
    if any(directory.glob("*.safetensors")):
        for file in _read_of(directory):
            _check_weight_file(file, where=where)
        return
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    raise ModelError.of(
        where,
        got=f"{path}: {f'pickled weights only ({pickles[0]})' if pickles else 'no weights'}",
        expected="weights as safetensors, since a pickle can run any code when it is read",
        hint="load the model with transformers where you trust it, and `save_pretrained` it",
    )


def _read_of(directory: Path) -> list[Path]:
    """The weight files that are there and that transformers reads; others may be of another
    program, such as `consolidated.safetensors` of Mistral's."""
    one, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if one.exists():
        return [one]
    found = sorted(directory.glob("*.safetensors"))
    if not index.exists():
        return found
    named = index.read_text(errors="replace")  # transformers says what may be wrong with it
    return [file for file in found if json.dumps(file.name) in named]


def _check_weight_file(file: Path, *, where: str) -> None:
    """Its header is read, which says how long the file should be; no weight is."""
    try:
        with safe_open(file, framework="pt"):
            return
    except (OSError, SafetensorError) as error:
        reason, hint = str(error), "copy or download it again: it is damaged or was cut short"
    with file.open("rb") as stream:
        if stream.read(len(_GIT_LFS)) == _GIT_LFS:
            reason = "a pointer of git-lfs, which stands for the weights"
            hint = "`git lfs pull` in that directory brings them; or `hf download` it instead"
    raise ModelError.of(
        where, got=f"{file}: {reason}", expected="whole weights as safetensors", hint=hint
    )


def _check_place(path: Path, *, where: str) -> None:
    """What is here under this name, if anything is, is a directory with a configuration."""
    if path.is_file():
        hint = f"give the directory that it lies in: {path.parent}"
        raise ModelError.of(where, got=f"{path}, a file", expected=MODEL, hint=hint)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError.of(where, got=f"{path}: a directory without config.json", expected=MODEL)


def _check_found(found: dict[str, Any], path: str, *, where: str) -> None:
    """What config.json says of its own, before transformers makes a configuration of it."""
    family = found.get("model_type")
    if family not in CONFIG_MAPPING and found.get("auto_map"):
        raise ModelError.of(
            where,
            got=f"{path}: a family ({family}) that is defined by code of its own",
            expected="a family of transformers' own: no code of a model's directory is ever run",
            hint="if transformers knows it under another name, save it again as that",
        )
    if quantised := found.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError.of(
            where,
            got=f"{path}: quantised weights ({method or 'quantization_config'})",
            expected="weights in fp32, bf16 or fp16",
            hint="take the model it was quantised from; or `model.dequantize()` it with "
            "transformers, and `save_pretrained` it",
        )


def _check_config(config: PretrainedConfig, path: str, *, where: str) -> None:
    parts = sorted(set(config.sub_configs) - _OF_ONE_MODEL)
    if config.is_encoder_decoder:
        raise ModelError.of(
            where,
            got=f"{path}: an encoder-decoder ({config.model_type})",
            expected="a causal language model: each token predicted from those before it alone",
        )
    if parts:
        raise ModelError.of(
            where,
            got=f"{path}: a model of more than text ({config.model_type}, with {', '.join(parts)})",
            expected="a causal language model of text alone",
            hint="save its language model by itself, with its own config.json",
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError.of(
            where,
            got=f"{path}: {config.model_type}, of which transformers has no causal language model",
            expected="a causal language model: each token predicted from those before it",
        )
