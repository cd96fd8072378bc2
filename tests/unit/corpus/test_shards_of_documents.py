"""Shards that keep documents: each is encoded by itself, and found again where it starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from babyllama_ds.corpus import blocks as cutting
from babyllama_ds.corpus import writing as module
from babyllama_ds.corpus.documents import DocumentTokens
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.corpus.writing import write_shards
from babyllama_ds.errors import DataError, Stopped
from babyllama_ds.spec.corpus import TrainedTokenizer

DOCUMENTS = [
    [f"{who} said: 'the {thing} {verb}!'\n", f"And so\tit {verb}.\n", "\n"][: 2 + len(thing) % 2]
    for who in ("A fox", "Her aunt", "Nobody's cat")
    for thing in ("kettle", "ladder", "moon", "bucket")
    for verb in ("sang", "fell over", "isn't here", "'s red")
]
BOTH = DocumentTokens(begin=1, end=2)
TOKENS = [DocumentTokens(), DocumentTokens(begin=1), DocumentTokens(end=2), BOTH]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = (line for document in DOCUMENTS for line in document)
    train_tokenizer(TrainedTokenizer(kind="bpe", vocab_size=320), lines, folder)
    return load_tokenizer(str(folder))


def marked(documents: list[list[str]]) -> Iterator[str]:
    for document in documents:
        yield from document
        yield ""


def alone(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a document, encoded in one call."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def expected(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], tokens: DocumentTokens
) -> tuple[list[int], list[int]]:
    """The stream, and where its documents start."""
    stream: list[int] = []
    starts = []
    for text in texts:
        ids = alone(tokenizer, text)
        if ids:
            starts.append(len(stream))
            begin = [] if tokens.begin is None else [tokens.begin]
            stream += [*begin, *ids, *([] if tokens.end is None else [tokens.end])]
    return stream, starts


def found(directory: Path, split: str = "train") -> tuple[list[int], list[int]]:
    shards = TokenShards.open(directory)
    size = shards.num_tokens(split)
    stream = shards.read(split, 0, size).tolist()
    documents = shards.documents(split)
    assert documents is not None
    if not size:
        return stream, []
    begins = documents.begins(np.arange(size), 2)  # the second of each two
    starts = (np.flatnonzero(begins[:-1, 1]) + 1).tolist() if size > 1 else []
    first = [0] if documents.num_documents > len(starts) else []
    assert len(first + starts) == documents.num_documents
    return stream, first + starts


# Like special tokens, whitespace at the ends, characters that NFKC composes, nothing.
TRAPS = st.sampled_from(["<s> the moon </s>\n", "</s>", "  \n", "a\u0301\n", "½ ﬁ", " x", "水\n"])
WORDS = st.sampled_from(["the kettle sang.\n", "Her aunt\tisn't here!\n", "ladder ", "'s red"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    files=st.lists(
        st.lists(st.lists(TRAPS | WORDS | st.text(min_size=1, max_size=9), min_size=1, max_size=9)),
        max_size=3,
    ),
    block_chars=st.integers(1, 60),
    tokens=st.sampled_from(TOKENS),
)
def test_each_document_is_encoded_by_itself(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[list[list[str]]],
    block_chars: int,
    tokens: DocumentTokens,
) -> None:
    """However long, in whatever blocks and shards; special tokens at the ends alone."""
    for name, value in (("BLOCK_CHARS", block_chars), ("BATCH_BLOCKS", 2), ("SHARD_BLOCKS", 3)):
        monkeypatch.setattr(cutting if name == "BLOCK_CHARS" else module, name, value)
    texts = [("any", marked(documents)) for documents in files]
    write_shards(tmp_path, {"train": texts, "dev": []}, tokenizer, documents=tokens)
    of_documents = ["".join(document) for documents in files for document in documents]
    assert found(tmp_path) == expected(tokenizer, of_documents, tokens)
    assert found(tmp_path, "dev") == ([], [])


def test_long_documents_are_really_cut_and_short_ones_joined(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would show little."""
    monkeypatch.setattr(cutting, "BLOCK_CHARS", 60)
    encoder = cutting.Encoder(tokenizer, BOTH)
    long = [line for document in DOCUMENTS[:20] for line in document]
    lines = marked([["a\n"], ["b\n"], long, ["c\n"]])
    blocks = list(cutting.blocks_of_documents("any", lines, encoder))
    assert [piece.text for piece in blocks[0].pieces[:2]] == ["a\n", "b\n"]
    assert sum(piece.begins for block in blocks for piece in block.pieces) == 4
    assert sum(piece.ends for block in blocks for piece in block.pieces) == 4
    assert len(blocks) > 3
    assert "".join(block.text for block in blocks) == "a\nb\n" + "".join(long) + "c\n"


