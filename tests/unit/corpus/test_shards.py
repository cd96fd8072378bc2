"""Token shards: the stream is what encoding each whole file gives, and it is read back whole."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from babyllama_ds.corpus import blocks as cutting
from babyllama_ds.corpus import writing as module
from babyllama_ds.corpus.blocks import cut_into_blocks
from babyllama_ds.corpus.shards import DomainSpan, TokenShards
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.corpus.writing import write_shards
from babyllama_ds.errors import DataError, RunError, Stopped
from babyllama_ds.spec.corpus import TrainedTokenizer

LINES = [
    f"{who} said: 'the {thing} {verb}!'\n\n  And so\tit {verb}.\n"
    for who in ("A fox", "Her aunt", "Nobody's cat")
    for thing in ("kettle", "ladder", "moon", "bucket")
    for verb in ("sang", "fell over", "isn't here", "'s red")
]
VOCAB_SIZE = 320


def published_style(folder: Path) -> PreTrainedTokenizerFast:
    spec = TrainedTokenizer(kind="bpe", vocab_size=VOCAB_SIZE)
    train_tokenizer(spec, iter(LINES), folder)
    return load_tokenizer(str(folder))


def llama3_style(_: Path) -> PreTrainedTokenizerFast:
    """Joins punctuation with the line breaks after it; no prefix space; an added word pair."""
    pattern = (
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = Sequence(
        [
            Split(Regex(pattern), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=alphabet,
        special_tokens=["<s>"],
        show_progress=False,
    )
    backend.train_from_iterator(["".join(LINES)], trainer)
    backend.add_tokens([AddedToken("a b", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def sentence_piece_style(_: Path) -> PreTrainedTokenizerFast:
    """Puts `▁` before a text; merges run over the whole text, unknown characters as bytes."""
    characters = sorted(set("".join(LINES).replace(" ", "▁").replace("\n", "")))
    words = ["▁t", "▁th", "▁the", "▁s", "▁sa", "l▁", "l▁o"]  # one merge crosses a space
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *words]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "s"), ("▁s", "a"), ("l", "▁")]
    merges.append(("l▁", "o"))
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


STYLES: dict[str, Callable[[Path], PreTrainedTokenizerFast]] = {
    "published": published_style,
    "llama3": llama3_style,
    "sentence_piece": sentence_piece_style,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in STYLES.items()}


@pytest.fixture
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["published"]


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a file encoded in one call."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def lines_of(text: str) -> list[str]:
    return [line + "\n" for line in text.split("\n")]


def stream(shards: TokenShards, split: str) -> list[int]:
    ids: list[int] = shards.read(split, 0, shards.num_tokens(split)).tolist()
    return ids


# -- the stream ----------------------------------------------------------------------------------

WHITESPACE = (" ", "  ", "\n", "\n\n", "\t", "\r", "\x1c", "\x85", "\u00a0", "\u2028")
WORDS = ("the", "kettle", "l o", "a b", "a", "'s", "don't", "!", "...", "12345", "水", "Ġ", "▁")
# Not quite whitespace, composed with it, or made of it by NFKC; special tokens' names.
TRAPS = ("\u200b", "\u0301", "´", "½", "ﬁ", "👩‍🚀", "<s>", "<pad>", "</s>")
PIECES = (*WHITESPACE, *WORDS, *TRAPS)


def made_of_pieces(seed: int, num_pieces: int) -> str:
    return "".join(random.Random(seed).choices(PIECES, k=num_pieces))


# Long enough for many cuts; text of any characters at the end, where hypothesis can shrink it.
TEXT = st.builds(
    lambda seed, num_pieces, rest: made_of_pieces(seed, num_pieces) + rest,
    st.integers(0, 1 << 32),
    st.integers(0, 300),
    st.text(max_size=40),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@pytest.mark.parametrize("style", list(STYLES))
@given(files=st.lists(TEXT, max_size=3), block_chars=st.integers(1, 40))
def test_blocks_do_not_show(
    tokenizers: dict[str, PreTrainedTokenizerFast],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    style: str,
    files: list[str],
    block_chars: int,
) -> None:
    monkeypatch.setattr(cutting, "BLOCK_CHARS", block_chars)
    monkeypatch.setattr(module, "BATCH_BLOCKS", 3)
    tokenizer = tokenizers[style]
    texts = [("any", iter(lines_of(text))) for text in files]
    write_shards(tmp_path, {"train": texts, "dev": []}, tokenizer)
    shards = TokenShards.open(tmp_path)
    expected = [index for text in files for index in whole(tokenizer, text + "\n")]
    assert stream(shards, "train") == expected
    assert shards.num_tokens("dev") == 0


@pytest.mark.parametrize("style", list(STYLES))
def test_long_text_is_really_cut(
    tokenizers: dict[str, PreTrainedTokenizerFast], style: str
) -> None:
    """Else the test above would show nothing."""
    encoder = cutting.Encoder(tokenizers[style])
    text = "".join(LINES)
    blocks = list(cut_into_blocks(LINES, encoder.may_cut, 100))
    assert "".join(blocks) == text
    assert len(blocks) > len(text) / 200
    assert max(map(len, blocks)) < 400


def test_the_pieces_are_needed(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """What cutting anywhere, or without an anchor, would change."""
    published, llama3 = tokenizers["published"], tokenizers["llama3"]
    assert whole(published, "the\nkettle") != whole(published, "the") + whole(published, "\nkettle")
    joined = whole(llama3, "sang!'\n\nfox")
    assert joined != whole(llama3, "sang!'") + whole(llama3, "\n\nfox")
    encoder = cutting.Encoder(llama3)
    assert not encoder.may_cut("sang!'", "\n\nfox")
    assert not encoder.may_cut("a", " b")  # an added token would be split
    assert encoder.may_cut("the", " fox")
    assert not cutting.Encoder(tokenizers["sentence_piece"]).may_cut("l", " o")


def test_text_without_a_place_to_cut_stays_whole_in_linear_work() -> None:
    asked = []

    def never(left: str, right: str) -> bool:
        asked.append((left, right))
        return False

    assert list(cut_into_blocks(["x" * 1000], never, 10)) == ["x" * 1000]
    assert asked == []
    lines = ["x y\n"] * 2000
    assert list(cut_into_blocks(iter(lines), never, 10)) == ["".join(lines)]
    assert len(asked) < 3 * 2 * len(lines)


@pytest.mark.parametrize("length", [1000, 4000, 16_000])
def test_a_very_long_line_is_cut_in_linear_work(length: int) -> None:
    asked = []

    def always(left: str, right: str) -> bool:
        asked.append(len(left) + len(right))
        return True

    line = "x yz " * (length // 5)
    blocks = list(cut_into_blocks([line], always, 50))
    assert "".join(blocks) == line
    assert len(asked) == len(blocks) - 1 <= length / 50
    assert max(map(len, blocks[:-1])) < 60


@pytest.mark.parametrize("chars", [1000, 4000, 16_000])
def test_a_file_without_whitespace_is_encoded_once(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    encoded: Encoded,
    monkeypatch: pytest.MonkeyPatch,
    chars: int,
) -> None:
    monkeypatch.setattr(cutting, "BLOCK_CHARS", 20)
    text = "kettle" * (chars // 6)
    done = encoded.of(lambda: write_shards(tmp_path, {"train": [("a", iter([text]))]}, tokenizer))
    assert done == len(text)
    assert stream(TokenShards.open(tmp_path), "train") == whole(tokenizer, text)


def test_a_block_leaves_before_much_more_is_read() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "ten chars\n"

    blocks = cut_into_blocks(endless(), lambda *_: True, 1000)
    sizes = [len(next(blocks)) for _ in range(50)]
    assert max(sizes) < 1100
    assert read * 10 < sum(sizes) + 3000


def test_text_that_looks_like_special_tokens_is_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_shards(tmp_path, {"train": [("a", iter(["<s> the </s> moon <pad>\n"]))]}, tokenizer)
    ids = stream(TokenShards.open(tmp_path), "train")
    assert min(ids) > 2
    assert tokenizer.decode(ids) == " <s> the </s> moon <pad>\n"


def test_the_callers_tokenizer_is_left_alone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    write_shards(tmp_path, {"train": [("a", iter(["moon\n"]))]}, tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("<s>")["input_ids"] == [1]


# -- facts ---------------------------------------------------------------------------------------


def test_counts_and_domains(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tea, pond = "The kettle  sang – è!\n" * 900, "A moon.\n"
    texts = [
        ("tea", iter(tea.splitlines(keepends=True))),
        ("void", iter(())),
        ("pond", iter([pond])),
        ("tea", iter([pond])),
    ]
    dev = [("tea", iter([pond]))]
    write_shards(tmp_path, {"train": texts, "dev": dev}, tokenizer)
    shards = TokenShards.open(tmp_path)
    first, short = len(whole(tokenizer, tea)), len(whole(tokenizer, pond))
    assert shards.vocab_size == VOCAB_SIZE
    assert shards.num_tokens("train") == first + 2 * short
    assert shards.num_bytes("train") == len((tea + pond + pond).encode())
    assert shards.num_words("train") == 5 * 900 + 2 * 2
    assert shards.domains("train") == [
        DomainSpan("tea", 0, first),
        DomainSpan("pond", first, first + short),
        DomainSpan("tea", first + short, first + 2 * short),
    ]
    assert (shards.num_tokens("dev"), shards.num_words("dev")) == (short, 2)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few lines fill a shard, in two batches of blocks."""
    for name, value in (("BLOCK_CHARS", 40), ("BATCH_BLOCKS", 2), ("SHARD_BLOCKS", 3)):
        monkeypatch.setattr(cutting if name == "BLOCK_CHARS" else module, name, value)


