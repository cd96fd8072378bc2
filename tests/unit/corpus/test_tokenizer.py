"""Tokenizers: as published, lossless, loadable elsewhere, comparable."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from babyllama_ds.corpus.tokenizer import (
    differing_ids,
    ids_of_tokens,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_hash,
    vocabulary_size,
)
from babyllama_ds.errors import DataError, HubError, JobError, Stopped
from babyllama_ds.spec.corpus import TrainedTokenizer

LINES = [
    f"The {size} {animal} {verb} by the {place}, and we don't know why.\n"
    for size in ("small", "large", "old")
    for animal in ("otter", "heron", "beetle", "mole")
    for verb in ("sleeps", "waits", "is singing")
    for place in ("river", "garden wall", "lantern")
]
SIZE = 335


def spec(vocab_size: int = SIZE, min_frequency: int = 2) -> TrainedTokenizer:
    return TrainedTokenizer(kind="bpe", vocab_size=vocab_size, min_frequency=min_frequency)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("made") / "tokenizer"
    train_tokenizer(spec(), iter(LINES), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(directory))


def ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` taken as text, whatever it looks like."""
    found: list[int] = tokenizer(text, split_special_tokens=True)["input_ids"]
    return found


def with_vocabulary(vocab: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


# -- trained -------------------------------------------------------------------------------------


def test_it_is_the_published_tokenizer(directory: Path) -> None:
    parts = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert parts["model"]["type"] == "BPE"
    assert parts["normalizer"] == {"type": "NFKC"}
    assert parts["pre_tokenizer"]["type"] == "ByteLevel"
    assert parts["pre_tokenizer"]["add_prefix_space"] is True
    assert parts["decoder"]["type"] == "ByteLevel"
    assert parts["post_processor"]["type"] == "ByteLevel"
    assert parts["post_processor"]["trim_offsets"] is True
    special = [(token["id"], token["content"]) for token in parts["added_tokens"]]
    assert special == [(0, "<pad>"), (1, "<s>"), (2, "</s>")]


def test_every_id_lies_inside_the_embedding(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == vocabulary_size(tokenizer) == SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE))
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert named == (0, 1, 2)
    assert tokenizer.unk_token is None
    assert "<|endoftext|>" not in tokenizer.get_vocab()


