"""How teachers, ensemble and student agree: states and heads enter, sums for logging leave.

All at T = 1, with teachers t_k, their ensemble p (mixed as for the loss) and the student q:

    teacher's CE           −log t_k(y)                      over labelled positions; the others:
    teacher to ensemble    KL(t_k ‖ p) = Σ t_k (log t_k − log p)             over valid positions
    agreement              t_k, q at argmax p are max t_k, max q
    entropy of targets     −Σ p log p
    ensemble to student    KL(p ‖ q) = Σ p (log p − log q)
    distance of teachers   total variation ½ Σ |t_j − t_k|, in [0, 1]

Chunk by chunk, as the loss does it: there is no graph, and no [N, V] tensor of any model.

Shapes: N positions (batch and time, flattened), C positions of a chunk, D hidden size (each model
its own), V vocabulary, K teachers, P pairs of them, 1 a dimension kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from babyllama_ds.losses.distillation import IGNORED_LABEL, TeacherStates
from babyllama_ds.losses.heads import Head, logits
from babyllama_ds.losses.mixture import MeanOf, Mixture, mix
from babyllama_ds.losses.voters import mixture_of

_CPU_CHUNK_BYTES = 2 * 2**20
_ACCELERATOR_CHUNK_BYTES = 64 * 2**20
"""Size of one fp32 [C, V], of which 3 + K are held: about what the loss holds at its own size."""


class Agreement(NamedTuple):
    """Sums over positions, in nats or counts, detached; fp32 (fp64 for fp64 models).

    A number that is not finite means that logits of some model at a counted position are not.
    """

    teacher_ce_K: Tensor
    teacher_kl_K: Tensor
    teacher_hits_K: Tensor
    """Positions at which the ensemble's likeliest token is one of the teacher's likeliest (in
    bf16 some logits are equal)."""
    distance_P: Tensor
    """The distance of each pair of teachers, in the order of `itertools.combinations`."""
    entropy: Tensor
    student_hits: Tensor
    student_kl: Tensor

    def plus(self, other: Agreement) -> Agreement:
        """The sums over the positions of both."""
        return Agreement(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


# One clean graph break, as for the loss.
@_disable_dynamo
@torch.no_grad()
def measure_agreement(
    student_hidden_ND: Tensor,
    student_head: Head,
    labels_N: Tensor,
    valid_N: Tensor,
    teachers: Sequence[TeacherStates],
    *,
    mean_of: MeanOf,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> Agreement:
    """The sums of the module's formulas; arguments as of `distillation_loss`.

    What lies at a position that is neither labelled nor valid has no effect, even NaN. It costs
    a forward pass through every head and some ten passes over each model's logits.
    """
    assert len(student_hidden_ND) > 0, "no positions at all"
    mixture = mixture_of(teachers, temperature=1.0, mean_of=mean_of)
    labelled_N1 = (labels_N != IGNORED_LABEL)[:, None]
    label_N1 = torch.where(labelled_N1, labels_N[:, None], 0)
    valid_N1 = valid_N[:, None]
    slices = _slices(student_hidden_ND, vocab_size, chunk_tokens)
    dtype = torch.promote_types(student_hidden_ND.dtype, torch.float32)
    # Used by every chunk: on a CPU, fresh memory would cost as much as the work on it.
    work_CV = [
        student_hidden_ND.new_empty(slices[0].stop, vocab_size, dtype=dtype)
        for _ in range(3 + len(teachers))
    ]
    return reduce(
        Agreement.plus,
        (
            _of_chunk(
                logits(student_hidden_ND[rows], student_head, vocab_size),
                [logits(t.hidden_ND[rows], t.head, vocab_size) for t in teachers],
                _Counted(label_N1[rows], labelled_N1[rows], valid_N1[rows]),
                mixture,
                [space_CV[: rows.stop - rows.start] for space_CV in work_CV],
            )
            for rows in slices
        ),
    )


@torch.no_grad()
def finite_positions(states: TeacherStates, *, vocab_size: int) -> Tensor:
    """Whether a teacher's logits of every token are finite, for each position: bool `[N]`."""
    return torch.cat(
        [
            logits(states.hidden_ND[rows], states.head, vocab_size).isfinite().all(-1)
            for rows in _slices(states.hidden_ND, vocab_size, None)
        ]
    )


