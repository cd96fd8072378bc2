"""The nursery's folder seen as text files, so that one path leads from any text to tokens.

Enters: the directory that `nursery.write` filled. Leaves: the `FilesCorpus` that describes it,
for `sources.read_sources`.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Literal

from babyllama_ds.spec.corpus import FilesCorpus, HeldOutFiles


def nursery_files(directory: Path, documents: Literal["none", "lines"] = "none") -> FilesCorpus:
    """The corpus made of `directory`'s `train/*.train` and `dev/*.dev`, taken as they are."""
    root = glob.escape(str(directory))
    return FilesCorpus(
        kind="files",
        train=(f"{root}/train/*.train",),
        split=HeldOutFiles(kind="held_out", dev=(f"{root}/dev/*.dev",)),
        cleaning="none",
        documents=documents,
    )
