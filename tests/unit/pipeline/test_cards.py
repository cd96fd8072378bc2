"""What is known to fail before anything is trained."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from babyllama_ds.corpus.prepare import Corpus
from babyllama_ds.errors import MachineError
from babyllama_ds.pipeline.checks import check_job
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job


def test_a_card_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would emulate it, many times slower."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    setup = JobSetup(load_job(find_job("nursery")), torch.device("cuda", 0))
    corpus = cast(Corpus, cast(Any, None))  # the card is looked at before the text
    with pytest.raises(MachineError, match=r"got bf16, and a card of compute capability 7\.5"):
        check_job(setup, corpus)