def _slices(hidden_ND: Tensor, vocab_size: int, chunk_tokens: int | None) -> list[slice]:
    """The positions of each chunk, in order; the first is as long as any."""
    size_bytes = _CPU_CHUNK_BYTES if hidden_ND.device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    step = chunk_tokens or max(16, size_bytes // (4 * vocab_size))
    starts = range(0, len(hidden_ND), step)
    return [slice(start, min(start + step, len(hidden_ND))) for start in starts]


# -- one chunk ------------------------------------------------------------------------------------


class _Counted(NamedTuple):
    """The labels, and which positions count."""

    label_C1: Tensor
    labelled_C1: Tensor
    valid_C1: Tensor

    def over_labelled(self, values_C1: Tensor) -> Tensor:
        # Not a product: what lies at the other positions may be NaN.
        return values_C1.masked_fill(~self.labelled_C1, 0).sum()

    def over_valid(self, values_C1: Tensor) -> Tensor:
        return values_C1.masked_fill(~self.valid_C1, 0).sum()


def _of_chunk(
    student_CV: Tensor,
    teachers_CV: Sequence[Tensor],
    counted: _Counted,
    mixture: Mixture,
    work_CV: Sequence[Tensor],
) -> Agreement:
    """The sums over a chunk; `work_CV` holds 3 + K spaces, overwritten."""
    p_CV, log_p_CV, x_CV, *probs_CV = work_CV
    sum_C1 = mix(teachers_CV, mixture, out=p_CV, log_out=log_p_CV)
    p_CV.div_(sum_C1)
    log_p_CV.sub_(sum_C1.log())
    best_C1 = log_p_CV.argmax(-1, keepdim=True)
    negentropy_C1 = _row_sum(torch.mul(p_CV, log_p_CV, out=x_CV))

    ce, kl, hits = [], [], []
    for teacher_CV, t_CV in zip(teachers_CV, probs_CV, strict=True):
        log_sum_C1 = _softmax(teacher_CV, out=t_CV, shifted=x_CV)
        ce.append(counted.over_labelled(log_sum_C1 - x_CV.gather(-1, counted.label_C1)))
        hits.append(counted.over_valid(_is_largest(best_C1, x_CV)))
        kl_C1 = _row_sum(x_CV.sub_(log_p_CV).mul_(t_CV)) - log_sum_C1
        kl.append(counted.over_valid(kl_C1))
    distances = [
        counted.over_valid(_row_sum(torch.sub(one_CV, other_CV, out=x_CV).abs_()) / 2)
        for one_CV, other_CV in combinations(probs_CV, 2)
    ]
    log_sum_C1 = _softmax(student_CV, out=probs_CV[0], shifted=x_CV)
    student_hits = counted.over_valid(_is_largest(best_C1, x_CV))
    student_kl_C1 = negentropy_C1 - _row_sum(x_CV.mul_(p_CV)) + log_sum_C1
    return Agreement(
        teacher_ce_K=torch.stack(ce),
        teacher_kl_K=torch.stack(kl),
        teacher_hits_K=torch.stack(hits),
        distance_P=torch.stack(distances) if distances else p_CV.new_zeros(0),
        entropy=counted.over_valid(-negentropy_C1),
        student_hits=student_hits,
        student_kl=counted.over_valid(student_kl_C1),
    )


def _softmax(logits_CV: Tensor, *, out: Tensor, shifted: Tensor) -> Tensor:
    """Probabilities in `out`, logits less their row's maximum in `shifted`; log Σ exp of these."""
    shifted.copy_(logits_CV)
    shifted.sub_(shifted.amax(-1, keepdim=True))
    sum_C1 = _row_sum(torch.exp(shifted, out=out))
    out.div_(sum_C1)
    return sum_C1.log_()


def _is_largest(token_C1: Tensor, shifted_CV: Tensor) -> Tensor:
    """1 where the token's logit is its row's maximum."""
    return (shifted_CV.gather(-1, token_C1) == 0).to(shifted_CV.dtype)


def _row_sum(values_CV: Tensor) -> Tensor:
    return values_CV.sum(-1, keepdim=True)
