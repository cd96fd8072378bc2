"""What a job's setup says of a model that cannot be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from babyllama_ds.errors import ModelError
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.models import PretrainedModel
from babyllama_ds.spec.shipped import find_job


@pytest.mark.parametrize("stage", ["teachers/elder", "teachers.elder"])
def test_a_stages_model_is_told_by_its_key_in_the_job(stage: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    setup: Any = SimpleNamespace(
        job=load_job(find_job("nursery"), []), device_kind="cpu", precision="fp32"
    )
    model = PretrainedModel(kind="pretrained", path=str(tmp_path))
    with pytest.raises(ModelError) as caught:
        JobSetup.attention(cast(JobSetup, setup), stage, model, training=False)
    assert caught.value.problems[0].where == "teachers.elder.model"
