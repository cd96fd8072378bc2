"""Trainings of tiny models on random tokens, in a world of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from trainings import Run


@pytest.fixture
def new_run(
    tmp_path: Path,
    alone: torch.device,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., TrainingSpec],
    engine_config: Callable[..., dict[str, Any]],
) -> Callable[..., Run]:
    def make(
        name: str = "run",
        *,
        kind: str = "gpt2",
        precision: str = "bf16",
        distilled: bool = False,
        of_model: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Run:
        training = training_spec(**{"epochs": 2.0, "micro_batch": 2, **changes})
        teachers = [tiny_model("llama", seed=seed) for seed in (5, 6)] if distilled else []
        members = [
            Member(str(k), FrozenModel(teacher, device=alone, dtype=torch.bfloat16), 1.0 + k)
            for k, teacher in enumerate(teachers)
        ]
        return Run(
            directory=tmp_path / name,
            model=lambda: tiny_model(kind, **(of_model or {})),
            training=training,
            config=engine_config(training, precision=precision),
            device=alone,
            distillation=DistillationSpec(alpha=0.5, temperature=2.0) if distilled else None,
            ensemble=Ensemble(members) if distilled else None,
        )

    return make