def test_running_text_begins_with_a_space_and_nothing_is_added(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.tokenize("The otter") == ["ĠThe", "Ġotter"]
    assert tokenizer("The otter")["input_ids"] == tokenizer(" The otter")["input_ids"]
    assert not set(tokenizer("The otter")["input_ids"]) & {0, 1, 2}


def test_the_same_text_gives_the_same_files(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(spec(), iter(LINES), tmp_path)
    for path in directory.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_merges_need_their_frequency(tmp_path: Path) -> None:
    # " ab" three times, " cd" once: with min frequency 2 only Ġ+a and Ġa+b can be merged.
    with pytest.raises(DataError) as caught:
        train_tokenizer(spec(300), iter(["ab ab ab cd"]), tmp_path / "none")
    (problem,) = caught.value.problems
    assert problem.where == "tokenizer.vocab_size"
    assert problem.got == "text that supports 261 tokens at min_frequency 2"
    assert problem.expected == "vocab_size (300)"
    assert problem.hint is not None
    assert problem.hint.startswith("set tokenizer.vocab_size to at most 261")
    assert not (tmp_path / "none").exists()

    train_tokenizer(spec(261), iter(["ab ab ab cd"]), tmp_path / "fits")  # as the hint says
    vocabulary = load_tokenizer(str(tmp_path / "fits")).get_vocab()
    assert vocabulary["Ġab"] == 260
    train_tokenizer(spec(263, min_frequency=1), iter(["ab ab ab cd"]), tmp_path / "rare")


def test_check_can_stop_the_training(tmp_path: Path) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again\n"

    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        train_tokenizer(spec(), endless(), tmp_path, check=stop)


# -- what ids stand for --------------------------------------------------------------------------

SPECIAL_LOOKING = st.sampled_from(["<s>", "</s>", "<pad>", "Ġ", "\x00", "\r\n", "½ ´", "👩‍🚀"])
ANY_TEXT = st.lists(st.one_of(st.text(max_size=8), SPECIAL_LOOKING), max_size=6).map("".join)


@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_no_text_is_lost(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    normal = unicodedata.normalize("NFKC", text)
    expected = normal if not normal or normal.startswith(" ") else " " + normal
    found = ids(tokenizer, text)
    meanings = token_bytes(tokenizer)
    assert b"".join(meanings[index] for index in found) == expected.encode()
    assert tokenizer.decode(found) == expected


def test_all_bytes_are_there_and_special_tokens_are_nothing(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    meanings = token_bytes(tokenizer)
    assert len(meanings) == SIZE
    assert meanings[:3] == [b"", b"", b""]
    assert {bytes([value]) for value in range(256)} <= set(meanings)
    assert len(set(meanings[3:])) == SIZE - 3  # no two ids for the same bytes


def test_sentence_piece_vocabularies(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "▁the": 3, "é": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>"])
    backend.add_tokens([AddedToken("▁odd", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    expected = [b"", b"\n", b" ", b" the", "é".encode(), "▁odd".encode()]
    assert token_bytes(tokenizer) == expected


def test_what_only_looks_like_a_byte_is_text(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("<0x0a>", -1.0), ("<0xZZ>", -2.0)]
    Tokenizer(models.Unigram(pieces, unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(load_tokenizer(str(tmp_path)))[1:] == [b"\n", b"<0xZZ>"]


def test_added_tokens_are_written_as_they_are(directory: Path) -> None:
    """Not in the byte alphabet: GPT-NeoX, for one, adds runs of spaces."""
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens(["   ", "Ġé"])
    tokenizer.add_tokens(["<a mark>"], special_tokens=True)
    assert token_bytes(tokenizer)[SIZE:] == [b"   ", "Ġé".encode(), b""]
    assert ids(tokenizer, "otter   heron").count(SIZE) == 1


def test_vocabularies_are_compared_by_meaning(
    tokenizer: PreTrainedTokenizerFast, directory: Path, tmp_path: Path
) -> None:
    again = load_tokenizer(str(directory / "tokenizer.json"))
    assert differing_ids(tokenizer, again) == {}
    assert vocabulary_hash(tokenizer) == vocabulary_hash(again)

    parts = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = parts["model"]["vocab"]
    vocab["Ġotter"], vocab["Ġheron"] = vocab["Ġheron"], vocab["Ġotter"]
    swapped_path = tmp_path / "tokenizer.json"
    swapped_path.write_text(json.dumps(parts), encoding="utf-8")
    swapped = load_tokenizer(str(swapped_path))
    assert differing_ids(tokenizer, swapped) == {
        vocab["Ġheron"]: ("b' otter'", "b' heron'"),
        vocab["Ġotter"]: ("b' heron'", "b' otter'"),
    }
    assert vocabulary_hash(tokenizer) != vocabulary_hash(swapped)

    longer = load_tokenizer(str(directory))
    longer.add_tokens(["otters"])
    assert differing_ids(tokenizer, longer) == {SIZE: ("no token", "b'otters'")}
    assert differing_ids(longer, tokenizer) == {SIZE: ("b'otters'", "no token")}


def test_gaps_and_special_tokens_count_in_a_comparison() -> None:
    plain = with_vocabulary({"a": 0, "b": 1, "c": 3})
    special = with_vocabulary({"a": 0, "b": 1, "c": 3}, bos_token="b")
    other = with_vocabulary({"a": 0, "d": 1, "c": 3}, bos_token="d")
    filled = with_vocabulary({"a": 0, "b": 1, "e": 2, "c": 3})
    assert vocabulary_size(plain) == 4
    assert token_bytes(plain) == [b"a", b"b", b"", b"c"]
    assert differing_ids(plain, special) == {1: ("b'b'", "special b")}
    assert differing_ids(special, other) == {1: ("special b", "special d")}
    assert differing_ids(plain, filled) == {2: ("no text", "b'e'")}
    hashes = {vocabulary_hash(one) for one in (plain, special, other, filled)}
    assert len(hashes) == 4


def test_the_fingerprint_covers_more_than_the_vocabulary(
    tokenizer: PreTrainedTokenizerFast, directory: Path, tmp_path: Path
) -> None:
    assert tokenizer_fingerprint(load_tokenizer(str(directory))) == tokenizer_fingerprint(tokenizer)
    parts = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    parts["normalizer"] = {"type": "NFC"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parts), encoding="utf-8")
    other = load_tokenizer(str(path))
    assert vocabulary_hash(other) == vocabulary_hash(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)

    seen = {tokenizer_fingerprint(tokenizer)}
    for role in ("pad_token", "bos_token", "eos_token"):  # of which the backend knows nothing
        other = load_tokenizer(str(directory))
        setattr(other, role, "a")
        assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        seen.add(tokenizer_fingerprint(other))
    assert len(seen) == 4

    used = load_tokenizer(str(directory))
    used(["The otter", "no"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(used) == tokenizer_fingerprint(tokenizer)


# -- saved and loaded ----------------------------------------------------------------------------

SAMPLE = "The otter's wärm – ½ lantern\n\n  don't\tsink. <s> 水獺 \U0001f9a6"


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_transformers_alone_loads_it_alike(
    directory: Path, tmp_path: Path, model_type: str | None
) -> None:
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    save_tokenizer(load_tokenizer(str(directory)), tmp_path)
    if model_type:  # beside a model, its class must not replace the tokenizer's
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SAMPLE)["input_ids"] == backend.encode(SAMPLE).ids
    assert len(loaded) == SIZE
    assert loaded.backend_tokenizer.pre_tokenizer.add_prefix_space is True
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_the_saved_configuration_suits_transformers_4(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["add_prefix_space"] is True  # else it turns the leading space off
    assert config["clean_up_tokenization_spaces"] is False  # else decoding eats spaces


def test_directory_and_file_load_alike(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = load_tokenizer(str(directory / "tokenizer.json"))
    assert loaded(SAMPLE)["input_ids"] == tokenizer(SAMPLE)["input_ids"]
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<s>", "</s>")


ODD_TEXT = "\uff0c \ufb01 \u2460 e\u0301 \u00e9"


@pytest.mark.parametrize(("form", "kept"), [("nfkc", "NFKC"), ("nfc", "NFC"), ("none", None)])
def test_text_comes_back_in_the_form_that_was_asked_for(
    form: Any, kept: Any, tmp_path: Path
) -> None:
    asked = TrainedTokenizer(kind="bpe", vocab_size=SIZE, normalization=form)
    train_tokenizer(asked, iter([ODD_TEXT, *LINES]), tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    expected = unicodedata.normalize(kept, ODD_TEXT) if kept else ODD_TEXT
    assert loaded.decode(ids(loaded, ODD_TEXT)).strip() == expected


def test_a_file_without_our_special_tokens_gets_none(tmp_path: Path) -> None:
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert vocabulary_size(loaded) == 1
    assert loaded.bos_token is None


@pytest.mark.parametrize("path", ["./no/such", "/no/such/tokenizer.json", "a/b/c"])
def test_a_missing_path_is_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(HubError) as caught:
        load_tokenizer(path)
    assert caught.value.problems[0].got == f"{path}: no such file or directory"


def test_what_may_be_a_hub_id_is_told_to_be_no_directory_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        load_tokenizer("runs/nursery-1", where="MODEL")
    problem = caught.value.problems[0]
    assert problem.got.startswith("runs/nursery-1: no such directory here; as a hub id: ")
    assert "\n" not in problem.got
    assert problem.hint is not None
    assert problem.hint.startswith("is the path right?")


def test_a_directory_without_a_tokenizer_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"tokenizer\.path: got .*: no tokenizer\.json, and nothing"
    ):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model":')
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match=r"tokenizer\.path: got "):
            load_tokenizer(str(path))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_models_directory_without_a_tokenizer(tmp_path: Path, model_type: str) -> None:
    """For a GPT-2 transformers makes up a tokenizer without a token of text."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path), where="teachers.elder.model")
    (problem,) = caught.value.problems
    assert problem.where == "teachers.elder.model"
    assert problem.got.startswith(f"{tmp_path}: no tokenizer")
    assert "tokenizer.save_pretrained(directory)" in str(problem.hint)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_tokenizer_without_a_token(as_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(DataError, match="no tokenizer, or one without a token of text"):
        load_tokenizer(str(path if as_file else tmp_path))


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        models.WordPiece({"a": 0, "##b": 1}, unk_token="[UNK]"),
        models.WordLevel({"a": 0}, unk_token="[UNK]"),
        models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], unk_token="[UNK]"),
        models.Unigram([("a", -1.0)]),
    ],
)
def test_a_tokenizer_that_fails_on_what_it_has_no_token_for(
    model: Any, as_file: bool, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(model).save(str(path))
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(path if as_file else tmp_path), where="here")
    (problem,) = caught.value.problems
    assert problem.where == "here"
    assert "a tokenizer that fails on text that it has no token for (" in problem.got
    assert "model.unk_token" in (problem.hint or "")


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="ByT5Tokenizer, a tokenizer written in Python"):
        load_tokenizer(str(tmp_path))


def test_remote_code_is_not_run(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    save_tokenizer(load_tokenizer(str(directory)), tmp_path)
    config_path = tmp_path / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    config_path.write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    with pytest.raises(DataError, match="trust_remote_code"):
        load_tokenizer(str(tmp_path))
    assert not mark.exists()


# -- tokens by name --------------------------------------------------------------------------------


def test_ids_of_tokens_as_the_vocabulary_writes_them(directory: Path) -> None:
    tokenizer = load_tokenizer(str(directory))
    assert ids_of_tokens(tokenizer, ["</s>", "<s>", "Ġthe"], where="here") == [
        2,
        1,
        tokenizer.get_vocab()["Ġthe"],
    ]
    assert ids_of_tokens(tokenizer, [], where="here") == []


@pytest.mark.parametrize(
    ("token", "hint"),
    [
        ("<S>", "did you mean `<s>`?"),
        (" the", "did you mean `Ġthe`? A space is written Ġ"),
        ("zzzzzzzzzzzz", None),
    ],
)
def test_tokens_that_there_are_not(token: str, hint: str | None, directory: Path) -> None:
    with pytest.raises(JobError) as caught:
        ids_of_tokens(
            load_tokenizer(str(directory)), ["<s>", token, "<pad>"], where="student.training.x"
        )
    (problem,) = caught.value.problems
    assert problem.where == "student.training.x[1]"
    assert problem.got == repr(token)
    assert problem.hint == hint
