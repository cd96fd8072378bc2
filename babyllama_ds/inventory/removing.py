"""What is to go is taken away: items enter; they leave, under their locks, and nothing half.

What a run uses, or a process holds, stays: whether it does is looked at again under the lock, as a
run may have begun since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from babyllama_ds.errors import Problem, RunError
from babyllama_ds.inventory.entries import SHORT, Item
from babyllama_ds.inventory.uses import Uses, read_uses
from babyllama_ds.spec.explain import closest
from babyllama_ds.store import Store, in_use

AT_ONCE = 100
"""Locks held together, each an open file: users are looked at once for all of them."""


def named_items(items: Sequence[Item], uses: Uses, words: Sequence[str]) -> list[Item]:
    """The items that `--remove` names by the beginnings of their keys.

    Raises:
        RunError: naming every word that fits no key or several, and every item in use.
    """
    found: dict[Item, None] = {}
    problems: list[Problem] = []
    for word in words:
        fitting = [item for item in items if word and item.key.startswith(word)]
        if len({item.key for item in fitting}) == 1:
            found |= dict.fromkeys(fitting)
        else:
            problems.append(_not_one(word, fitting, items))
    for item in found:
        if item.holder is not None:
            problems += in_use(item.folders[0], item.holder).problems
        else:
            problems += _used(item, uses)
    if problems:
        raise RunError.all_of(problems)
    return list(found)


def _not_one(word: str, fitting: Sequence[Item], items: Sequence[Item]) -> Problem:
    names = list(dict.fromkeys(item.name for item in fitting))
    near = closest(word[:SHORT], (item.key[:SHORT] for item in items))
    if names:
        got, hint = f"the beginning of {len(names)} keys: {', '.join(names)}", "give more of it"
    else:
        got, hint = "the beginning of no key", "`babyllama-ds store` lists them"
        hint = f"did you mean `{near}`? {hint}" if near else hint
    return Problem(where=f"--remove {word}", got=got, expected="that of one key", hint=hint)


def _used(item: Item, uses: Uses) -> Iterator[Problem]:
    """Why an item is to stay, if it is."""
    known, perhaps = ", ".join(uses.known(item)), ", ".join(uses.perhaps(item))
    if known or perhaps:
        yield Problem(
            where=str(item.folders[0]),
            got=f"used by {known}" if known else f"perhaps used by {perhaps}, not done yet",
            expected="one that no run uses",
            hint="remove the folder of each of these runs first"
            + ("" if known else ", or let it end"),
        )


def remove(store: Store, runs: Path, items: Sequence[Item]) -> Iterator[Item]:
    """Remove items, each told when it is gone.

    Raises:
        RunError: a run or a process has come to use one since, or the disk refuses.
    """
    for first in range(0, len(items), AT_ONCE):
        some = items[first : first + AT_ONCE]
        with ExitStack() as stack:
            for kind, key in sorted({(item.kind, item.key) for item in some}):
                stack.enter_context(store.lock(kind, key, to_remove=True))
            uses = read_uses(runs)
            if problems := [problem for item in some for problem in _used(item, uses)]:
                raise RunError.all_of(problems)
            for item in some:
                _remove(store, item)
                yield item


def _remove(store: Store, item: Item) -> None:
    for folder in item.folders:
        if not folder.exists():  # entering the lock removes what dead processes left
            continue
        try:
            store.discard(item.key, folder)
        except OSError as error:
            raise RunError.of(
                error.filename or folder,
                got=error.strerror or str(error),
                expected="a file that can be removed",
                hint="mend that and remove it again: what is left of it counts as unfinished",
            ) from error
