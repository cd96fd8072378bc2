"""The nursery corpus on disk.

Enters: a directory, how many words and pairs, a seed. Leaves: `train/nursery.train` and
`dev/nursery.dev`, one scene per line, and `pairs/<task>.jsonl` in BLiMP's format; the same bytes
for the same arguments, on any machine. Text is streamed: its length is not limited by memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from babyllama_ds.corpus.nursery.pairs import TASKS, Pair, Task, distinct_pairs, too_few_pairs
from babyllama_ds.corpus.nursery.scenes import tell_scene

NURSERY_VERSION = 1
"""Raised when the same arguments would give other text; part of every key made from it."""

COMPLETE_WORDS = 50_000
"""Length from which training text shows practically every word form of the language."""

Check = Callable[[], None]
_CHECK_SCENES = 256  # a tenth of a second and more

_WORD = re.compile(r"[a-z']+")
_SENTENCE_END = re.compile(r'(?<=[.!?])"? "?')


def write_nursery(
    directory: Path,
    *,
    words: int,
    dev_words: int,
    pairs_per_task: int,
    seed: int,
    check: Check = lambda: None,
) -> None:
    """Write training text, held-out text and minimal pairs under `directory`.

    `words` and `dev_words` count what spaces separate and are met to within half a scene (about
    25 words). The text depends on `seed` alone; a longer one begins with the shorter one. The
    right sentence of a pair does not occur in the training text; from `COMPLETE_WORDS` words on,
    every word of every pair does. `check` is called between scenes and may raise to stop. Raises
    `DataError` if a task has fewer than `pairs_per_task` distinct pairs.
    """
    candidates = [_Candidates(task, seed, pairs_per_task) for task in TASKS]
    train = directory / "train" / "nursery.train"
    dev = directory / "dev" / "nursery.dev"
    write_scenes(train, f"{seed}/train", words, training=True, check=check)
    write_scenes(dev, f"{seed}/dev", dev_words, training=False, check=check)
    _replace_unfit(train, candidates, complete=words >= COMPLETE_WORDS)
    for chosen in candidates:
        path = directory / "pairs" / f"{chosen.task.name}.jsonl"
        write_pairs(path, chosen.task, chosen.pairs())


def write_scenes(
    path: Path, seed: str, words: int, *, training: bool, check: Check = lambda: None
) -> None:
    """Write scenes, one a line, up to about `words` words and at least one scene."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, scene in enumerate(scenes(seed, words, training=training)):
            if number % _CHECK_SCENES == 0:
                check()
            file.write(f"{scene}\n")


def scenes(seed: str, words: int, *, training: bool) -> Iterator[str]:
    """Scenes until the total comes nearest to `words`; scene i depends on `seed` and i only."""
    written, index = 0, 0
    while True:
        scene = tell_scene(f"{seed}/{index}", training=training)
        length = scene.count(" ") + 1
        if index and abs(written + length - words) > abs(written - words):
            return
        yield scene
        written, index = written + length, index + 1


class _Candidates:
    """The pairs of one task: an equal share from each variant, refused ones replaced."""

    def __init__(self, task: Task, seed: int, wanted: int) -> None:
        self.task = task
        self._wanted = wanted
        self._sources = [
            distinct_pairs(variant, f"{seed}/pairs/{task.name}/{number}")
            for number, variant in enumerate(task.variants)
        ]
        self._shares: list[list[Pair]] = [[] for _ in task.variants]
        self.fill()

    def fill(self) -> list[Pair]:
        """Draw the pairs that are missing, and return them."""
        fresh: list[Pair] = []
        for number, (share, source) in enumerate(zip(self._shares, self._sources, strict=True)):
            due = len(range(number, self._wanted, len(self._shares)))
            drawn = list(islice(source, due - len(share)))
            share += drawn
            fresh += drawn
            if len(share) < due:
                raise too_few_pairs(self.task, len(share) * len(self._shares), self._wanted)
        return fresh

    def refuse(self, unfit: set[Pair]) -> None:
        """Drop these pairs."""
        self._shares = [[pair for pair in share if pair not in unfit] for share in self._shares]

    def pairs(self) -> list[Pair]:
        """The pairs, variants in turn."""
        number = len(self._shares)
        return [self._shares[index % number][index // number] for index in range(self._wanted)]


def _replace_unfit(train: Path, candidates: list[_Candidates], *, complete: bool) -> None:
    """Replace pairs that the training text rules out, until none is left.

    Unfit are those whose right sentence it contains and, where it is `complete`, those with a
    word that it lacks.
    """
    known = words_in(train) if complete else None
    fresh = [pair for chosen in candidates for pair in chosen.pairs()]
    while fresh:
        seen = sentences_in(train, {pair.good for pair in fresh})
        unfit = {
            pair
            for pair in fresh
            if pair.good in seen or (known is not None and not known.issuperset(_words(pair)))
        }
        fresh = []
        for chosen in candidates:
            chosen.refuse(unfit)
            fresh += chosen.fill()


def _words(pair: Pair) -> list[str]:
    return _WORD.findall(f"{pair.good} {pair.bad}".lower())


def sentences_in(path: Path, wanted: set[str]) -> set[str]:
    """Those of the wanted sentences that occur in a text, quoted or not."""
    found: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for line in file:
            found.update(wanted.intersection(_SENTENCE_END.split(line.strip().strip('"'))))
    return found


def words_in(path: Path) -> set[str]:
    """The word forms of a text, in lower case."""
    found: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for line in file:
            found.update(_WORD.findall(line.lower()))
    return found


def write_pairs(path: Path, task: Task, pairs: list[Pair]) -> None:
    """Write one task's pairs, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, pair in enumerate(pairs):
            record = {
                "sentence_good": pair.good,
                "sentence_bad": pair.bad,
                "field": task.field,
                "linguistics_term": task.term,
                "UID": task.name,
                "pair_id": number,
            }
            file.write(json.dumps(record) + "\n")
