from __future__ import annotations

import pytest

from babyllama_ds.losses.weights import TokenWeights, effective_token_weights, loss_counts


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(2.0, TokenWeights(ce=0.5, kl=256.0)), (1.0, TokenWeights(ce=0.5, kl=64.0))],
    ids=["BabyLlama", "BabyLlama-2"],
)
def test_the_published_recipes_are_nearly_pure_distillation(temperature, expected) -> None:
    assert effective_token_weights(0.5, temperature, "sequence", 128) == expected


def test_token_reduction_means_what_alpha_says() -> None:
    weights = effective_token_weights(0.3, 2.0, "token", 128)
    assert weights.ce == 0.3
    assert weights.kl == pytest.approx(0.7 * 4)


def test_counts_are_labels_and_windows_or_positions() -> None:
    assert loss_counts(381, 3, 384, "sequence") == (381, 3)
    assert loss_counts(381, 3, 384, "token") == (381, 384)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_counts_of_nothing_are_one(reduction) -> None:
    assert loss_counts(0, 0, 0, reduction) == (1, 1)
