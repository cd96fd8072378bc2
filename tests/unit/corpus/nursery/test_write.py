"""The corpus on disk: the same bytes everywhere, the length that was asked for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from babyllama_ds.corpus.nursery.write import sentences_in, write_nursery, write_scenes
from babyllama_ds.errors import Stopped

SMALL = {"words": 2_000, "dev_words": 400, "pairs_per_task": 12, "seed": 3}
PINNED = "9e7859432c7126800fe561f12daaa76bcb3503c3e2258170a1666b0060984654"
"""Another value needs another `NURSERY_VERSION`."""


def digest(directory: Path) -> str:
    """One hash of every file's path and bytes."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        total.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    write_nursery(tmp_path / "here", **SMALL)
    assert digest(tmp_path / "here") == PINNED
    write_nursery(tmp_path / "again", **SMALL)
    assert digest(tmp_path / "again") == PINNED
    write_nursery(tmp_path / "other", **(SMALL | {"seed": 4}))
    assert digest(tmp_path / "other") != PINNED


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_bytes_do_not_depend_on_string_hashing(tmp_path: Path, hash_seed: str) -> None:
    program = (
        "import pathlib, sys; from babyllama_ds.corpus.nursery.write import write_nursery; "
        f"write_nursery(pathlib.Path(sys.argv[1]), **{SMALL})"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, check=True)
    assert digest(tmp_path) == PINNED


@pytest.mark.parametrize(("words", "dev_words"), [(5_000, 2_000), (20_000, 3_000)])
def test_lengths_are_met(tmp_path: Path, words: int, dev_words: int) -> None:
    write_nursery(tmp_path, words=words, dev_words=dev_words, pairs_per_task=2, seed=1)
    for name, wanted in (("train", words), ("dev", dev_words)):
        text = (tmp_path / name / f"nursery.{name}").read_text(encoding="utf-8")
        assert abs(len(text.split()) - wanted) <= 0.02 * wanted
        assert text.endswith("\n")
        assert "\n\n" not in text


def test_a_longer_text_begins_with_the_shorter_one(tmp_path: Path) -> None:
    for words in (500, 3_000):
        write_scenes(tmp_path / str(words), "seed", words, training=True)
    short, long = ((tmp_path / name).read_text(encoding="utf-8") for name in ("500", "3000"))
    assert long.startswith(short)
    assert len(long) > 4 * len(short)


def test_a_long_text_can_be_stopped(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        write_nursery(tmp_path, **SMALL, check=stop)


def test_there_is_always_a_scene(tmp_path: Path) -> None:
    write_scenes(tmp_path / "text", "seed", 1, training=True)
    assert len((tmp_path / "text").read_text(encoding="utf-8").splitlines()) == 1


def test_train_and_dev_share_no_scene(tmp_path: Path) -> None:
    write_nursery(tmp_path, words=5_000, dev_words=5_000, pairs_per_task=2, seed=1)
    train, dev = (
        set((tmp_path / name / f"nursery.{name}").read_text(encoding="utf-8").splitlines())
        for name in ("train", "dev")
    )
    assert not train & dev


def test_sentences_are_found_whole_and_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(
        'Tom runs. "I run. Do you?" said Tom. He ran.\n"Look!" said Ben.\n'
    )
    wanted = {"Tom runs.", "He ran.", "I run.", "Do you?", "ran.", "Tom", "Look!", "Ben runs."}
    assert sentences_in(tmp_path / "text", wanted) == {
        "Tom runs.", "He ran.", "I run.", "Do you?", "Look!",
    }  # fmt: skip
