"""What a cache was made from, hashed: the same key, the same records.

Enters: the token shards, the windows, the teachers. Leaves: the key of an entry of the store. A
cache of other teachers or other data has another key, so it is never found.

Not in a key: ranks, micro-batch and device. They change the rounding of a bf16 forward pass, as
they do for live teachers, and no more. The attention kernel and the ranks that a teacher is split
over do so too, but are of the job's own choosing: another choice is not answered with this one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from babyllama_ds import files
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.fingerprints import weight_hashes
from babyllama_ds.spec.distillation import DistillationSpec

FORMAT = 3
"""Raised when records or shards are laid out in another way, or teachers computed in another.

2: the modules of `models.fused` round otherwise than those of transformers.
3: the logits of teachers with equal votes are rounded summed, not apart (`losses.voters`).
"""


def hidden_key(
    tokens_dir: Path,
    windows: TrainWindows,
    teacher_dir: Path,
    *,
    dtype: torch.dtype,
    attention: str,
    tensor_parallel: int = 1,
) -> str:
    """The key of one teacher's final hidden states of every distinct window."""
    return files.hash_json(
        {
            "format": FORMAT,
            "tokens": _training_tokens(tokens_dir),
            "length": windows.length,
            "phases": windows.num_phases,
            # Where windows are whole, as keys were before there was a choice.
            **({"attention within": "documents"} if windows.within_documents else {}),
            "weights": weight_hashes(teacher_dir),
            "config": files.sha256_file(teacher_dir / "config.json"),
            "dtype": str(dtype),
            "attention": attention,
            # Where teachers are whole, as keys were before there was a choice.
            **({"tensor parallel": tensor_parallel} if tensor_parallel > 1 else {}),
        }
    )


def topk_key(
    members: Sequence[tuple[str, float]], loss: DistillationSpec, *, vocab_size: int
) -> str:
    """The key of the ensemble's likeliest tokens; `members`: (`hidden_key`, weight), in order."""
    total = sum(weight for _, weight in members)
    return files.hash_json(
        {
            "format": FORMAT,
            "members": [[key, weight / total] for key, weight in members],
            "mean_of": loss.mean_of,
            "temperature": loss.fixed_temperature,
            "top_k": loss.cache_top_k,
            "vocabulary": vocab_size,
        }
    )


def _training_tokens(tokens_dir: Path) -> dict[str, list[str | int]]:
    """The training shards by content; the size settles the width of a token."""
    return {
        name: [facts.sha256, facts.bytes]
        for name, facts in files.manifest_of(tokens_dir).files.items()
        if name.startswith("train-")
    }
