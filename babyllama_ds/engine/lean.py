"""ZeRO-2's reduction and update, a bucket at a time: DeepSpeed's optimizer enters, and leaves doing
the same with fewer operators.

In every step and for every parameter, DeepSpeed copies the gradient into a bucket, adds it to what
this rank owns, looks whether it is finite, takes its norm, and points the parameter at its weights
again: some twenty operators a parameter, each a launch on a card, and Python around them. Of a
small model that is more than all of its arithmetic. Here they run for all parameters of a bucket,
or of a group, at once, and the numbers are the same to the bit. What is replaced, what is not and
what it gives: docs/decisions/host-overhead.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from babyllama_ds.spec.deepspeed import precision
from babyllama_ds.spec.deepspeed_file import ZeroBlock


def make_lean(zero: Any) -> None:
    """Let ZeRO-2's optimizer (`DeepSpeedZeroOptimizer`) work on whole buckets.

    Where its configuration is another than `can_be_lean` knows, it stays as it is.
    """
    if not can_be_lean(zero):
        return
    reduction = _Reduction(zero)
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero._grad_acc_hooks = list(reduction.hooks())
    zero.reduce_ipg_grads = reduction.reduce
    zero._build_compact_grad_partition_buffer = reduction.owned
    zero.scaled_global_norm = reduction.norm
    zero.unscale_and_clip_grads = reduction.clip
    zero.check_overflow = _leave_it_to_the_norm
    zero._update_model_bit16_weights = _stay_where_they_are


def can_be_lean(zero: Any) -> bool:
    """Whether this is ZeRO-2 as the shipped files have it, in bf16, gradients reduced whole."""
    num_groups = len(zero.bit16_groups)
    return (
        getattr(zero, "partition_gradients", False)
        and zero.gradient_accumulation_dtype == zero.communication_data_type == torch.float32
        and all(zero._use_compact_grad_partition_buffer(i) for i in range(num_groups))
        and zero.compute_grad_norm
        and zero.check_grad_overflow
        and zero.loss_scale == 1.0
        # The one may run beside the backward pass, the other sends only what a rank owns.
        and not (zero.overlap_comm or zero.reduce_scatter)
        and not (zero.cpu_offload or zero.has_moe_layers or zero.round_robin_gradients)
        and zero.model_parallel_group is None
        and not any(any(padding) for padding in zero.round_robin_bit16_padding)
    )


def is_lean(config: Mapping[str, Any]) -> bool:
    """What `can_be_lean` says of an engine of this configuration, where it is known before.

    With `parameter_alignment` it is known of the model: of one that needs no padding it says yes.
    """
    zero = ZeroBlock.model_validate(config["zero_optimization"])
    return (
        zero.stage == 2
        and precision(config) == "bf16"  # whose gradients are accumulated and reduced in fp32
        and not (zero.overlap_comm or zero.reduce_scatter)
        and zero.offload_optimizer is None
        and not zero.parameter_alignment
    )


@dataclass(frozen=True)
class _Place:
    """A parameter's gradient: its size, and what of it this rank owns."""

    size: int
    group: int
    slot: int | None
    """Its number among the group's owned pieces; none: nothing of it is owned."""
    start: int
    length: int


class _OwnedGradients(list[Tensor]):
    """The pieces of one flat gradient in the order of parameters, and last its padding, if any."""

    def __init__(self, pieces: Sequence[Tensor], flat_partition: Tensor) -> None:
        super().__init__(pieces)
        self.flat_partition = flat_partition
        """DeepSpeed's name: what the update is made of."""
        self.untouched = set(range(len(pieces)))
        """Pieces to which nothing has been added yet: still 0."""


@dataclass
class _Sums:
    """Tensors, and what is to be added to each."""

    of: list[Tensor] = field(default_factory=list)
    addends: list[Tensor] = field(default_factory=list)


