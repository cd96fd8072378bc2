"""What the sums of the loss are divided by, and what one position then weighs.

    L = α · Σ CE / n_ce + (1 − α) · T² · Σ KL / n_kl

n_ce is the number of labelled positions. n_kl is the number of windows (`sequence`) or of valid
positions (`token`). `sequence` is what the published code does: `KLDivLoss("batchmean")` on a
[B, S, V] tensor divides by B alone, so that the KL of all S positions is summed
(BabyLlama, arXiv 2308.02019, and BabyLlama-2, arXiv 2409.17312).

Counts enter, divisors and per-position weights leave; the loss and the report use both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SoftReduction = Literal["sequence", "token"]


@dataclass(frozen=True)
class TokenWeights:
    """What the CE and the KL of one position weigh, when CE is a mean over positions."""

    ce: float
    kl: float


def effective_token_weights(
    alpha: float, temperature: float, soft_reduction: SoftReduction, window_length: int
) -> TokenWeights:
    """The true balance behind `alpha`.

    Multiplying L by the number of positions gives `ce · CE + kl · KL` for each of them. BabyLlama
    (α 0.5, T 2, windows of 128 positions, `sequence`) has CE 0.5 to KL 256, BabyLlama-2 (T 1)
    0.5 to 64: almost pure distillation, whatever α says. (A window has one label fewer than
    positions; that factor of 127/128 is left out.)
    """
    positions_per_count = window_length if soft_reduction == "sequence" else 1
    return TokenWeights(ce=alpha, kl=(1 - alpha) * temperature**2 * positions_per_count)


def loss_counts(
    num_labelled: int, num_windows: int, num_valid: int, soft_reduction: SoftReduction
) -> tuple[int, int]:
    """(n_ce, n_kl) from the counts of the global optimizer batch, all ranks and micro-batches.

    Each is at least 1, so that a batch with nothing to count has loss 0 and not 0/0.
    """
    num_soft = num_windows if soft_reduction == "sequence" else num_valid
    return max(1, num_labelled), max(1, num_soft)
