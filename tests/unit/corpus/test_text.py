"""The nursery's folder as files."""

from __future__ import annotations

from pathlib import Path

from babyllama_ds.corpus.sources import iter_text, read_sources
from babyllama_ds.corpus.text import nursery_files


def test_nursery_folder_is_read_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "runs [1]" / "ab12"  # characters of a glob
    for split in ("train", "dev"):
        (folder / split).mkdir(parents=True)
        (folder / split / f"nursery.{split}").write_text(f"a  {split} scene .\n\n")
    (folder / "pairs").mkdir()
    (folder / "pairs" / "agreement.jsonl").write_text("{}\n")

    sources = read_sources(nursery_files(folder))

    for split in ("train", "dev"):
        (domain, lines) = next(iter_text(sources, split))
        assert (domain, list(lines)) == ("nursery", [f"a  {split} scene .\n", "\n"])
