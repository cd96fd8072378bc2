"""What a tokenizer makes of the characters of a text: lines pass through, a warning leaves.

Nothing of a text may be lost without a word. A tokenizer can lose it (a character that it has no
token for becomes `<unk>`, or nothing) or write it otherwise (NFKC, of the tokenizers trained here,
makes `，` a `,`; others drop accents or capitals). Models learn, write and are measured on what is
left. Each character that occurs is tried by itself, once.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.streams import Texts
from babyllama_ds.corpus.tokenizer import token_bytes, unknown_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_UNICODE = 0x110000
_COUNTED_AT_ONCE = 1 << 20
_MOST_SHOWN = 6


class Characters:
    """How often each character occurs in the lines that passed."""

    def __init__(self) -> None:
        self._counts = np.zeros(_UNICODE, dtype=np.int64)
        self._waiting: list[str] = []
        self._size = 0

    def counted(self, texts: Texts) -> Texts:
        """The same texts, whose lines are counted as they pass."""
        for domain, lines in texts:
            yield domain, self._lines(lines)

    def by_character(self) -> dict[str, int]:
        """The most frequent first."""
        self._count()
        points = np.flatnonzero(self._counts)
        order = np.argsort(-self._counts[points], kind="stable")
        return {chr(point): int(self._counts[point]) for point in points[order]}

    def _lines(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self._waiting.append(line)
            self._size += len(line)
            if self._size >= _COUNTED_AT_ONCE:
                self._count()
            yield line

    def _count(self) -> None:
        text = "".join(self._waiting)
        self._waiting, self._size = [], 0
        for start in range(0, len(text), _COUNTED_AT_ONCE):  # a line may be very long
            part = text[start : start + _COUNTED_AT_ONCE].encode("utf-32-le")
            self._counts += np.bincount(np.frombuffer(part, "<u4"), minlength=_UNICODE)


def tell_what_changes(
    tokenizer: PreTrainedTokenizerFast, characters: Characters, shards: TokenShards
) -> None:
    """Warn of what the tokenizer loses of the text, and of what it writes otherwise."""
    unknown = unknown_id(tokenizer)
    for split in shards.splits:
        if unknown is not None and (count := shards.count(split, unknown)):
            log.warning(
                "tokenizer: %d of the %d tokens of the %s text (%.2g %%) are %s: text that it has "
                "no tokens for is lost, and bits per byte leave it out",
                count,
                shards.num_tokens(split),
                split,
                100 * count / shards.num_tokens(split),
                tokenizer.convert_ids_to_tokens(unknown),
            )
    found = characters.by_character()
    written = _written(tokenizer, found)
    lost = {character: "" for character, text in written.items() if not text}
    changed = {character: text for character, text in written.items() if text}
    for what, these in (("has no token for", lost), ("writes otherwise", changed)):
        if these:
            count, whole = sum(found[character] for character in these), sum(found.values())
            log.warning(
                "tokenizer: it %s %s of the text's %s characters (%.2g %%; %d different): %s; "
                "see docs/own-data.md#what-a-tokenizer-keeps",
                what,
                f"{count:,}",
                f"{whole:,}",
                100 * count / whole,
                len(these),
                _shown(these),
            )


def _written(tokenizer: PreTrainedTokenizerFast, characters: Iterable[str]) -> dict[str, str]:
    """What is left of each character that does not come back; "" where it is lost.

    Other spellings of the same character (U+212B, the sign of the unit, for Å) count as it.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, to be set
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    meanings, unknown = token_bytes(tokenizer), unknown_id(tokenizer)
    # Words may hold a character that is no token by itself: there unknown tokens tell what is lost.
    of_words = type(backend.model).__name__ in ("WordPiece", "WordLevel")
    normalizer = backend.normalizer
    normalized = normalizer.normalize_str if normalizer is not None else str
    tried = [each for each in characters if each != " "]  # which many leave to their decoder
    written = {}
    encodings = backend.encode_batch(tried, add_special_tokens=False)
    for character, encoding in zip(tried, encodings, strict=True):
        text = b"".join(meanings[index] for index in encoding.ids).decode(errors="replace")
        if unknown in encoding.ids:
            text = normalized(character) if of_words else ""
        if not character.isspace():
            text = text.strip()  # a space before a text is the tokenizer's own
        if not (character.isspace() and character in text) and _nfc(text) != _nfc(character):
            written[character] = "" if "\ufffd" in text else text  # half of its bytes are no text
    return written


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _shown(written: dict[str, str]) -> str:
    """The most frequent."""
    some = list(written.items())[:_MOST_SHOWN]
    more = ["…"] if len(written) > len(some) else []
    return ", ".join([f"{_named(a)}{f' as {_named(b)}' if b else ''}" for a, b in some] + more)


def _named(text: str) -> str:
    plain = len(text) > 1 or (text.isprintable() and not unicodedata.combining(text))
    return repr(text) if plain else f"U+{ord(text):04X}"