@pytest.mark.usefixtures("small_shards")
def test_the_index_says_what_the_files_hold(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_shards(tmp_path, {"train": [("a", iter(LINES))]}, tokenizer)
    index = json.loads((tmp_path / "shards.json").read_text())
    assert (index["dtype"], index["vocab_size"]) == ("uint16", VOCAB_SIZE)
    files = index["splits"]["train"]["files"]
    assert [file["name"] for file in files] == [f"train-{i:05d}.bin" for i in range(len(files))]
    assert len(files) > 5
    sizes = [(tmp_path / file["name"]).stat().st_size for file in files]
    assert sizes == [2 * file["tokens"] for file in files]
    raw = b"".join((tmp_path / file["name"]).read_bytes() for file in files)
    assert np.frombuffer(raw, "<u2").tolist() == whole(tokenizer, "".join(LINES))


@pytest.mark.parametrize(("size", "dtype", "width"), [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_the_narrowest_type_that_holds_every_id(
    tmp_path: Path, size: int, dtype: str, width: int
) -> None:
    vocab = {f"w{i}": i for i in range(size)}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="w0"))
    backend.pre_tokenizer = Split(" ", behavior="removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    write_shards(tmp_path, {"train": [("a", iter([f"w1 w{size - 1} w7 w2"]))]}, tokenizer)
    assert json.loads((tmp_path / "shards.json").read_text())["dtype"] == dtype
    assert stream(TokenShards.open(tmp_path), "train") == [1, size - 1, 7, 2]
    assert (tmp_path / "train-00000.bin").stat().st_size == 4 * width


# -- reading -------------------------------------------------------------------------------------


@pytest.fixture
def split_up(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TokenShards:
    """A shard a word or two, and now and then one of less than a window."""
    monkeypatch.setattr(cutting, "BLOCK_CHARS", 8)
    monkeypatch.setattr(module, "SHARD_BLOCKS", 1)
    write_shards(tmp_path, {"train": [("a", iter(LINES))]}, tokenizer)
    return TokenShards.open(tmp_path)


def test_reading_across_shards(split_up: TokenShards) -> None:
    expected = whole_stream = stream(split_up, "train")
    assert len(whole_stream) > 100
    for start in range(0, 30):
        for length in (0, 1, 6, 7, 8, 20):
            got = split_up.read("train", start, length)
            assert got.dtype == np.int64
            assert got.tolist() == expected[start : start + length]
    last = len(expected) - 3
    assert split_up.read("train", last, 3).tolist() == expected[last:]


def test_a_token_is_counted_in_all_shards(split_up: TokenShards) -> None:
    whole_stream = stream(split_up, "train")
    for token in set(whole_stream):
        assert split_up.count("train", token) == whole_stream.count(token)


@pytest.mark.parametrize("length", [1, 6, 7, 8, 30])
def test_gathering_equals_reading_one_by_one(split_up: TokenShards, length: int) -> None:
    available = split_up.num_tokens("train") - length
    starts = np.random.default_rng(0).integers(0, available + 1, 50)
    starts[:4] = [available, 0, 7, 6]
    expected = [split_up.read("train", int(start), length).tolist() for start in starts]
    got = split_up.gather("train", starts, length)
    assert got.dtype == np.int64
    assert got.tolist() == expected


# -- damage and refusal --------------------------------------------------------------------------


def test_damaged_shards_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": [("a", iter(LINES))]}, tokenizer)
    path = tmp_path / "train-00000.bin"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-2], b"", content + b"\0\0"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"got {len(damaged)} bytes, expected {len(content)}"):
            TokenShards.open(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: got No such file"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"dtype": "uint16", "splits": {"train": 3}}'])
def test_an_index_of_another_shape_is_refused(tmp_path: Path, index: str) -> None:
    with pytest.raises(RunError, match="no such file"):
        TokenShards.open(tmp_path)
    (tmp_path / "shards.json").write_text(index)
    with pytest.raises(DataError, match=r"shards\.json: got JSON of another shape"):
        TokenShards.open(tmp_path)


def test_a_shard_without_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text may come to nothing in some tokenizers; an empty file cannot be mapped."""
    monkeypatch.setattr(cutting, "BLOCK_CHARS", 4)
    monkeypatch.setattr(module, "SHARD_BLOCKS", 1)
    backend = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = Split(" ", behavior="removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a b a b" + " " * 9 + "b a b b"
    monkeypatch.setattr(
        cutting, "cut_into_blocks", lambda *_: iter([text[:7], text[7:15], text[15:]])
    )
    write_shards(tmp_path, {"train": [("any", iter([text]))]}, tokenizer)
    shards = TokenShards.open(tmp_path)
    index = json.loads((tmp_path / "shards.json").read_text())
    assert [file["tokens"] for file in index["splits"]["train"]["files"]][1] == 0
    expected = whole(tokenizer, text)
    assert stream(shards, "train") == expected
    for start in range(len(expected) - 2):
        starts = np.array([start])
        assert shards.gather("train", starts, 3)[0].tolist() == expected[start : start + 3]


def test_a_place_that_cannot_be_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    texts: dict[str, Any] = {"train": [("a", iter(["moon\n"]))]}
    with pytest.raises(RunError, match="expected a place that can be written"):
        write_shards(tmp_path / "file" / "tokens", texts, tokenizer)


def test_check_can_stop_the_writing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "BLOCK_CHARS", 50)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped("SIGTERM")

    def endless() -> Iterator[str]:
        while True:
            yield from LINES

    threads = threading.active_count()
    with pytest.raises(Stopped):
        write_shards(tmp_path, {"train": [("a", endless())]}, tokenizer, check=check)
    assert not (tmp_path / "shards.json").exists()
    assert threading.active_count() == threads


def test_an_error_in_the_text_comes_through(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def broken() -> Iterator[str]:
        yield from LINES
        raise DataError.of("a.txt", got="less than before", expected="all of it")

    with pytest.raises(DataError, match="less than before"):
        write_shards(tmp_path, {"train": [("a", broken())]}, tokenizer)


# -- going on --------------------------------------------------------------------------------------

SPLITS = {"train": (("a", LINES), ("b", LINES[:7])), "dev": (("c", LINES[5:9]),)}


def texts_of(splits: Any = SPLITS) -> dict[str, Any]:
    return {
        split: [(domain, iter(lines)) for domain, lines in files] for split, files in splits.items()
    }


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Encoded:
    """Counts the characters that are really encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chars = 0
        encode_batch = cutting.Encoder._encode_batch

        def counting(encoder: Any, batch: Any) -> Any:
            self.chars += sum(len(block.text) for block in batch.blocks)
            return encode_batch(encoder, batch)

        monkeypatch.setattr(cutting.Encoder, "_encode_batch", counting)

    def of(self, work: Callable[[], None]) -> int:
        before = self.chars
        work()
        return self.chars - before


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    return Encoded(monkeypatch)


@pytest.fixture
def undisturbed(
    small_shards: None,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Path:
    write_shards(tmp_path / "undisturbed", texts_of(), tokenizer)
    return tmp_path / "undisturbed"


@pytest.mark.parametrize("stop_at", [1, 2, 3, 8, 13])
def test_what_was_done_is_kept_and_the_result_is_the_same(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    undisturbed: Path,
    encoded: Encoded,
    stop_at: int,
) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stopped("SIGTERM")

    place = tmp_path / "begun"
    with pytest.raises(Stopped):
        write_shards(place, texts_of(), tokenizer, check=check)
    finished = list(place.glob("*.json"))
    assert len(finished) == (stop_at - 1) // 2  # two batches a shard
    begun = {name: data for name, data in content(place).items() if name.endswith(".bin")}
    chars = sum(len(line) for files in SPLITS.values() for _, lines in files for line in lines)
    anew = encoded.of(lambda: write_shards(place, texts_of(), tokenizer))
    assert content(place) == content(undisturbed)
    assert begun.items() <= content(place).items()
    kept = sum(json.loads(path.read_text())["bytes"] for path in finished)
    assert anew == chars - kept  # ASCII
    assert encoded.of(lambda: write_shards(place, texts_of(), tokenizer)) == 0


def test_a_damaged_shard_is_named_and_made_anew(
    tokenizer: PreTrainedTokenizerFast,
    undisturbed: Path,
    encoded: Encoded,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = content(undisturbed)
    one, two, three = (undisturbed / f"train-0000{shard}.bin" for shard in (1, 2, 4))
    one.write_bytes(one.read_bytes()[:-3] + b"\xff\0\0")
    two.write_bytes(two.read_bytes()[:-2])
    proof = three.with_suffix(".json")
    proof.write_text(re.sub(r'"words": \d+', '"words": 7', proof.read_text()))
    assert content(undisturbed)[proof.name] != before[proof.name]
    (undisturbed / "dev-00000.json").unlink()
    damaged = [one, two, three, undisturbed / "dev-00000.bin"]
    chars = sum(json.loads(before[path.with_suffix(".json").name])["bytes"] for path in damaged)
    assert encoded.of(lambda: write_shards(undisturbed, texts_of(), tokenizer)) == chars
    assert content(undisturbed) == before
    reasons = ["damaged (its checksum does not hold)"] * 2
    reasons += ["unfinished or damaged (nothing proves it)"] * 2
    expected = [
        f"{path} is {reason}: its text is encoded anew"
        for path, reason in zip(damaged, reasons, strict=True)
    ]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == expected


def test_shards_of_other_text_are_not_kept(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    undisturbed: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when a file was changed under a run, and then changed back."""
    other = [*LINES]
    other[9] = other[9].replace("fell", "feel")
    place = tmp_path / "other"
    more = {"train": (("a", other), ("b", LINES)), "dev": SPLITS["dev"]}
    write_shards(place, texts_of(more), tokenizer)
    write_shards(place, texts_of(), tokenizer)
    assert content(place) == content(undisturbed)
    assert re.search(r"train-0000\d\.bin was made of other text", caplog.text)


def test_shards_of_another_domain_are_not_kept(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, undisturbed: Path
) -> None:
    renamed = {**SPLITS, "train": (("z", LINES), ("b", LINES[:7]))}
    write_shards(tmp_path / "renamed", texts_of(renamed), tokenizer)
    assert content(tmp_path / "renamed") != content(undisturbed)
    write_shards(tmp_path / "renamed", texts_of(), tokenizer)
    assert content(tmp_path / "renamed") == content(undisturbed)
