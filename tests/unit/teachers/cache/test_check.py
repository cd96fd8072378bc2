"""What makes a cache impossible is known before any training."""

from __future__ import annotations

import pytest

from babyllama_ds.errors import JobError, ModelError
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.cache.check import check_head, check_top_k


def test_more_tokens_than_there_are_is_refused() -> None:
    check_top_k(DistillationSpec(cache="topk", cache_top_k=61), 61)
    check_top_k(DistillationSpec(cache="hidden"), 61)
    with pytest.raises(JobError) as caught:
        check_top_k(DistillationSpec(cache="topk"), 61)
    (problem,) = caught.value.problems
    assert problem.where == "distillation.cache_top_k"
    assert problem.got == "64"
    assert problem.expected == "at most the vocabulary's 61 tokens"


def test_a_teacher_that_changes_its_logits_is_refused() -> None:
    check_head("plain", teacher="a")
    with pytest.raises(ModelError) as caught:
        check_head("logits", teacher="a")
    (problem,) = caught.value.problems
    assert problem.where == "teachers/a"
    assert problem.expected == "a plain head, for distillation.cache=hidden"
    assert problem.hint == "set distillation.cache=topk or none"
