"""Evaluations in the store: a key and the work of measuring enter, the measurement leaves.

`<runs>/store/evaluations/<key>/evaluation.json` is what a model was measured to be, without its
name, which is a run's own: ten runs that share a teacher evaluate it once. An entry is checked
against its manifest each time it is found; one that is damaged is told of and measured anew.
What a suite's fine-tunings came to lies in `classifiers` likewise, one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from typing import Any

from babyllama_ds import files, ranks
from babyllama_ds.errors import RunError
from babyllama_ds.fingerprints import classifier_fingerprint
from babyllama_ds.store import Store

logger = logging.getLogger(__name__)

KIND, CLASSIFIERS = "evaluations", "classifiers"
FILE = "evaluation.json"

Measure = Callable[[], dict[str, Any]]
Steps = Generator[None, None, dict[str, Any]]
"""Work of many steps, and what it comes to."""
Remember = Callable[[str, Callable[[], Steps]], Steps]
"""What is known of a training by its fingerprint; or the work, done now."""


def store_key(fingerprint: str, *, device: str, attention: str, tensor_parallel: int = 1) -> str:
    """Where the measurement of a `fingerprint` lies that was made on such a device and kernel, of a
    model split over so many ranks.

    All change how numbers are rounded, so models that are compared are measured on the same. How
    many ranks share the work, and how much of it is in a batch, is not in the key.
    """
    split = [tensor_parallel] if tensor_parallel > 1 else []
    return files.hash_json([fingerprint, device, attention, *split])


def stored_evaluation(store: Store, key: str, measure: Measure, *, name: str) -> dict[str, Any]:
    """What `measure` gives, made once under its key however many runs ask; called by every rank.

    The result begins with the `name` that the model has here.

    Raises:
        RunError: the disk refuses; and whatever `measure` raises.
    """
    with ranks.held_by_rank_zero(store.lock(KIND, key)):
        found = ranks.on_rank_zero(lambda: _read(store, KIND, key))
        if found is None:
            measured = measure()
            ranks.on_rank_zero(lambda: _publish(store, KIND, key, _nameless(measured)))
        else:
            logger.info("evaluation of %s: the same was measured before, found in the store", name)
            measured = found
    return {"model": name, **_nameless(measured)}


def remembering(
    store: Store, weights: Mapping[str, str], tokenizer: str, *, device: str, attention: str
) -> Remember:
    """How each rank, by itself, keeps what each fine-tuning comes to: done once under its key.

    So a run that is ended within a suite's hours goes on with the training that it was at.
    `weights` are the model's hashes, `tokenizer` is its fingerprint. What it gives may raise
    `RunError` (the disk refuses), and whatever the work raises.

    A wait for another run is made of steps, too, between which the ranks meet: of two runs, each
    may have what the other waits for, and would never let go of it while its ranks wait.
    """

    def remember(training: str, learn: Callable[[], Steps]) -> Steps:
        fingerprint = classifier_fingerprint(weights, training, tokenizer)
        key = store_key(fingerprint, device=device, attention=attention)
        with (yield from store.lock_in_steps(CLASSIFIERS, key)):
            found = _read(store, CLASSIFIERS, key)
            if found is None:
                found = yield from learn()
                _publish(store, CLASSIFIERS, key, found)
            else:
                logger.info("%s/%s: learnt before, found in the store", CLASSIFIERS, key[:12])
        return found

    return remember


def _read(store: Store, kind: str, key: str) -> dict[str, Any] | None:
    """The entry; none when there is none, or none that can be trusted."""
    entry = store.root / kind / key
    if not entry.exists():
        return None
    try:
        found = store.find(kind, key)
        if found is not None:
            files.verify_manifest(found)
            return dict(files.read_json(found / FILE))
        what = "no manifest of this entry"
    except RunError as error:
        what = "; ".join(f"{problem.where}: {problem.got}" for problem in error.problems)
    logger.warning("%s is damaged (%s): it is measured anew", entry, what)
    return None


def _publish(store: Store, kind: str, key: str, measured: dict[str, Any]) -> None:
    directory = store.new_directory(kind, key)
    files.write_json(directory / FILE, measured)
    store.publish(kind, key, directory)


def _nameless(measured: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in measured.items() if key != "model"}
