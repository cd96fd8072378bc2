"""How evaluation runs a model: token ids enter, the negative log-likelihood of each token leaves.

Shapes: B sequences, S positions, D width, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from babyllama_ds import ranks
from babyllama_ds.losses.distillation import cross_entropy_sum
from babyllama_ds.memory import sent
from babyllama_ds.models.documents import Pieces
from babyllama_ds.models.parts import split_causal_lm

T = TypeVar("T")

OnBatch = Callable[[int, int], None]
"""Called after each batch with (batches done, batches) of the rank that has most: for progress, and
to stop. What it raises on one rank is raised by all."""


@dataclass(frozen=True)
class Share:
    """Which batches this rank computes: those of its number, and every `count`-th after.

    Ranks that run one split model together have one number, the same batches in the same order,
    and only the first of them counts what came of it.
    """

    number: int
    count: int
    counts: bool = True

    @classmethod
    def of_rank(cls) -> Share:
        """Every rank by itself, with a whole model."""
        return cls(ranks.rank(), ranks.world_size())


def each_batch(batches: Sequence[T], score: Callable[[T], None], on_batch: OnBatch | None) -> None:
    """Score this rank's batches. After each of them all ranks meet, also those without one more.

    So what ends the work on one rank ends it on all within a batch: an error, or a request to stop
    that no other rank was told of. Nothing waits for the device: the ranks' hosts meet.
    """
    most = ranks.max_int(len(batches))

    def take(number: int) -> None:
        if number < len(batches):
            score(batches[number])
        if on_batch is not None:
            on_batch(number + 1, most)

    for number in range(most):
        ranks.on_every_rank(partial(take, number))


class Likelihood(Protocol):
    """Token ids [B, S] and, on the CPU, which next tokens count [B, S-1] to their NLL in nats, fp32
    [N]. Nothing waits for the device."""

    def __call__(
        self, tokens_BS: Tensor, counted_BT: Tensor, pieces: Pieces | None = None, /
    ) -> Tensor:
        """The NLL of each token that counts; `pieces`: of documents kept apart."""


@contextmanager
def likelihood_of(model: nn.Module, *, vocab_size: int) -> Iterator[Likelihood]:
    """The model's next-token likelihood, in eval mode and without gradients while open.

    Every module's own training mode is restored at the end: a frozen part of a model in training
    stays in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    backbone, head = split_causal_lm(model)

    def likelihood(
        tokens_BS: Tensor, counted_BT: Tensor, pieces: Pieces | None = None, /
    ) -> Tensor:
        # Only positions that count reach the head, so that padding costs no logits. Their numbers
        # are made here: how many there are, the device would have to be waited for to tell.
        row_N, column_N = counted_BT.nonzero(as_tuple=True)
        at_N = sent(row_N * tokens_BS.shape[1] + column_N, tokens_BS.device)
        nll_N: Tensor = cross_entropy_sum(
            backbone(tokens_BS, pieces).flatten(0, 1).index_select(0, at_N),
            head,
            tokens_BS.flatten().index_select(0, at_N + 1),
            vocab_size=vocab_size,
            chunk_tokens=None,
            per_token=True,
        )
        return nll_N

    model.eval()
    try:
        with torch.no_grad():
            yield likelihood
    finally:
        for module, training in modes:
            module.training = training
