"""Which files a corpus names, and what their names say of them.

Enters: paths and globs. Leaves: files in the order in which they are read, each known by its name
to be text or a table, packed or not. `checking` reads them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from babyllama_ds.corpus.streams import Split
from babyllama_ds.errors import DataError, Problem

Form = Literal["text", "jsonl", "csv", "parquet"]
Packing = Literal["gz", "xz", "zst"]

TEXT_SUFFIXES = (".txt", ".train", ".dev")
FORMS: dict[str, Form] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
"""What a file holds, by its suffix."""
PACKINGS: tuple[Packing, ...] = ("gz", "xz", "zst")


def find_files(
    train: Sequence[str], dev: Sequence[str] = (), *, key: str = "corpus"
) -> list[tuple[Split, Path]]:
    """The files that the patterns of a corpus name, pattern by pattern, each one's matches sorted.

    `~` is the home directory; relative patterns start at the working directory; `**` crosses
    folders. A file matched twice is taken once. `key` is the corpus's place in the job. Raises
    `DataError` with every problem.
    """
    found: dict[Path, tuple[Split, Path]] = {}
    problems: list[Problem] = []
    patterns: list[tuple[Split, str]] = [("train", pattern) for pattern in train]
    patterns += [("dev", pattern) for pattern in dev]
    for split, pattern in patterns:
        where = split_key(key, split)
        paths = _expand(pattern)
        if not paths:
            problems.append(_nothing_matches(where, pattern))
        for path in paths:
            first_split, _ = found.setdefault(_identity(path), (split, path))
            if first_split != split:
                problems.append(_in_both_splits(where, path))
            elif (got := _not_a_text_file(path)) is not None:
                problems.append(_wrong_file(where, path, got))
    if problems:
        raise DataError.all_of(problems)
    return list(found.values())


def split_key(key: str, split: Split) -> str:
    """The key path that names the files of a split."""
    return f"{key}.train" if split == "train" else f"{key}.split.dev"


def packing_of(path: Path) -> Packing | None:
    """How a file is packed, by its name."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in PACKINGS else None


def form_of(path: Path) -> Form | None:
    """What a file holds, by its name; none: nothing that is read here."""
    form = FORMS.get(_unpacked(path).suffix.lower())
    return None if form == "parquet" and packing_of(path) else form


def domain_of(path: Path) -> str:
    """The file's name without its suffixes: `childes.train.gz`, `childes.dev.jsonl` → `childes`."""
    name = Path(_unpacked(path).stem)
    while form_of(path) not in ("text", None) and name.suffix.lower() in TEXT_SUFFIXES:
        name = name.with_suffix("")
    return name.name


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if packing_of(path) else path


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if os.path.lexists(path):  # a name may hold glob characters
        return [path]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob: no absolute patterns
    return sorted(map(Path, matches))


def _identity(path: Path) -> Path:
    """What two names of one file have in common; a link that leads nowhere is itself."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return path.absolute()


def _not_a_text_file(path: Path) -> str | None:
    if path.is_dir():
        return "a directory"
    if form_of(path) is None:
        suffixes = _unpacked(path).suffix + (path.suffix if packing_of(path) else "")
        return f"a file called *{suffixes}" if suffixes else "a file without a suffix"
    if path.exists() and not path.is_file():
        return "something that is not a regular file"
    return None


def _nothing_matches(where: str, pattern: str) -> Problem:
    return Problem(
        where=where,
        got=f"{pattern!r}, which matches nothing from {Path.cwd()}",
        expected="the path of a file, or a glob that matches one",
        hint="relative paths start at the directory where the command runs",
    )


def _wrong_file(where: str, path: Path, got: str) -> Problem:
    tables = [suffix for suffix, form in FORMS.items() if form != "text"]
    hint = None
    if path.is_dir():
        hint = f"narrow the pattern, for instance to {path / '*.txt'}"
    elif packing_of(path) and _unpacked(path).suffix.lower() == ".parquet":
        hint = "parquet is compressed in itself: unpack the file"
    return Problem(
        where=where,
        got=f"{path}, {got}",
        expected=f"text files ({' '.join(TEXT_SUFFIXES)}) or tables ({' '.join(tables)}), all but "
        f"parquet also compressed ({' '.join(f'.{packing}' for packing in PACKINGS)})",
        hint=hint,
    )


def _in_both_splits(where: str, path: Path) -> Problem:
    return Problem(
        where=where,
        got=f"{path}, which is also a training file",
        expected="development text that no model is trained on",
    )
