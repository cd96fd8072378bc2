"""The ensemble's k most likely tokens at every position, computed once: small, an approximation.

    L·K·(4 + 2) bytes a window of L tokens: log-probabilities in fp32, token ids in 16 bits
    (in 32 for a vocabulary above 65,536), however many teachers there are

Enters: teachers, windows and the loss. Leaves: an ensemble whose targets are `TopKTargets`, all
other tokens one bucket (`losses.topk`), and, at the end, how far that is from the exact loss.

Shapes: B windows, S positions, N = B * S, K tokens kept, D width, R bytes of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from babyllama_ds import ranks
from babyllama_ds.losses.distillation import IGNORED_LABEL, distillation_loss
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.topk import TopKTargets, top_k_targets
from babyllama_ds.losses.voters import TeacherStates
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.cache.build import Compute
from babyllama_ds.teachers.cache.key import topk_key
from babyllama_ds.teachers.cache.layout import Layout, padded_bytes
from babyllama_ds.teachers.cache.opening import CacheContext, Wanted, open_cache
from babyllama_ds.teachers.cache.records import Records
from babyllama_ds.teachers.cache.sources import (
    Teacher,
    TeacherInput,
    lent,
    not_finite,
    pieces_of,
    states_of,
)
from babyllama_ds.teachers.ensemble import Ensemble, Windows
from babyllama_ds.teachers.watch import broken_windows

SAMPLE_WINDOWS = 64
"""Windows on which the error is measured, evenly spaced."""


@dataclass(frozen=True)
class TopKError:
    """What the approximation costs, at the student's final weights."""

    windows: int
    """Windows of the sample."""
    exact_kl: float
    """KL(teachers ‖ student) at the job's temperature, nats a token."""
    topk_kl: float
    """The same from the cache: never larger, but for rounding."""
    relative_kl_error: float
    gradient_cosine: float
    """Between the two gradients of the KL, with respect to the student's hidden states."""


class TopKEnsemble(Ensemble):
    """The ensemble as a distribution over k tokens and the rest; its members are not there."""

    def __init__(
        self,
        records: Records,
        loss: DistillationSpec,
        teachers: Sequence[Teacher],
        seen: TeacherInput,
        device: torch.device,
    ) -> None:
        super().__init__([])
        self._records, self._loss, self._teachers = records, loss, teachers
        self._seen, self._device = seen, device

    def targets(self, windows: Windows) -> TopKTargets:
        """The most likely tokens of every position, for `distillation_loss`."""
        found = self._remembered(windows.windows_B)
        self._records.expect(windows.next_windows_B)
        return found

    def closing_facts(self, student: nn.Module) -> dict[str, Any]:
        """`topk`: how far the targets are from the exact ones. A collective."""
        error = _measure_error(
            student, self._remembered, self._loss, self._teachers, self._seen, self._device
        )
        return {"topk": {"k": self._loss.cache_top_k, **asdict(error)}}

    def destroy(self) -> None:
        """Free the records."""
        self._records.close()

    def _remembered(self, numbers_B: NDArray[np.int64]) -> TopKTargets:
        return unpacked(
            self._records.read(numbers_B),
            k=self._loss.cache_top_k,
            num_positions=self._seen.windows.length,
            vocab_size=self._seen.vocab_size,
        )


