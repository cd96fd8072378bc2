"""A tokenizer of any size, without a text to train it on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[[int], PreTrainedTokenizerFast]:
    """Words `w3`, `w4`, …; specials 0 to 2 as in the tokenizers that jobs train."""

    def make(size: int) -> PreTrainedTokenizerFast:
        words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, size))]
        model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )

    return make
