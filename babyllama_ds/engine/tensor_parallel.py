"""Tensor parallelism of frozen models: a model and ranks enter; a share of it on each rank leaves.

Ranks are taken in groups of N consecutive ones. DeepSpeed's AutoTP splits each linear layer of a
group's model: those that widen by rows, each rank keeping some heads and some inner columns; those
that narrow by columns, after which an all-reduce in the group sums what the ranks have. Embeddings,
norms and the head are whole on every rank, and so are the states after each layer.

A group computes one forward pass together, so all of its ranks must see the same windows. Ranks
that train bring windows of their own: they are gathered, run at once, and each keeps its share.

    ids of every rank [B, S] → the group's [N · B, S] → states [N · B, S, D] → one's own [B, S, D]

Shapes: N ranks of a group, B windows of a rank, S positions, D width.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from babyllama_ds import ranks
from babyllama_ds.engine.precision import float_buffers_kept
from babyllama_ds.models.documents import Pieces


@dataclass(frozen=True)
class RankGroup:
    """The ranks over which a model is split, as one of them sees them."""

    size: int
    """N."""
    index: int
    """This rank among them, from 0."""
    number: int
    """This group among all, from 0."""
    count: int
    """Groups in all."""
    device: torch.device
    """Where tensors are that its collectives carry."""
    members: dist.ProcessGroup

    def gathered(
        self, input_ids_BS: Tensor, pieces: Pieces | None = None
    ) -> tuple[Tensor, Pieces | None]:
        """The windows of all its ranks, [N · B, S], rank by rank. One collective, of ids.

        Each rank brings as many. Of pieces the positions travel along; their bounds, which only
        kernels read that are told lengths, do not.
        """
        sent = input_ids_BS
        if pieces is not None:
            sent = torch.stack([input_ids_BS, pieces.positions_BS.to(input_ids_BS.dtype)])
        received = sent.new_empty(self.size * sent.shape[0], *sent.shape[1:])
        dist.all_gather_into_tensor(received, sent.contiguous(), group=self.members)
        if pieces is None:
            return received, None
        ids, positions = received.view(self.size, *sent.shape).transpose(0, 1).flatten(1, 2)
        return ids, Pieces(positions.to(torch.int32), sent.new_empty(0), longest=0)

    def own(self, of_all: Tensor) -> Tensor:
        """This rank's share of what was computed for all: [N · B, …] to [B, …].

        A copy, so that what the others asked for is freed.
        """
        return of_all.chunk(self.size)[self.index].clone()


# (world, its groups by size): a new world needs new groups.
_groups: tuple[dist.ProcessGroup, dict[int, RankGroup]] | None = None


def rank_group(size: int, device: torch.device) -> RankGroup:
    """The group of `size` consecutive ranks that this rank is in.

    A collective of all ranks the first time that a size is asked for; kept for the process group's
    life, so that teachers split alike share one communicator.
    """
    global _groups
    world = dist.group.WORLD
    assert world is not None, "no process group"
    assert ranks.world_size() % size == 0, "checked before (models.splitting)"
    if _groups is None or _groups[0] is not world:
        _groups = (world, {})
    by_size = _groups[1]
    if size not in by_size:
        by_size[size] = _made(size, device)
    return by_size[size]


def forget_groups() -> None:
    """Let go of all groups, for whoever destroys the process group."""
    global _groups
    _groups = None


def _made(size: int, device: torch.device) -> RankGroup:
    count, rank = ranks.world_size() // size, ranks.rank()
    # Each rank makes all groups, in the same order: so torch has it.
    groups = [
        dist.new_group(list(range(first * size, (first + 1) * size))) for first in range(count)
    ]
    number, index = divmod(rank, size)
    return RankGroup(size, index, number, count, device, groups[number])


class _Unit:
    """How DeepSpeed asks which ranks share a model.

    Asked for a number alone it would take ranks 0 … N - 1, for all engines of a process.
    """

    def __init__(self, members: dist.ProcessGroup) -> None:
        self._members = members

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._members


def split(
    module: nn.Module, model: nn.Module, group: RankGroup, *, dtype: torch.dtype
) -> nn.Module:
    """The inference engine of `module`, whose part `model` is split over the group, in place.

    The model comes on the CPU: each layer's share moves to the device as it is cut, and what is
    whole last, so that no device ever holds more than its share. A collective of all ranks:
    DeepSpeed gives every rank the state of rank 0's random numbers, which is undone here.
    """
    import deepspeed

    cards = [group.device] if group.device.type == "cuda" else []
    told_on_stdout = io.StringIO()
    with (
        torch.random.fork_rng(devices=cards),
        float_buffers_kept(model),
        redirect_stdout(told_on_stdout),
    ):
        engine: nn.Module = deepspeed.init_inference(
            module,
            dtype=dtype,
            tensor_parallel={
                "tp_size": group.size,
                "tp_group": group.members,
                "mpu": _Unit(group.members),
            },
        )
    return engine.eval().requires_grad_(False)