def remember_top_k(
    loss: DistillationSpec,
    teachers: Sequence[Teacher],
    seen: TeacherInput,
    context: CacheContext,
) -> TopKEnsemble:
    """The ensemble's most likely tokens, from the store or computed now. A collective.

    Raises:
        ModelError: states or logits that are not finite, with the teacher and the windows.
        MachineError, RunError, Stopped: as `open_cache`.
    """
    keys = ranks.on_rank_zero(lambda: [(seen.key(one), one.weight) for one in teachers])
    wanted = Wanted(
        name="cache of the ensemble",
        key=topk_key(keys, loss, vocab_size=seen.vocab_size),
        layout=Layout.choose(
            num_windows=seen.num_windows,
            record_bytes=record_bytes(loss.cache_top_k, seen.windows.length, seen.vocab_size),
            forward_windows=seen.forward_windows,
        ),
        made_of={"holds": "topk", "k": loss.cache_top_k, "length": seen.windows.length},
        in_step=any(one.tensor_parallel > 1 for one in teachers),
    )
    with lent(teachers) as load:

        def make_compute() -> Compute:
            models = load()

            def compute(numbers_B: NDArray[np.int64]) -> Tensor:
                states = [
                    TeacherStates(
                        states_of(teacher, model, seen.windows, numbers_B, context.device).flatten(
                            0, 1
                        ),
                        model.head,
                        teacher.weight,
                    )
                    for teacher, model in zip(teachers, models, strict=True)
                ]
                _check_logits(teachers, states, numbers_B, seen.vocab_size)
                targets = top_k_targets(
                    states,
                    k=loss.cache_top_k,
                    temperature=loss.fixed_temperature,
                    mean_of=loss.mean_of,
                    vocab_size=seen.vocab_size,
                    chunk_tokens=loss.chunk_tokens,
                )
                return packed(targets, len(numbers_B), seen.vocab_size)

            return compute

        records = open_cache(wanted, context, make_compute)
    return TopKEnsemble(records, loss, teachers, seen, context.device)


def _check_logits(
    teachers: Sequence[Teacher],
    states: Sequence[TeacherStates],
    numbers_B: NDArray[np.int64],
    vocab_size: int,
) -> None:
    """Raise a `ModelError` where states are finite and logits are not.

    All logits, as for live teachers: one of -inf leaves the k likeliest finite.
    """
    everywhere_N = states[0].hidden_ND.new_ones(len(states[0].hidden_ND), dtype=torch.bool)
    broken_KB = broken_windows(states, everywhere_N, len(numbers_B), vocab_size=vocab_size)
    for teacher, broken_B in zip(teachers, broken_KB, strict=True):
        if broken_B.any():
            raise not_finite("logits", teacher, numbers_B[broken_B])


# -- records --------------------------------------------------------------------------------------


def record_bytes(k: int, num_positions: int, vocab_size: int) -> int:
    """The size of a window's record."""
    return padded_bytes(num_positions * k * (4 + _id_dtype(vocab_size).itemsize))


def packed(targets: TopKTargets, num_windows: int, vocab_size: int) -> Tensor:
    """Records [B, R]: all log-probabilities of a window, then all ids, then padding."""
    log_probs = targets.log_probs_NK.to(torch.float32).view(num_windows, -1).view(torch.uint8)
    # Ids above 32,767 wrap to negative numbers, and back in `unpacked`.
    ids = targets.token_ids_NK.to(_id_dtype(vocab_size)).view(num_windows, -1).view(torch.uint8)
    size = log_probs.shape[1] + ids.shape[1]
    return torch.cat([log_probs, ids, ids.new_zeros(num_windows, padded_bytes(size) - size)], dim=1)


def unpacked(records_BR: Tensor, *, k: int, num_positions: int, vocab_size: int) -> TopKTargets:
    """The targets of the windows' positions; ids int32."""
    dtype, number = _id_dtype(vocab_size), num_positions * k
    log_probs = records_BR[:, : 4 * number].view(torch.float32)
    ids = records_BR[:, 4 * number : (4 + dtype.itemsize) * number].view(dtype)
    ids = ids.to(torch.int32)
    if dtype == torch.int16:
        ids = ids & 0xFFFF
    return TopKTargets(ids.reshape(-1, k), log_probs.reshape(-1, k))


def _id_dtype(vocab_size: int) -> torch.dtype:
    return torch.int16 if vocab_size <= 2**16 else torch.int32


# -- the error ------------------------------------------------------------------------------------


