"""Tokenizers: trained as BabyLlama's, or loaded; and what each token id stands for.

Enters: cleaned lines, or the path of an existing tokenizer. Leaves: a fast Hugging Face tokenizer
whose every id has a row in the embedding, and the id → bytes mapping that bits per byte and the
comparison of vocabularies need. `writing` encodes the corpus with it.

The trained tokenizer is the published one: byte-level BPE, NFKC, a leading space, min frequency 2,
`<pad>` 0, `<s>` 1, `</s>` 2. Differences, all meant:

- *All 256 bytes are in the vocabulary.* Published: only those seen in training, so that any other
  vanishes from a text without a trace. The price is some sixty merges.
- *The leading space stays.* Published: trained with `add_prefix_space=True`, then loaded as a
  `GPT2TokenizerFast`, whose own default (in the transformers of then) turned it off.
- *No `<|endoftext|>`.* Published: added by `GPT2TokenizerFast` as id 16000, one beyond the
  embedding's last row.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from babyllama_ds.errors import DataError, JobError, Problem
from babyllama_ds.files import cannot_write, hash_json, read_json, write_json
from babyllama_ds.hub import commit_of
from babyllama_ds.spec.corpus import TrainedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
"""In the order of their ids, from 0. None of them is ever in the training stream."""

TOKENIZER = "a fast tokenizer: a Hugging Face directory, a tokenizer.json, or a hub id"
"""What a tokenizer's path is expected to name."""

_BATCH_LINES = 4096


def train_tokenizer(
    spec: TrainedTokenizer,
    texts: Iterator[str],
    directory: Path,
    *,
    check: Callable[[], None] | None = None,
) -> None:
    """Learn `spec.vocab_size` tokens from `texts` and save the tokenizer in `directory`.

    The same text gives the same files, whatever the number of threads. As in the published code,
    each line counts as a text of its own and begins with a space. `check` is called between
    batches of lines and may raise to stop. Raises `DataError` when the text has too few merges.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    if spec.normalization != "none":
        form = {"nfkc": normalizers.NFKC, "nfc": normalizers.NFC}[spec.normalization]
        tokenizer.normalizer = form()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = BpeTrainer(
        vocab_size=spec.vocab_size,
        min_frequency=spec.min_frequency,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(texts, check), trainer)
    _check_size(tokenizer.get_vocab_size(), spec)
    save_tokenizer(_as_fast(tokenizer), directory)


def load_tokenizer(
    path_or_id: str,
    revision: str | None = None,
    *,
    where: str = "tokenizer.path",
    what: str = TOKENIZER,
) -> PreTrainedTokenizerFast:
    """The tokenizer at a directory, in a `tokenizer.json`, or of a hub id; no remote code runs.

    Where there is a `tokenizer.json`, it is that one, as it is. transformers would take a class by
    the family of the model beside it, and some (Qwen 2's, LLaMA's) put a normalizer and splitting
    of their own in the place of the file's.

    `where` is the key that named it, and `what` it was to name; `revision` a commit, tag or branch
    of a hub id.

    Raises:
        HubError: nothing there, neither here nor on the hub.
        DataError: no tokenizer, a damaged one, one that is not fast, or that fails on some text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path_or_id)
    commit = commit_of(path_or_id, revision, where=where, what=what)
    try:
        if path.is_file():
            tokenizer = _load_file(path)
        else:
            reader = PreTrainedTokenizerFast if _is_whole(path_or_id, commit) else AutoTokenizer
            tokenizer = reader.from_pretrained(path_or_id, revision=commit, trust_remote_code=False)
    except Exception as error:  # the libraries raise a bare Exception for damaged files
        raise _cannot_load(where, path_or_id, _reason(path, error)) from error
    if not tokenizer.is_fast:
        got = f"{type(tokenizer).__name__}, a tokenizer written in Python"
        raise _cannot_load(where, path_or_id, got)
    if not any(token_bytes(tokenizer)):
        # Beside a GPT-2 without any tokenizer, transformers 5 makes one up, empty.
        raise _cannot_load(where, path_or_id, "no tokenizer, or one without a token of text")
    _check_takes_any_text(tokenizer, where, path_or_id)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save as a Hugging Face directory that transformers 4 and 5 load alike."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(directory))
    except OSError as error:
        raise cannot_write(directory, error) from error
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        # transformers 5 writes its new name of the class, which 4 does not know; 5 knows both.
        write_json(config_path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs: the largest id, added tokens included, plus one."""
    return 1 + int(max(tokenizer.get_vocab().values(), default=-1))


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes that each id in [0, vocabulary_size) stands for; special tokens: none.

    Byte-level BPE: exact (a token may be part of a character). SentencePiece-like vocabularies:
    `▁` is a space and `<0x0A>` a byte. Others: the token as it is written, in UTF-8 (WordPiece's
    `##` stays: it tells `ing` from `##ing`). Ids that no token has: none.
    """
    backend = tokenizer.backend_tokenizer
    to_bytes = _byte_level if _is_byte_level(backend) else _sentence_piece
    meanings = [b""] * vocabulary_size(tokenizer)
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        meanings[index] = to_bytes(token)
    for index, added in backend.get_added_tokens_decoder().items():
        meanings[index] = b"" if added.special else added.content.encode()
    return meanings


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that stands for text without a token; none: there is no such id.

    The backend's, which is what comes of a text: GPT-2's family says that `<|endoftext|>` is it.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if "unk_id" in model:
        return model["unk_id"]  # type: ignore[no-any-return]
    token = model.get("unk_token")
    return tokenizer.backend_tokenizer.token_to_id(token) if token else None


def ids_of_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], *, where: str
) -> list[int]:
    """The ids of tokens, as the vocabulary writes them (byte-level: `Ġthe` for " the").

    `where` is the key that lists them. Raises `JobError` with every one that there is not.
    """
    vocabulary = tokenizer.get_vocab()
    problems = [
        Problem(
            where=f"{where}[{i}]",
            got=repr(token),
            expected="a token of the vocabulary, as it writes it",
            hint=_close_token(token, vocabulary),
        )
        for i, token in enumerate(tokens)
        if token not in vocabulary
    ]
    if problems:
        raise JobError.all_of(problems)
    return [vocabulary[token] for token in tokens]


