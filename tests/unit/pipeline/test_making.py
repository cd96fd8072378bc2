"""A model is made as the checks before training took it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from babyllama_ds.engine.checkpoint import CheckpointFolder
from babyllama_ds.errors import MachineError
from babyllama_ds.models import attention
from babyllama_ds.pipeline import making
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.making import Maker
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.models import PretrainedModel
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store


def test_a_loaded_teacher_is_taken_with_a_kernel_that_has_no_dropout(
    tmp_path: Path, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's configuration names one, of training: a teacher as it is drops nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "_installed", lambda _: True)
    monkeypatch.setattr(attention, "why_broken", lambda _: None)
    built: list[str] = []

    def build(_spec: Any, _tokenizer: Any, **given: Any) -> nn.Module:
        built.append(given["attention"])
        return nn.Module()

    monkeypatch.setattr(making, "build_model", build)
    tiny_model("gpt2", attn_pdrop=0.1).save_pretrained(tmp_path / "elder")
    spec = PretrainedModel(
        kind="pretrained", path=str(tmp_path / "elder"), attention="flash_attention_3"
    )
    setup = JobSetup(load_job(find_job("nursery")), torch.device("cuda"))
    with pytest.raises(MachineError, match="it has no dropout"):
        setup.attention("teachers/elder", spec, training=True)
    maker = Maker(
        setup,
        RunDirectory(tmp_path),
        cast(Any, None),
        Store(tmp_path / "store"),
        Storages(),
        StopRequest(),
    )
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", fingerprint="f")
    corpus: Any = SimpleNamespace(tokenizer=None)
    maker.make("teachers/elder", spec, None, corpus, checkpoints)
    assert built == ["flash_attention_3"]
