"""What a tokenizer keeps of a text, in scripts of all kinds."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from babyllama_ds.corpus.characters import Characters, tell_what_changes
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer, unknown_id
from babyllama_ds.corpus.writing import write_shards
from babyllama_ds.spec.corpus import TrainedTokenizer

GEORGIAN = "მარა ხატავს ლურჯ ნავს.\n"
YORUBA = unicodedata.normalize("NFD", "Olùbẹ̀rẹ̀ fẹ́ràn ọkọ̀ ojú omi.\n")
ARABIC = "تُحبّ الخبّازة «السُّلَّم» الطويل؟\n"
CHINESE = "玛拉画了一条船，然后笑了。\n"
JOINED = "می‌خواهم पण्डित‍जी 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿\n"
"""Zero-width joiners and non-joiners, and tags."""

Told = Callable[[PreTrainedTokenizerFast, str], list[str]]


@pytest.fixture
def told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Told:
    """What is said when a text is written as shards."""

    def tell(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
        characters = Characters()
        lines = text.splitlines(keepends=True)
        texts = {
            "train": characters.counted(iter([("a", iter(lines))])),
            "dev": characters.counted(iter([("a", iter(["", *lines]))])),
        }
        write_shards(tmp_path / "shards", texts, tokenizer)
        caplog.clear()
        with caplog.at_level("WARNING", "babyllama_ds"):
            tell_what_changes(tokenizer, characters, TokenShards.open(tmp_path / "shards"))
        return [record.getMessage() for record in caplog.records]

    return tell


def fast(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def own(tmp_path: Path) -> PreTrainedTokenizerFast:
    """Trained as jobs do it, on other text."""
    spec = TrainedTokenizer(kind="bpe", vocab_size=270)
    train_tokenizer(spec, iter([GEORGIAN, CHINESE] * 20), tmp_path / "own")
    return load_tokenizer(str(tmp_path / "own"))


def byte_level(alphabet: list[str]) -> PreTrainedTokenizerFast:
    """GPT-2's kind, without a normalizer."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, unk_token=alphabet[0])


def word_piece(words: list[str]) -> PreTrainedTokenizerFast:
    """As uncased BERT's."""
    vocab = {word: index for index, word in enumerate(["[UNK]", *words])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return fast(backend, unk_token="[UNK]")


@pytest.mark.parametrize("text", [GEORGIAN, YORUBA, ARABIC, JOINED, "Å Å\t«x»\n"])
def test_our_own_tokenizer_keeps_every_script(
    own: PreTrainedTokenizerFast, text: str, told: Told
) -> None:
    """Also in bytes that it has never seen, and where accents are composed otherwise."""
    ids = own(text, add_special_tokens=False).input_ids
    back = own.decode(ids).removeprefix(" ")
    assert unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)
    assert told(own, text) == []


def test_what_compatibility_forms_change(own: PreTrainedTokenizerFast, told: Told) -> None:
    (said,) = told(own, f"{CHINESE}　ﬁn①\n")
    assert unicodedata.normalize("NFKC", "，ﬁ①\u3000") == ",fi1 "
    # The text is there twice: in training and held out.
    assert said.startswith(
        "tokenizer: it writes otherwise 8 of the text's 38 characters (21 %; 4 different)"
    )
    for change in ("U+3000 as ' '", "'①' as '1'", "'ﬁ' as 'fi'", "'，' as ','"):
        assert change in said


def test_bytes_that_a_vocabulary_lacks(told: Told) -> None:
    """As in the published tokenizer, which had only those that its training text has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert told(byte_level(alphabet), GEORGIAN + CHINESE) == []
    bytes_of_dash = pre_split("x—x")[1]
    for missing in (bytes_of_dash, bytes_of_dash[-1]):  # all three, one
        (said,) = told(byte_level([c for c in alphabet if c not in missing]), "plain — text\n")
        assert said.startswith(
            "tokenizer: it has no token for 2 of the text's 26 characters (7.7 %; 1 different)"
        )
        assert "different): '—'; see docs" in said


def pre_split(text: str) -> list[str]:
    return [part for part, _ in pre_tokenizers.ByteLevel().pre_tokenize_str(text)]


def test_unknown_tokens_accents_and_line_breaks(told: Told) -> None:
    tokenizer = word_piece(["olu", "##bere", "omo", "##o", "r", "##an", "."])
    assert unknown_id(tokenizer) == 0
    assert tokenizer.tokenize("Olùbẹ̀rẹ̀ ran ọmọ wa.") == [
        "olu",
        "##bere",
        "r",
        "##an",
        "omo",
        "[UNK]",
        ".",
    ]
    in_train, in_dev, lost, changed = told(
        tokenizer, unicodedata.normalize("NFD", "Olùbẹ̀rẹ̀") + " ran ọmọ wa.\n"
    )
    assert in_train.startswith("tokenizer: 1 of the 7 tokens of the train text (14 %) are [UNK]")
    assert in_dev.startswith("tokenizer: 1 of the 7 tokens of the dev text (14 %) are [UNK]")
    # The line break, and accents; letters that are in words alone are not lost.
    assert lost.startswith("tokenizer: it has no token for 12 of the text's 50")
    assert "3 different): U+0300, U+0323, U+000A; see" in lost
    assert "6 of the text's 50 characters (12 %; 2 different): 'ọ' as 'o', 'O' as 'o'" in changed


def test_what_gpt2_calls_unknown_is_no_loss(told: Told) -> None:
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = byte_level(alphabet)
    assert tokenizer.unk_token_id == 0
    assert unknown_id(tokenizer) is None
    assert told(tokenizer, "<|endoftext|> as text\n") == []


def test_every_character_is_counted_however_long_its_line() -> None:
    text = "玛拉 👩‍👧\n" * 300_000
    characters = Characters()
    for _, lines in characters.counted(iter([("a", iter([text, "x\n"])), ("b", iter(["", "y"]))])):
        assert "".join(lines)
    assert characters.by_character() == Counter(text + "x\ny")
