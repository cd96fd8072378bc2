"""Pieces of windows by hand, and which models keep documents apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
)

from babyllama_ds.errors import ModelError
from babyllama_ds.models.documents import (
    Pieces,
    check_documents,
    model_inputs,
    sequences_of,
    takes_lengths,
)
from babyllama_ds.models.parts import split_causal_lm


def begins(*rows: str) -> np.ndarray:
    """`|..|.`: a piece of three and one of two."""
    return np.array([[sign == "|" for sign in row] for row in rows])


def test_pieces_by_hand() -> None:
    pieces = Pieces.of(begins("|..|.", "|....", "|||.|"))
    assert pieces.positions_BS.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 1, 0]]
    assert pieces.bounds_P1.tolist() == [0, 3, 5, 10, 11, 12, 14, 15]
    assert (pieces.positions_BS.dtype, pieces.bounds_P1.dtype) == (torch.int32, torch.int32)
    assert pieces.longest == 5
    none, cut = False, True
    assert pieces.cuts_BT.tolist() == [
        [none, none, cut, none],
        [none, none, none, none],
        [cut, cut, none, cut],
    ]


def test_sequences_are_known_without_a_look() -> None:
    positions_BS = Pieces.of(begins("|..|.", "|....", "|||.|")).positions_BS
    found = sequences_of(positions_BS)
    assert found is not None
    assert found.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [1, 2, 3, 3, 4]]
    assert sequences_of(positions_BS.long()) is None  # as transformers counts by itself


def test_they_are_sent_where_they_are_told() -> None:
    sent = []

    def send(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return tensor + 1

    pieces = Pieces.of(begins("|."), send)
    assert pieces.positions_BS.tolist() == [[1, 2]]
    assert len(sent) == 2


def test_a_window_that_begins_with_no_piece_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Pieces.of(begins(".|."))


def test_whole_windows_are_given_as_ever(tiny_model: Callable[..., Any]) -> None:
    ids = torch.arange(6).view(2, 3)
    assert model_inputs(tiny_model("llama"), ids, None).keys() == {"input_ids"}


def test_flash_is_given_one_sequence_of_all_pieces(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    assert not takes_lengths(model)
    model.config._attn_implementation = "flash_attention_3"
    assert takes_lengths(model)
    inputs = model_inputs(model, torch.arange(10).view(2, 5), Pieces.of(begins("|..|.", "|....")))
    assert inputs["input_ids"].tolist() == [list(range(10))]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]
    for side in "qk":
        assert inputs[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5, 10]
        assert inputs[f"max_length_{side}"] == 5


# -- which models ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
APART = {
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=3),  # a window within the documents
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=6, sliding_window=3),
}
CROSSING = {
    "mamba": lambda: MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1, state_size=4),
    "bloom": lambda: BloomConfig(vocab_size=61, hidden_size=24, n_layer=1, n_head=4),
}


def random_model(config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def check(model: nn.Module) -> None:
    check_documents(model, split_causal_lm(model)[0], where="teachers.a.model")


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_this_stack_builds_keeps_them_apart(
    kind: str, kernel: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(kind, attn_implementation=kernel)
    check(model)
    check(model.bfloat16())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", APART)
def test_families_that_do(family: str) -> None:
    check(random_model(APART[family]()))


@pytest.mark.parametrize("family", CROSSING)
def test_families_that_do_not_are_refused(family: str) -> None:
    model = random_model(CROSSING[family]())
    with pytest.raises(ModelError) as caught:
        check(model)
    (problem,) = caught.value.problems
    assert problem.where == "teachers.a.model"
    assert type(model).__name__ in problem.got
    assert "windows.attention=document" in problem.expected
    assert problem.hint == "set windows.attention=window, or use another model"


def test_positions_alone_are_not_enough(tiny_model: Callable[..., Any]) -> None:
    """A model that counts anew and yet attends across the boundary is found out."""
    model = tiny_model("gpt2")

    def only_positions(ids: torch.Tensor, pieces: Pieces | None) -> torch.Tensor:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
        positions = None if pieces is None else pieces.positions_BS
        states: torch.Tensor = model.transformer(
            input_ids=ids, position_ids=positions, attention_mask=mask
        ).last_hidden_state
        return states

    with pytest.raises(ModelError, match="looks across the boundary"):
        check_documents(model, only_positions, where="x")