def _measure_error(
    student: nn.Module,
    remembered: Callable[[NDArray[np.int64]], TopKTargets],
    loss: DistillationSpec,
    teachers: Sequence[Teacher],
    seen: TeacherInput,
    device: torch.device,
) -> TopKError:
    """On windows of the training text, evenly spaced, micro-batch by micro-batch."""
    number = min(SAMPLE_WINDOWS, seen.num_windows)
    sample = np.arange(number, dtype=np.int64) * seen.num_windows // number
    parts = np.array_split(sample, -(-number // seen.forward_windows))
    exact = [_states_of_parts(teacher, seen, parts, device) for teacher in teachers]

    def measure() -> TopKError:
        sums = torch.zeros(5, dtype=torch.float64)
        for i, part in enumerate(parts):
            of_part = [of_teacher[i] for of_teacher in exact]
            hidden_ND = _student_states(student, seen, part, device)
            head = split_causal_lm(student)[1].detached()
            sums += _compared(hidden_ND, head, of_part, remembered(part), loss, seen.vocab_size)
        return _error(sums.tolist(), number, number * seen.windows.length)

    return ranks.broadcast_object(ranks.on_every_rank(measure))


def _states_of_parts(
    teacher: Teacher,
    seen: TeacherInput,
    parts: Sequence[NDArray[np.int64]],
    device: torch.device,
) -> list[TeacherStates]:
    """The teacher's states of every part; it is loaded for this alone."""
    with lent([teacher]) as load:
        (model,) = load()
        return ranks.on_every_rank(
            lambda: [
                TeacherStates(
                    states_of(teacher, model, seen.windows, part, device).flatten(0, 1),
                    model.head,
                    teacher.weight,
                )
                for part in parts
            ]
        )


def _student_states(
    student: nn.Module, seen: TeacherInput, part: NDArray[np.int64], device: torch.device
) -> Tensor:
    """The student's states [N, D] of windows by number, without dropout."""
    backbone, _ = split_causal_lm(student)
    tokens_BS = torch.from_numpy(seen.windows.numbered(part)).to(device)
    was_training = student.training
    student.eval()
    with torch.no_grad():
        hidden_ND = backbone(tokens_BS, pieces_of(seen.windows, part, device)).flatten(0, 1)
    student.train(was_training)
    return hidden_ND


def _compared(
    hidden_ND: Tensor,
    head: Head,
    exact: Sequence[TeacherStates],
    topk: TopKTargets,
    loss: DistillationSpec,
    vocab_size: int,
) -> Tensor:
    """Σ KL of both, then <g, g'>, <g, g>, <g', g'> of their gradients g and g'."""
    (kl, grad), (topk_kl, topk_grad) = (
        _kl_and_gradient(hidden_ND, head, targets, loss, vocab_size) for targets in (exact, topk)
    )
    products = [(grad * topk_grad).sum(), (grad * grad).sum(), (topk_grad * topk_grad).sum()]
    return torch.stack([kl, topk_kl, *products]).cpu()


def _kl_and_gradient(
    hidden_ND: Tensor,
    head: Head,
    targets: Sequence[TeacherStates] | TopKTargets,
    loss: DistillationSpec,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Σ KL and its gradient with respect to the hidden states, both in fp64."""
    leaf_ND = hidden_ND.detach().clone().requires_grad_()
    positions = len(leaf_ND)
    result = distillation_loss(
        leaf_ND,
        head,
        torch.full((positions,), IGNORED_LABEL, device=leaf_ND.device),
        torch.ones(positions, dtype=torch.bool, device=leaf_ND.device),
        targets,
        alpha=0.0,
        temperature=loss.fixed_temperature,
        mean_of=loss.mean_of,
        ce_count=1,
        kl_count=1,
        vocab_size=vocab_size,
        chunk_tokens=loss.chunk_tokens,
    )
    (grad_ND,) = torch.autograd.grad(result.loss, leaf_ND)
    return result.kl_sum.double(), grad_ND.double()


def _error(sums: Sequence[float], windows: int, positions: int) -> TopKError:
    exact, topk, product, square, topk_square = sums
    return TopKError(
        windows=windows,
        exact_kl=exact / positions,
        topk_kl=topk / positions,
        relative_kl_error=abs(topk - exact) / max(exact, 1e-30),
        gradient_cosine=product / max((square * topk_square) ** 0.5, 1e-30),
    )