def _close_token(token: str, vocabulary: Mapping[str, int]) -> str | None:
    spelt = token.replace(" ", "Ġ")
    if spelt in vocabulary:
        return f"did you mean `{spelt}`? A space is written Ġ"
    close = difflib.get_close_matches(token, vocabulary, n=1)
    return f"did you mean `{close[0]}`?" if close else None


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the id → bytes mapping; special tokens count by name.

    Equal hashes mean that the logits of two models can be compared column by column.
    """
    return hash_json(_meanings(tokenizer))


def differing_ids(
    a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast
) -> dict[int, tuple[str, str]]:
    """The ids that do not stand for the same thing in both, each with what it is in `a` and `b`.

    None differs exactly when the hashes are equal.
    """
    pairs = zip_longest(_meanings(a), _meanings(b), fillvalue="no token")
    return {index: pair for index, pair in enumerate(pairs) if pair[0] != pair[1]}


class Splits(NamedTuple):
    """What two tokenizers make of the same text."""

    tokens: int
    """Of the first."""
    otherwise: int
    """Those that the second does not have at the same place."""
    example: str
    """The first place that differs, with both splits; empty where there is none."""


def compare_splits(
    ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast, ids: Sequence[int]
) -> Splits:
    """How two tokenizers of the same vocabulary split the text of a stream of ids, line by line.

    Tokens are compared by where they begin and end, in bytes.
    """
    meanings = token_bytes(ours)
    ours_encodes, theirs_encodes = _encoder(ours), _encoder(theirs)
    tokens, otherwise, example = 0, 0, ""
    for line in _lines_of(ids, meanings):
        text = b"".join(line).decode(errors="replace")
        one, other = ours_encodes(text), theirs_encodes(text)
        tokens += len(one)
        if one != other:
            otherwise += len(_spans(one, meanings) - _spans(other, meanings))
            example = example or _example(one, other, meanings)
    return Splits(tokens, otherwise, example)


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, to be set
    backend.no_truncation()
    backend.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _lines_of(ids: Sequence[int], meanings: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The tokens of each whole line; all as one where no token ends a line."""
    line: list[bytes] = []
    whole = False
    for index in map(int, ids):
        line.append(meanings[index])
        if line[-1].endswith(b"\n"):
            whole = True
            yield line
            line = []
    if not whole:
        yield line


def _spans(ids: Sequence[int], meanings: Sequence[bytes]) -> set[tuple[int, int]]:
    ends = accumulate((len(meanings[index]) for index in ids), initial=0)
    return set(pairwise(ends))