class _Reduction:
    """Gradients as they come from the backward pass, and what becomes of them."""

    def __init__(self, zero: Any) -> None:
        from deepspeed import comm

        # What the optimizer holds does not hold the optimizer: it is freed when its engine is.
        self._zero = weakref.proxy(zero)
        self._comm = comm
        self._ranks = comm.get_world_size(group=zero.dp_process_group)
        self._rank = comm.get_rank(group=zero.dp_process_group)
        self._places = [
            list(self._placed(number, group)) for number, group in enumerate(zero.bit16_groups)
        ]
        self._lengths = [
            [place.length for place in places if place.slot is not None] for places in self._places
        ]
        self._waiting: list[tuple[Tensor, _Place]] = []
        self._elements = 0

    def hooks(self) -> Iterator[Any]:
        """On every parameter: its gradient waits for the bucket to be full."""
        for group, places in zip(self._zero.bit16_groups, self._places, strict=True):
            for parameter, place in zip(group, places, strict=True):
                yield self._hooked(parameter, place)

    def _hooked(self, parameter: nn.Parameter, place: _Place) -> Any:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None, "a hook on a gradient that was made"
            if self._elements + place.size > self._zero.reduce_bucket_size:
                self.reduce()
            self._waiting.append((parameter.grad, place))
            self._elements += place.size
            parameter.grad = None

        return parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    def _placed(self, number: int, group: Sequence[nn.Parameter]) -> Iterator[_Place]:
        """Where this rank's slice of the group, whose parameters lie in a row, begins and ends."""
        owned_from = self._rank * int(self._zero.partition_size[number])
        owned_to = owned_from + int(self._zero.partition_size[number])
        at = slot = 0
        for parameter in group:
            size = parameter.numel()
            start, stop = max(at, owned_from), min(at + size, owned_to)
            if start < stop:
                yield _Place(size, number, slot, start - at, stop - start)
                slot += 1
            else:
                yield _Place(size, number, None, 0, 0)
            at += size

    @torch.no_grad()
    def reduce(self) -> None:
        """Average what waits over ranks, in fp32, and add what this rank owns. A collective."""
        if not self._waiting:
            return
        places = [place for _, place in self._waiting]
        pieces = [gradient.reshape(-1) for gradient, _ in self._waiting]
        self._waiting, self._elements = [], 0
        if self._ranks > 1:
            flat = self._zero.gradient_reduction_w_predivide(_in_fp32(pieces), torch.float32)
            pieces = list(flat.split_with_sizes([place.size for place in places]))
        first, more = _Sums(), _Sums()
        for place, piece in zip(places, pieces, strict=True):
            if place.slot is None:
                continue
            gradients = self._gradients(place.group)
            sums = first if place.slot in gradients.untouched else more
            sums.of.append(gradients[place.slot])
            whole = place.length == place.size
            sums.addends.append(piece if whole else piece.narrow(0, place.start, place.length))
            gradients.untouched.discard(place.slot)
        if first.of:  # what is added to 0 is copied: half as much to read and to write
            torch._foreach_copy_(first.of, first.addends)
        if more.of:
            if self._ranks == 1:  # still bf16, of which each would be added by itself
                sizes = [addend.numel() for addend in more.addends]
                more.addends = list(_in_fp32(more.addends).split_with_sizes(sizes))
            torch._foreach_add_(more.of, more.addends)

    def _gradients(self, group: int) -> _OwnedGradients:
        """What was added since the last update."""
        gradients: _OwnedGradients | None = self._zero.averaged_gradients.get(group)
        if gradients is None:
            gradients = self._zero.averaged_gradients[group] = self.owned(group)
        return gradients

    def owned(self, group: int) -> _OwnedGradients:
        """This rank's slice of the gradient of a group of parameters, 0 so far."""
        size = int(self._zero.partition_size[group])
        device = self._zero.single_partition_of_fp32_groups[group].device
        flat = torch.zeros(size, dtype=torch.float32, device=device)
        lengths = self._lengths[group]
        padding = size - sum(lengths)
        sizes = [*lengths, padding] if padding else lengths
        return _OwnedGradients(flat.split_with_sizes(sizes), flat)

    @torch.no_grad()
    def norm(self, norm_type: int = 2) -> float:
        """The norm of the whole gradient, over all ranks; not finite where the gradient is not.

        Here the host waits for the device, once a step: DeepSpeed leaves out an update whose norm
        is not finite.
        """
        assert norm_type == 2, "what gradients are clipped by"
        squares = torch.stack([self._square(group) for group in range(len(self._places))])
        if self._ranks > 1:
            self._comm.all_reduce(squares, group=self._zero.dp_process_group)
        # By group, for the rounding that DeepSpeed's own has.
        return float(torch.linalg.vector_norm(squares.pow_(0.5)))

    def _square(self, group: int) -> Tensor:
        """The squared norm of what this rank owns of a group's gradient."""
        owned = self._gradients(group)[: len(self._lengths[group])]  # what follows is padding
        if not owned:
            return torch.zeros((), dtype=torch.float32, device=self._zero.device)
        norms = torch._foreach_norm(owned, 2.0, dtype=torch.float64)
        return torch.stack(norms).pow_(2.0).sum().float()

    @torch.no_grad()
    def clip(self, gradients: Sequence[Tensor], norm: float) -> None:
        """Scale the gradients down to the greatest norm, where there is one and theirs is above.

        By the factor that DeepSpeed makes of tensors, which below the greatest norm is 1: it reads
        and writes all gradients for that, too.
        """
        greatest = np.float32(self._zero.clip_grad)
        if not greatest > 0:
            return
        excess = (np.float32(norm) + np.float32(1e-6)) / greatest
        if excess > 1:
            for gradient in gradients:
                gradient.mul_(float(1 / excess))


def _in_fp32(pieces: list[Tensor]) -> Tensor:
    """Copies of flat tensors, in a row."""
    sizes = [piece.numel() for piece in pieces]
    flat = torch.empty(sum(sizes), dtype=torch.float32, device=pieces[0].device)
    torch._foreach_copy_(list(flat.split_with_sizes(sizes)), pieces)
    return flat


def _leave_it_to_the_norm(partition_gradients: bool = True) -> None:
    """DeepSpeed looks at every gradient, and then whether the norm of all is finite.

    A number that is not finite makes a norm that is not: the update is left out all the same, on
    every rank, and one wait for the device is spared.
    """


def _stay_where_they_are(group_index: int) -> None:
    """Parameters are views of the flat weights since the optimizer was made; nobody moves them."""
