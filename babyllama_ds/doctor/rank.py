"""One rank of a world that the doctor starts: `python -m babyllama_ds.doctor.rank FOLDER DEVICE`.

Enters: the rendezvous environment. Leaves: `collectives.json` and the traces of the proof's cases,
written into FOLDER by rank 0 one after another, so that what was done before a death stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from babyllama_ds import files, ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.proof.models import CASES, COMPILED_CASES
from babyllama_ds.engine.proof.sharded import trace_cases

COLLECTIVES = "collectives.json"
ELEMENTS = 100_003
"""Elements a rank receives; an odd number of them."""


def main() -> None:
    """Join the other ranks, try the collectives, train every case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = distributed.start(arguments.device)
    wrong = sorted(
        {each for found in ranks.gather_objects(list(_wrong_sums(device))) for each in found}
    )
    ranks.on_rank_zero(lambda: files.write_json(arguments.folder / COLLECTIVES, wrong))
    trace_cases(CASES, arguments.folder, device)
    if arguments.compile:
        trace_cases(COMPILED_CASES, arguments.folder, device)
    distributed.stop()


def _wrong_sums(device: torch.device) -> Iterator[str]:
    """The collectives whose result on this rank is not the sum over ranks (collective)."""
    num_ranks = ranks.world_size()
    # Whole numbers, so that every order of summation gives the same.
    position = torch.arange(num_ranks * ELEMENTS, device=device) % 1_000
    mine = (position * (ranks.rank() + 1)).float()
    expected = (position * (num_ranks * (num_ranks + 1) // 2)).float()
    share = expected.chunk(num_ranks)[ranks.rank()]
    if not torch.equal(_all_reduced(mine), expected):
        yield f"all-reduce on rank {ranks.rank()}"
    if not torch.equal(_reduce_scattered(mine), share):
        yield f"reduce-scatter on rank {ranks.rank()}"


def _all_reduced(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _reduce_scattered(tensor: Tensor) -> Tensor:
    received = tensor.new_empty(len(tensor) // ranks.world_size())
    dist.reduce_scatter_tensor(received, tensor)
    return received


if __name__ == "__main__":
    main()
