"""Tokenizers of models that others trained: read as their file says, and compared with the job's.

The reference is the file itself, read by the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from babyllama_ds.corpus.prepare import _check_without_gaps
from babyllama_ds.corpus.tokenizer import (
    compare_splits,
    differing_ids,
    load_tokenizer,
    token_bytes,
)
from babyllama_ds.errors import DataError

LETTERS = "abcdehiknorstu,.'0123456789é\n"
MERGES = [("t", "h"), ("h", "e"), ("th", "e"), ("a", "n"), ("an", "d"), ("i", "n"), ("1", "2")]
TEXT = "  The <s> otter's and the\n\nheron 123 in\tÉté, don't </s><pad> 12the"


def byte_level(merges: list[tuple[str, str]] = MERGES, *, splits: Any = None) -> Tokenizer:
    """Byte-level BPE, with numbers split in a way of its own and a leading space."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["".join(pair) for pair in MERGES]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = splits or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """BPE on characters with `▁` for spaces and bytes for what is unknown, as LLaMA 2 has it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    tokens += ["".join(pair) for pair in MERGES]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    # Not LLaMA's: lower case, and no space before a text.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁the", -2.0), ("an", -3.0)]
    pieces += [(letter, -6.0) for letter in ("▁", *LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "sentence piece": sentence_piece,
    "unigram": unigram,
}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox", "opt", "bloom", "t5"]


def save(tokenizer: Tokenizer, directory: Path, *, family: str = "", named: str = "") -> Path:
    """A directory as its owner has it: a model's config.json, and a class by name."""
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if family:
        (directory / "config.json").write_text(json.dumps({"model_type": family}))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    if named:
        settings["tokenizer_class"] = named
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("named", ["", "PreTrainedTokenizerFast", "family's"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_read_as_it_is(kind: str, family: str, named: str, tmp_path: Path) -> None:
    own = {"llama": "Llama", "gpt2": "GPT2", "opt": "GPT2", "gpt_neox": "GPTNeoX", "t5": "T5"}
    if named == "family's":
        named = f"{own.get(family, family.capitalize())}Tokenizer"
    tokenizer = KINDS[kind]()
    loaded = load_tokenizer(str(save(tokenizer, tmp_path, family=family, named=named)))
    for text in (TEXT, "the", " and", ""):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert loaded(text, add_special_tokens=False)["input_ids"] == expected
        assert loaded.backend_tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
    ids = tokenizer.encode(TEXT).ids
    assert loaded.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_truncation_in_the_file_hides_no_difference(tmp_path: Path) -> None:
    one, other = byte_level(), byte_level(MERGES[1:])
    for tokenizer in (one, other):
        tokenizer.enable_truncation(2)
    ours = load_tokenizer(str(save(one, tmp_path / "one")))
    theirs = load_tokenizer(str(save(other, tmp_path / "other")))
    stream = byte_level().encode("an the\n", add_special_tokens=False).ids
    assert compare_splits(ours, theirs, stream).otherwise > 0


def test_signs_beyond_the_byte_alphabet_stand_for_themselves(tmp_path: Path) -> None:
    tokenizer = byte_level()
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    whole = {**vocab, "<｜end▁of▁text｜>": len(vocab)}
    odd = Tokenizer(models.BPE(vocab=whole, merges=MERGES))
    odd.decoder = decoders.ByteLevel()
    assert token_bytes(load_tokenizer(str(save(odd, tmp_path))))[-1] == "<｜end▁of▁text｜>".encode()


# -- the same vocabulary? --------------------------------------------------------------------------


def loaded(tokenizer: Tokenizer, directory: Path) -> Any:
    return load_tokenizer(str(save(tokenizer, directory)))


def rewritten(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    parts = json.loads(tokenizer.to_str())
    change(parts)
    return Tokenizer.from_str(json.dumps(parts))


def test_special_tokens_that_trade_places_or_names_differ(tmp_path: Path) -> None:
    def trade(parts: dict[str, Any]) -> None:
        vocab, added = parts["model"]["vocab"], parts["added_tokens"]
        vocab["<s>"], vocab["</s>"] = 2, 1
        added[1]["content"], added[2]["content"] = "</s>", "<s>"
        parts["post_processor"] = None

    def rename(parts: dict[str, Any]) -> None:
        vocab = parts["model"]["vocab"]
        vocab["<bos>"] = vocab.pop("<s>")
        parts["added_tokens"][1]["content"] = "<bos>"
        parts["post_processor"] = None

    ours = loaded(byte_level(), tmp_path / "ours")
    traded = loaded(rewritten(byte_level(), trade), tmp_path / "traded")
    assert differing_ids(ours, traded) == {
        1: ("special <s>", "special </s>"),
        2: ("special </s>", "special <s>"),
    }
    save(rewritten(byte_level(), rename), tmp_path / "renamed")
    (tmp_path / "renamed" / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    renamed = load_tokenizer(str(tmp_path / "renamed"))
    assert differing_ids(ours, renamed) == {1: ("special <s>", "special <bos>")}


def test_a_space_is_a_space_however_it_is_written(tmp_path: Path) -> None:
    """`Ġthe` of a byte-level vocabulary and `▁the` of another mean the same bytes."""
    byte = Tokenizer(models.BPE(vocab={"Ġ": 0, "t": 1, "Ġt": 2}, merges=[("Ġ", "t")]))
    byte.decoder = decoders.ByteLevel()
    piece = Tokenizer(models.BPE(vocab={"▁": 0, "t": 1, "▁t": 2}, merges=[("▁", "t")]))
    piece.decoder = decoders.Metaspace()
    for name, tokenizer in (("byte", byte), ("piece", piece)):
        tokenizer.save(str(tmp_path / f"{name}.json"))
    one, other = (load_tokenizer(str(tmp_path / f"{name}.json")) for name in ("byte", "piece"))
    assert differing_ids(one, other) == {}
    bytes_of = loaded(byte_level(), tmp_path / "a")
    pieces_of = loaded(sentence_piece(), tmp_path / "b")
    assert len(differing_ids(bytes_of, pieces_of)) > 200  # but whole vocabularies seldom do


def test_a_token_more_beyond_the_others(tmp_path: Path) -> None:
    longer = byte_level()
    longer.add_tokens([AddedToken(" extra", normalized=False)])
    ours, theirs = loaded(byte_level(), tmp_path / "a"), loaded(longer, tmp_path / "b")
    assert list(differing_ids(ours, theirs).values()) == [("no token", "b' extra'")]


def test_ids_without_a_token_are_refused(tmp_path: Path) -> None:
    def leave_a_gap(parts: dict[str, Any]) -> None:
        parts["model"]["vocab"]["12"] += 5

    whole, gap = byte_level(), rewritten(byte_level(), leave_a_gap)
    _check_without_gaps(loaded(whole, tmp_path / "whole"), "whole")
    with pytest.raises(DataError) as caught:
        _check_without_gaps(loaded(gap, tmp_path / "gap"), "gap")
    size = whole.get_vocab_size()
    assert f"gap: ids up to {size + 4}, of {size} tokens" in str(caught.value)


# -- the same splits? ------------------------------------------------------------------------------


def stream(text: str) -> list[int]:
    ids: list[int] = byte_level().encode(text, add_special_tokens=False).ids
    return ids


def test_the_same_tokenizer_splits_alike(tmp_path: Path) -> None:
    for name, make in KINDS.items():
        ours = loaded(make(), tmp_path / name)
        theirs = loaded(make(), tmp_path / f"{name} again")
        ids = make().encode("the otter\nand in 12\n", add_special_tokens=False).ids
        found = compare_splits(ours, theirs, ids)
        assert (found.otherwise, found.example) == (0, "")
        assert found.tokens > 4


def test_other_merges_of_the_same_vocabulary_by_hand(tmp_path: Path) -> None:
    """`the` is a token of both, but without its last merge the other has `th` and `e`."""
    other = byte_level([pair for pair in MERGES if pair not in (("th", "e"), ("h", "e"))])
    ours, theirs = loaded(byte_level(), tmp_path / "a"), loaded(other, tmp_path / "b")
    assert differing_ids(ours, theirs) == {}
    found = compare_splits(ours, theirs, stream(" an the\n in\n the, the"))
    # Ġ an Ġ the Ċ | Ġ in Ċ; what no line ends is left out.
    assert found.tokens == 8
    assert found.otherwise == 1
    assert found.example == r"b'the' b'\n', not b'th' b'e' b'\n'"


def test_other_splitting_before_the_merges(tmp_path: Path) -> None:
    """Numbers are cut at every digit."""
    splits = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel()]
    )
    ours = loaded(byte_level(), tmp_path / "a")
    theirs = loaded(byte_level(splits=splits), tmp_path / "b")
    found = compare_splits(ours, theirs, stream(" in 12\n"))
    assert found.otherwise == 1
    assert found.example.startswith("b'12'")


def test_text_without_an_end_of_line_is_compared_as_one(tmp_path: Path) -> None:
    other = byte_level(MERGES[1:])
    ours, theirs = loaded(byte_level(), tmp_path / "a"), loaded(other, tmp_path / "b")
    assert compare_splits(ours, theirs, stream(" the")).otherwise == 1
