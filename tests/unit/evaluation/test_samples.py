"""Texts of a model in memory: the same again, and no trace in what comes after."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.evaluation import samples
from babyllama_ds.evaluation.evaluate import DevWindows, evaluate_model
from babyllama_ds.evaluation.generate import continued
from babyllama_ds.evaluation.samples import PROMPT_TOKENS, _spread, write_samples
from babyllama_ds.spec.corpus import TrainedTokenizer

VOCAB, LENGTH = 280, 30


def lines() -> Iterator[str]:
    words = ("the", "little", "dog", "sees", "a", "réd", "ball", "and", "runs", "to", "it", "日本")
    return (" ".join(words[(3 * i + j * j) % len(words)] for j in range(8)) for i in range(200))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TrainedTokenizer(kind="bpe", vocab_size=VOCAB), lines(), directory)
    return load_tokenizer(str(directory))


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> np.ndarray:
    ids = tokenizer(" ".join(lines()), add_special_tokens=False).input_ids
    return np.array(ids[: len(ids) // LENGTH * LENGTH], dtype=np.uint16).reshape(-1, LENGTH)


@pytest.fixture
def write(
    tokenizer: Any, windows: np.ndarray, tiny_model: Callable[..., Any]
) -> Callable[..., list[dict[str, str]]]:
    def make(number: int = 3, *, kind: str = "llama", model: Any = None) -> list[dict[str, str]]:
        return write_samples(
            model or tiny_model(kind, vocab_size=VOCAB, eos_token_id=2),
            tokenizer,
            lambda ids: windows[list(ids)],
            len(windows),
            number=number,
            device="cpu",
        )

    return make


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_weights_write_the_same(kind: str, write: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    first = write(kind=kind)
    torch.manual_seed(2)
    assert write(kind=kind) == first
    assert len({sample["text"] for sample in first}) == 3
    assert all(sample["text"] for sample in first)


def test_they_begin_as_the_development_text_does(
    write: Callable[..., Any], windows: np.ndarray, tokenizer: Any
) -> None:
    chosen = [k * len(windows) // 3 for k in range(3)]
    for k, sample in zip(chosen, write(), strict=True):
        beginning = tokenizer.decode(windows[k][:PROMPT_TOKENS].tolist())
        assert beginning.startswith(sample["prompt"])
        # Only a character that the last token begins may be missing.
        assert beginning.removeprefix(sample["prompt"]) in ("", "\ufffd")


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def test_no_random_number_is_moved_and_the_model_stays_in_its_mode(
    write: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("gpt2", vocab_size=VOCAB, eos_token_id=2, resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = states()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = write(model=model)
    assert states() == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert first == write(model=model.eval())  # without dropout


def test_short_windows_and_few_positions(
    tokenizer: Any,
    tiny_model: Callable[..., Any],
    windows: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = []

    def watched(model: Any, ids_1S: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        ids_BS = continued(model, ids_1S, *rest, **more)
        lengths.append((ids_1S.shape[1], ids_BS.shape[1]))
        return ids_BS

    monkeypatch.setattr(samples, "continued", watched)
    model = tiny_model("llama", vocab_size=VOCAB, max_position_embeddings=8)
    written = write_samples(
        model, tokenizer, lambda ids: windows[list(ids), :6], 2, number=9, device="cpu"
    )
    assert len(written) == 2
    assert lengths == [(3, 8)] * 2


@pytest.mark.parametrize(
    ("number", "num_windows", "expected"),
    [(1, 9, [0]), (3, 9, [0, 3, 6]), (4, 10, [0, 2, 5, 7]), (5, 2, [0, 1])],
)
def test_windows_are_spread(number: int, num_windows: int, expected: list[int]) -> None:
    assert _spread(number, num_windows) == expected


def test_an_evaluation_holds_them_only_when_asked(
    tokenizer: Any, windows: np.ndarray, tiny_model: Callable[..., Any]
) -> None:
    dev = DevWindows(windows_of=lambda ids: windows[list(ids)], num_windows=6, batch_windows=3)

    def evaluate(samples: int) -> dict[str, Any]:
        return evaluate_model(
            tiny_model("llama", vocab_size=VOCAB, eos_token_id=2),
            tokenizer,
            name="student",
            dev=dev,
            benchmarks={},
            leading_space=True,
            batch_tokens=100,
            device="cpu",
            samples=samples,
        )

    plain, asked = evaluate(0), evaluate(2)
    assert "samples" not in plain
    assert len(asked.pop("samples")) == 2
    assert asked == plain