def test_a_file_ends_its_last_document(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With a mark or without, so that a file without any is one document."""
    texts = [("a", iter(["one\n", "", "two\n"])), ("b", iter(["three\n", "four\n"]))]
    write_shards(tmp_path, {"train": texts}, tokenizer, documents=BOTH)
    assert found(tmp_path) == expected(tokenizer, ["one\n", "two\n", "three\nfour\n"], BOTH)


def test_where_boundaries_are_dropped_marks_leave_no_trace(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte by byte, as if there had been none: what is there from before still stands."""
    for name, value in (("BLOCK_CHARS", 60), ("BATCH_BLOCKS", 2), ("SHARD_BLOCKS", 3)):
        monkeypatch.setattr(cutting if name == "BLOCK_CHARS" else module, name, value)
    plain = [line for document in DOCUMENTS for line in document]
    write_shards(tmp_path / "plain", {"train": [("a", iter(plain))]}, tokenizer)
    write_shards(tmp_path / "marked", {"train": [("a", marked(DOCUMENTS))]}, tokenizer)
    assert content(tmp_path / "plain") == content(tmp_path / "marked")
    assert not any("starts" in name for name in content(tmp_path / "plain"))
    assert not any(b"documents" in data for data in content(tmp_path / "plain").values())
    assert TokenShards.open(tmp_path / "plain").documents("train") is None


def test_counts_are_of_the_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = {"train": [("a", marked(DOCUMENTS)), ("b", marked(DOCUMENTS[:3]))]}
    write_shards(tmp_path, texts, tokenizer, documents=BOTH)
    shards = TokenShards.open(tmp_path)
    text = "".join(line for document in [*DOCUMENTS, *DOCUMENTS[:3]] for line in document)
    assert shards.num_bytes("train") == len(text.encode())
    assert shards.num_words("train") == len(text.split())
    first, second = shards.domains("train")
    assert (first.domain, second.domain, first.start) == ("a", "b", 0)
    of_first, _ = expected(tokenizer, ["".join(document) for document in DOCUMENTS], BOTH)
    assert (first.stop, second.start) == (len(of_first), len(of_first))
    assert second.stop == shards.num_tokens("train")


# -- resuming and damage ---------------------------------------------------------------------------


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts_of() -> dict[str, Any]:
    return {"train": [("a", marked(DOCUMENTS)), ("b", marked(DOCUMENTS[:9]))], "dev": []}


@pytest.fixture
def write(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Small shards, in two batches of blocks each."""
    for name, value in (("BLOCK_CHARS", 90), ("BATCH_BLOCKS", 2), ("SHARD_BLOCKS", 3)):
        monkeypatch.setattr(cutting if name == "BLOCK_CHARS" else module, name, value)

    def write(directory: Path, tokens: DocumentTokens | None = BOTH, **options: Any) -> None:
        write_shards(directory, texts_of(), tokenizer, documents=tokens, **options)

    return write


@pytest.mark.parametrize("stop_at", [1, 2, 5, 8])
def test_what_was_done_is_kept_and_the_result_is_the_same(
    write: Callable[..., None], tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "undisturbed")
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stopped("SIGTERM")

    place = tmp_path / "begun"
    with pytest.raises(Stopped):
        write(place, check=check)
    finished = len(list(place.glob("*.json")))
    assert finished == (stop_at - 1) // 2
    encoded = []
    encode_batch = cutting.Encoder._encode_batch

    def counting(encoder: Any, batch: Any) -> Any:
        encoded.append(batch.shard)
        return encode_batch(encoder, batch)

    monkeypatch.setattr(cutting.Encoder, "_encode_batch", counting)
    write(place)
    assert content(place) == content(tmp_path / "undisturbed")
    assert min(encoded) == finished


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_starts_are_named_and_made_anew(
    write: Callable[..., None], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    before = content(tmp_path)
    path = tmp_path / "train-00001.starts"
    if damage == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-4] if damage == "cut" else data[:-1] + b"\1")
    if damage != "changed":
        with pytest.raises(DataError, match=r"train-00001\.starts"):
            TokenShards.open(tmp_path)
    write(tmp_path)
    assert content(tmp_path) == before
    assert re.search(r"train-00001\.bin is damaged", caplog.text)


@pytest.mark.parametrize("other", [None, DocumentTokens(), DocumentTokens(end=2)])
def test_shards_of_other_boundaries_or_tokens_are_not_kept(
    write: Callable[..., None], tmp_path: Path, other: DocumentTokens | None
) -> None:
    write(tmp_path / "other", other)
    write(tmp_path / "ours")
    write(tmp_path / "other")
    assert content(tmp_path / "other") == content(tmp_path / "ours")


def test_the_index_says_how_many_documents_each_shard_has(
    write: Callable[..., None], tmp_path: Path
) -> None:
    write(tmp_path)
    facts = json.loads((tmp_path / "shards.json").read_text())["splits"]["train"]
    assert len(facts["documents"]) == len(facts["files"]) > 5
    assert sum(facts["documents"]) == len(DOCUMENTS) + 9
    for file, number in zip(facts["files"], facts["documents"], strict=True):
        path = (tmp_path / file["name"]).with_suffix(".starts")
        assert path.stat().st_size == 4 * number
    facts["documents"].pop()
    index = json.loads((tmp_path / "shards.json").read_text())
    index["splits"]["train"]["documents"] = facts["documents"]
    (tmp_path / "shards.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="JSON of another shape"):
        TokenShards.open(tmp_path)
