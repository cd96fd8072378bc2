"""One model of a finished run enters; a Hugging Face directory leaves that needs nothing else.

It holds what the run wrote (a teacher's without what was logged of its training), and

    README.md                how it was made and measured, as the hub reads it (`report.card`)
    tokenizer_config.json    with `model_max_length`: the positions that the model has, for what
                             cuts texts to fit
    generation_config.json   with `max_length`, the same (runs of older versions leave it out)
    manifest.json            the SHA-256 and size of every file

Nothing here is executable: JSON, Markdown and safetensors, no pickle.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from babyllama_ds import files
from babyllama_ds.errors import RunError
from babyllama_ds.export.finished import FinishedRun, check_outside
from babyllama_ds.report.card import render_milestone_card, render_model_card
from babyllama_ds.rundir import METRICS_NAME

SAFE_SUFFIXES = (".json", ".safetensors", ".md")
"""What a model directory is made of. Anything else is not given away."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the run does not know of a model that is given away."""

    license_id: str | None = None
    """The hub's name of a license; none: none is claimed."""
    language: str | None = None
    """The text's language as the hub's code (`en`); none: only a text written here has one."""
    place: str = "."
    """Where the card's code loads the model from."""
    float32: bool = False
    """Whether its weights are cast to fp32: the same values in more bytes, for programs that
    compute in the type that they find."""


def export_model_dir(run: FinishedRun, model: str, target: Path, facts: CardFacts) -> None:
    """Write `model` (`student`, `control`, `teachers/NAME`) to `target`, whole or not at all.

    Raises:
        RunError: there is no such model, it is damaged, `target` exists or lies inside the run, or
            the disk refuses.
    """
    check_outside(run.path, target)
    source = run.model_dir(model)
    card = render_model_card(
        run.report,
        model.removeprefix("teachers/"),
        license_id=facts.license_id,
        language=facts.language,
        place=facts.place,
        float32=facts.float32,
    )
    _export(source, target, card, model, float32=facts.float32)


def export_milestone_dir(
    run: FinishedRun, model: str, source: Path, target: Path, facts: CardFacts
) -> None:
    """Write what was kept of `model` on its way, in `source`, to `target`, as the finished one.

    Raises:
        RunError: it is damaged, `target` exists, or the disk refuses.
    """
    card = render_milestone_card(
        run.report,
        model,
        files.read_json(source / "training.json"),
        license_id=facts.license_id,
        language=facts.language,
        place=facts.place,
    )
    _export(source, target, card, model, float32=facts.float32)


def _export(source: Path, target: Path, card: str, model: str, *, float32: bool) -> None:
    manifest = files.verify_manifest(source)
    names = manifest.files.keys() - {METRICS_NAME}
    check_names(source, names)
    with files.appearing(target) as directory:
        directory.mkdir(parents=True)
        for name in names:
            shutil.copyfile(source / name, directory / name)
        _set_lengths(directory)
        if float32:
            _cast_to_float32(directory)
        files.write_atomic(directory / "README.md", card)
        files.write_manifest(directory, fingerprint=manifest.fingerprint, model=model)
        if float32:
            _check_values(source, directory)
        else:
            _check_weights(source, manifest, directory)


def check_names(directory: Path, names: Iterable[str]) -> None:
    """Every file of these names may be given away.

    Raises:
        RunError: a file in a folder of its own, or of a kind that is not in `SAFE_SUFFIXES`.
    """
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.name != name or path.suffix not in SAFE_SUFFIXES:
            raise RunError.of(
                directory / name,
                got="a file that no model directory of ours has",
                expected=f"names that end in {', '.join(SAFE_SUFFIXES)}",
                hint="only what the run wrote is given away: make the model anew",
            )


def _set_lengths(directory: Path) -> None:
    """How long texts may be, where it is not said yet."""
    config = files.read_json(directory / "config.json")
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions is None:
        return
    generation = _read(directory / "generation_config.json")
    if generation.get("max_length") is None:
        generation |= {"max_length": positions}
        files.write_json(directory / "generation_config.json", generation)
    tokenizer = _read(directory / "tokenizer_config.json")
    # What has no limit has one of thirty digits in transformers.
    if (tokenizer.get("model_max_length") or positions + 1) > positions:
        tokenizer |= {"model_max_length": positions}
        files.write_json(directory / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    return dict(files.read_json(path)) if path.exists() else {}


def _check_weights(source: Path, manifest: files.Manifest, copy: Path) -> None:
    """The copy has the weights that were proved whole."""
    copied = files.read_manifest(copy)
    assert copied is not None, "just written"
    for name, facts in manifest.files.items():
        if name.endswith(".safetensors") and copied.files[name] != facts:
            raise RunError.of(
                source / name,
                got=f"SHA-256 {copied.files[name].sha256} in the copy",
                expected=facts.sha256,
                hint="was the run changed meanwhile? Otherwise the disk is not to be trusted",
            )


def _cast_to_float32(directory: Path) -> None:
    total_bytes = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata()
            weights = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
        permissions = path.stat().st_mode
        save_file(weights, path, metadata=metadata)
        path.chmod(permissions)  # safetensors writes for its owner alone
        total_bytes += sum(weight.nbytes for weight in weights.values())
    index_path = directory / "model.safetensors.index.json"
    if index_path.exists():  # of a large model, whose weights are in several files
        index = files.read_json(index_path)
        index["metadata"] = index.get("metadata", {}) | {"total_size": total_bytes}
        files.write_json(index_path, index)
    config = files.read_json(directory / "config.json")
    files.write_json(directory / "config.json", config | {"dtype": "float32"})


def _check_values(source: Path, copy: Path) -> None:
    """The copy has the values of the weights that were proved whole, in fp32."""
    for path in source.glob("*.safetensors"):
        with (
            safe_open(path, framework="pt") as ours,
            safe_open(copy / path.name, framework="pt") as theirs,
        ):
            for name in ours.keys():  # noqa: SIM118
                if not torch.equal(theirs.get_tensor(name), ours.get_tensor(name).float()):
                    raise RunError.of(
                        path,
                        got=f"other values of {name} in the copy",
                        expected="the same, in fp32",
                        hint="was the run changed meanwhile? Otherwise the disk is not to be "
                        "trusted",
                    )
