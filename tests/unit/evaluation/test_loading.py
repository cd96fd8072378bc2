"""What a user calls a model: found, or refused for a reason that can be mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertLMHeadModel

from babyllama_ds.errors import ModelError
from babyllama_ds.evaluation.loading import (
    check_model_directory,
    load_causal_lm,
    model_directory,
)

CPU = torch.device("cpu")


def test_a_run_stands_for_its_student_and_any_other_path_for_itself(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    assert model_directory(str(tmp_path / "run")) == str(tmp_path / "run")
    (student / "config.json").write_text("{}")
    assert model_directory(str(tmp_path / "run")) == str(student)
    assert model_directory(str(student)) == str(student)
    assert model_directory("someone/model") == "someone/model"


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    def refused(path: Path | str) -> str:
        with pytest.raises(ModelError) as caught:
            check_model_directory(str(path))
        (problem,) = caught.value.problems
        assert problem.where == "MODEL"
        return problem.got

    assert refused(tmp_path / "no") == f"{tmp_path}/no: no such directory"
    assert refused("a/b/c") == "a/b/c: no such directory"
    assert refused(tmp_path).endswith("a directory without config.json")
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path / "config.json").endswith("config.json: a file")
    assert refused(tmp_path).endswith(": no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    assert refused(tmp_path).endswith(": pickled weights only (pytorch_model.bin)")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert refused(tmp_path).startswith(f"{tmp_path}/model.safetensors: ")
    save_file({}, tmp_path / "model.safetensors")
    check_model_directory(str(tmp_path))  # what is in it, loading will see
    check_model_directory("someone/model")  # a hub id: the hub knows


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_dtype_is_that_of_the_file(
    kind: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model(kind).bfloat16().save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    """It would be asked for a token that it has been shown."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, **sizes)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertLMHeadModel, whose predictions change with later"):
        load_causal_lm(str(tmp_path), device=CPU)