def _example(one: Sequence[int], other: Sequence[int], meanings: Sequence[bytes]) -> str:
    """From the first token that differs on, three of each."""
    pairs = zip(one, other, strict=False)
    first = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    shown = [
        " ".join(repr(meanings[index]) for index in ids[first : first + 3]) for ids in (one, other)
    ]
    return f"{shown[0]}, not {shown[1]}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides the ids of a text: vocabulary, merges, normalizer and so on, and
    which tokens fill it up and stand at its ends.

    These the backend does not know: a family may have one `tokenizer.json` for models that end a
    text with different tokens.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return hash_json(
        {
            **{key: backend[key] for key in sorted(backend) if key not in _TRANSIENT},
            "ends": [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
        }
    )


_TRANSIENT = ("truncation", "padding")  # settings of the last call, not of the tokenizer


# -- training and loading ------------------------------------------------------------------------


def _batches(texts: Iterator[str], check: Callable[[], None] | None) -> Iterator[list[str]]:
    # Lists cross into the Rust library much faster than single lines.
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_LINES:
            if check is not None:
                check()
            yield batch
            batch = []
    yield batch


def _check_size(size: int, spec: TrainedTokenizer) -> None:
    if size < spec.vocab_size:
        raise DataError.of(
            "tokenizer.vocab_size",
            got=f"text that supports {size} tokens at min_frequency {spec.min_frequency}",
            expected=f"vocab_size ({spec.vocab_size})",
            hint=f"set tokenizer.vocab_size to at most {size}, or give more text",
        )
    assert size == spec.vocab_size, "the trainer made more tokens than asked for"


def _as_fast(tokenizer: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    settings = {name: token for name, token in SPECIAL_TOKENS.items() if _has(tokenizer, token)}
    pre_tokenizer = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:
        # Unless told, transformers 4 sets it to False, over what the tokenizer itself says.
        settings["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings
    )


def _has(tokenizer: Any, token: str) -> bool:
    return tokenizer.token_to_id(token) is not None


def _load_file(path: Path) -> PreTrainedTokenizerFast:
    # A bare tokenizer.json does not say which tokens begin and end a text: ours are taken where
    # they exist, and none is added, since it would lie outside the embedding.
    from tokenizers import Tokenizer

    return _as_fast(Tokenizer.from_file(str(path)))


def _check_takes_any_text(tokenizer: PreTrainedTokenizerFast, where: str, name: str) -> None:
    """What has no token is no error, which would come in the middle of a run."""
    try:
        tokenizer.backend_tokenizer.encode(_RARE, add_special_tokens=False)
    except Exception as error:  # the library raises a bare one
        raise DataError.of(
            where,
            got=f"{name}: a tokenizer that fails on text that it has no token for ({error})",
            expected="one that has a token for it",
            hint="in tokenizer.json, `model.unk_token` (of a Unigram `model.unk_id`) names it; it "
            "has to be in the vocabulary",
        ) from error


_RARE = "\U00013000"
"""A letter that hardly any vocabulary has (a hieroglyph)."""


def _is_whole(name: str, commit: str | None) -> bool:
    """Whether a directory or hub id has a `tokenizer.json`, and names no code of its own."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    quietly = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if cached_file(name, "tokenizer.json", revision=commit, **quietly) is None:
        return False
    return "auto_map" not in get_tokenizer_config(name, revision=commit)


def _reason(path: Path, error: Exception) -> str:
    if path.is_dir() and not (path / "tokenizer.json").exists():
        return "no tokenizer.json, and nothing else that a fast tokenizer can be made of"
    reason = str(error).strip() or type(error).__name__
    return reason if path.exists() else reason.splitlines()[0]


def _cannot_load(where: str, path_or_id: str, got: str) -> DataError:
    return DataError.of(
        where,
        got=f"{path_or_id}: {got}",
        expected=TOKENIZER,
        hint="a fast tokenizer's directory has a tokenizer.json; "
        "`tokenizer.save_pretrained(directory)` writes it, beside a model too",
    )


# -- what ids stand for --------------------------------------------------------------------------


def _meanings(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """One description per id, different for different meanings."""
    meanings = [repr(text) if text else "no text" for text in token_bytes(tokenizer)]
    for index, added in tokenizer.backend_tokenizer.get_added_tokens_decoder().items():
        if added.special:
            meanings[index] = f"special {added.content}"
    return meanings


def _is_byte_level(backend: Any) -> bool:
    decoder = json.loads(backend.to_str())["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_level(token: str) -> bytes:
    """The bytes of a token written in GPT-2's byte alphabet; of another, as it is written.

    Some vocabularies have such (special tokens in signs of their own); their decoder does the same.
    """
    if not all(character in _BYTE_OF for character in token):
        return token.encode()
    return bytes(_BYTE_OF[character] for character in token)


def _sentence_piece(token: str) -> bytes:
    if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
        return bytes.fromhex(byte[1])
    return token.replace("▁", " ").encode()


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's one printable character per byte: itself where printable, else 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
