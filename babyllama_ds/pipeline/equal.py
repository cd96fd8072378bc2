"""Are several nodes' own copies the same? What each found or made enters, nothing or an error
leaves. With one storage there is nothing to compare."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from babyllama_ds import files
from babyllama_ds.corpus.prepare import CorpusEntries
from babyllama_ds.errors import DataError
from babyllama_ds.storages import Storages


def check_same_corpus(storages: Storages, of_each: Sequence[CorpusEntries]) -> None:
    """Tokenizer, token shards and the nursery's text and pairs, to the byte. A collective.

    Raises:
        DataError: the nodes' texts or tokenizers differ.
        RunError: what was made of them differs; the file and both nodes are named.
    """
    if not storages.several:
        return
    first = of_each[0]
    for storage, entries in enumerate(of_each):
        if (entries.tokenizer_key, entries.tokens_key) != (first.tokenizer_key, first.tokens_key):
            raise DataError.of(
                f"{storages.name(storage)}: corpus",
                got=f"another text or tokenizer than on {storages.name(0)}",
                expected="the same on every node, which deepspeed.storage=node prepares its own "
                "tokens from",
                hint="copy the text, and a tokenizer that is loaded, to every node anew",
            )
    made = [first.tokenizer_dir, first.tokens_dir]
    if first.pairs_dir is not None:
        made.append(first.pairs_dir.parent)
    for directory in made:
        of_each_made = storages.on_each(partial(files.manifest_of, directory))
        storages.check_same(directory, [manifest.files for manifest in of_each_made])


def check_same_benchmarks(storages: Storages, of_each: Sequence[str]) -> None:
    """Fingerprints of one evaluation, which differ where the benchmarks' files do.

    Raises:
        DataError: they do.
    """
    for storage, fingerprint in enumerate(of_each):
        if fingerprint != of_each[0]:
            raise DataError.of(
                f"{storages.name(storage)}: evaluation",
                got=f"other minimal pairs, or tasks to fine-tune on, than on {storages.name(0)}",
                expected="the same files on every node",
                hint="copy them to every node anew",
            )
