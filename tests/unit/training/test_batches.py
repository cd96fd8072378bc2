"""Every window once an epoch, the same batches on any ranks, and padding that counts nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from babyllama_ds.errors import JobError
from babyllama_ds.losses.distillation import IGNORED_LABEL
from babyllama_ds.training.batches import (
    Batch,
    BatchPlan,
    check_warmup,
    label_mask,
    micro_batch,
    total_steps,
)

LENGTH = 5


class NumberedWindows:
    """Window i of epoch e holds the tokens 1000 e + 10 i + (0 … 4), in another order each epoch."""

    def __init__(self, num_windows: int) -> None:
        self.num_windows, self.length = num_windows, LENGTH

    def batch(self, epoch: int, k: int, batch_windows: int) -> NDArray[np.int64]:
        order = np.random.default_rng(epoch).permutation(self.num_windows)
        return order[k * batch_windows : (k + 1) * batch_windows]

    def numbers(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return 100 * epoch + indices

    def begins(self, epoch: int, indices: NDArray[np.int64]) -> None:
        """Windows are whole."""

    def windows(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        assert (indices >= 0).all()
        return 1000 * epoch + 10 * indices[:, None] + np.arange(LENGTH)


def plans(
    windows: NumberedWindows,
    training: Any,
    num_ranks: int,
    size: int,
    has_label: Any = None,
) -> list[BatchPlan]:
    return [
        BatchPlan(
            windows,
            training,
            rank=rank,
            num_ranks=num_ranks,
            micro_batch=size,
            device=torch.device("cpu"),
            has_label=has_label,
        )
        for rank in range(num_ranks)
    ]


def real_windows(batch: Batch) -> list[list[int]]:
    """The token ids of every window of a rank that is not padding."""
    found = []
    for micro in batch.micro_batches:
        valid_BS = micro.valid_N.view_as(micro.input_ids_BS)
        assert torch.equal(valid_BS.all(1), valid_BS.any(1)), "a window is real or padding, whole"
        found += micro.input_ids_BS[valid_BS.all(1)].tolist()
    return found


SPLITS = [(1, 8), (1, 4), (1, 1), (2, 4), (2, 2), (2, 1), (4, 1), (8, 1)]


@pytest.mark.parametrize(("num_ranks", "size"), SPLITS)
@pytest.mark.parametrize("num_windows", [8, 16, 19, 17, 3])
def test_every_window_once_an_epoch_and_the_same_batches(
    num_windows: int, num_ranks: int, size: int, training_spec: Callable[..., Any]
) -> None:
    windows = NumberedWindows(num_windows)
    training = training_spec(batch_windows=8, epochs=2.0)
    of_ranks = plans(windows, training, num_ranks, size)
    per_epoch = -(-num_windows // 8)
    assert {plan.steps_per_epoch for plan in of_ranks} == {per_epoch}
    assert {plan.total_steps for plan in of_ranks} == {2 * per_epoch}
    for epoch in range(2):
        seen = []
        for k in range(per_epoch):
            batches = [plan.batch(epoch * per_epoch + k) for plan in of_ranks]
            expected = windows.batch(epoch, k, 8)
            together = [window for batch in batches for window in real_windows(batch)]
            assert sorted(together) == sorted(windows.windows(epoch, expected).tolist())
            seen += together
            for batch in batches:
                assert batch.epoch == epoch
                assert batch.window_ids.tolist() == expected.tolist()  # the global batch's
                assert len(batch.micro_batches) == 8 // (num_ranks * size)
                assert {m.input_ids_BS.shape for m in batch.micro_batches} == {(size, LENGTH)}
        everything = windows.windows(epoch, np.arange(num_windows)).tolist()
        assert sorted(seen) == everything


@pytest.mark.parametrize(("num_ranks", "size"), SPLITS)
def test_a_batch_is_dealt_out_pass_by_pass_rank_by_rank_its_padding_last(
    num_ranks: int, size: int, training_spec: Callable[..., Any]
) -> None:
    """By this order the loop names the windows on which a teacher is not finite."""
    windows = NumberedWindows(13)  # batches of 8 and 5
    of_ranks = plans(windows, training_spec(batch_windows=8), num_ranks, size)
    for step in range(2):
        batches = [plan.batch(step) for plan in of_ranks]
        passes = zip(*(batch.micro_batches for batch in batches), strict=True)
        micros = [micro for of_pass in passes for micro in of_pass]
        dealt = np.concatenate([micro.windows_B for micro in micros])
        num_windows = batches[0].num_windows
        assert dealt[:num_windows].tolist() == batches[0].window_ids.tolist()
        valid = torch.cat([micro.valid_N.view(size, LENGTH)[:, 0] for micro in micros])
        assert valid.tolist() == [True] * num_windows + [False] * (8 - num_windows)


@pytest.mark.parametrize(("num_ranks", "size"), SPLITS)
def test_each_pass_knows_its_windows_by_number_and_the_next_ones(
    num_ranks: int, size: int, training_spec: Callable[..., Any]
) -> None:
    windows = NumberedWindows(13)  # batches of 8 and 5, for two epochs and a half
    for plan in plans(windows, training_spec(batch_windows=8, epochs=2.5), num_ranks, size):
        micros = [m for step in range(plan.total_steps) for m in plan.batch(step).micro_batches]
        for micro, following in zip(micros, [*micros[1:], None], strict=True):
            firsts_B = micro.input_ids_BS[:, 0].numpy()  # 1000 epoch + 10 index
            assert micro.windows_B.tolist() == (firsts_B // 10).tolist()
            expected = [] if following is None else following.windows_B.tolist()
            assert micro.next_windows_B.tolist() == expected


@pytest.mark.parametrize(("num_ranks", "size"), SPLITS)
def test_counts_are_the_global_batchs_and_the_masks_agree(
    num_ranks: int, size: int, training_spec: Callable[..., Any]
) -> None:
    windows = NumberedWindows(13)  # batches of 8 and 5
    of_ranks = plans(windows, training_spec(batch_windows=8), num_ranks, size)
    for step, num_windows in enumerate((8, 5)):
        batches = [plan.batch(step) for plan in of_ranks]
        micros = [micro for batch in batches for micro in batch.micro_batches]
        for batch in batches:
            assert batch.num_windows == num_windows
            assert batch.num_labelled == num_windows * 4
            assert batch.num_valid == num_windows * 5
        assert sum(int(micro.valid_N.sum()) for micro in micros) == num_windows * 5
        labelled = sum(int((micro.labels_N != IGNORED_LABEL).sum()) for micro in micros)
        assert labelled == num_windows * 4


class WindowsOfDocuments(NumberedWindows):
    """Of which some begin at other places in each window and epoch."""

    def begins(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.bool_]:  # type: ignore[override]
        drawn = [
            np.random.default_rng([epoch, index]).random(LENGTH) < 0.4 for index in indices.tolist()
        ]
        begins_NL = np.array(drawn, dtype=np.bool_).reshape(-1, LENGTH)
        begins_NL[:, 0] = True
        return begins_NL


@pytest.mark.parametrize(("num_ranks", "size"), SPLITS)
def test_what_is_labelled_is_known_to_every_rank_before_it_begins(
    num_ranks: int, size: int, training_spec: Callable[..., Any]
) -> None:
    """Exactly, of the global batch, the same on any ranks, and other in other batches."""
    windows = WindowsOfDocuments(13)  # batches of 8 and 5
    counted = []
    for step in range(4):
        batches = [
            plan.batch(step)
            for plan in plans(windows, training_spec(batch_windows=8, epochs=2.0), num_ranks, size)
        ]
        micros = [micro for batch in batches for micro in batch.micro_batches]
        labelled = sum(int((micro.labels_N != IGNORED_LABEL).sum()) for micro in micros)
        assert {batch.num_labelled for batch in batches} == {labelled}
        assert {batch.num_valid for batch in batches} == {batches[0].num_windows * LENGTH}
        epoch, k = divmod(step, 2)
        begins = windows.begins(epoch, windows.batch(epoch, k, 8))
        assert labelled == (~begins[:, 1:]).sum()
        counted.append(labelled)
        for micro in micros:
            assert micro.pieces is not None
            firsts = micro.input_ids_BS[:, 0].tolist()
            expected = windows.begins(epoch, np.array([first % 1000 // 10 for first in firsts]))
            assert (micro.pieces.positions_BS == 0).tolist() == expected.tolist()
    assert len(set(counted)) > 2


@pytest.mark.parametrize(("num_ranks", "size"), SPLITS)
def test_tokens_without_a_label_are_counted_by_every_rank_alike(
    num_ranks: int, size: int, training_spec: Callable[..., Any]
) -> None:
    """Window i of epoch e holds 1000 e + 10 i + (0 … 4); the first and the third have no label."""
    windows = NumberedWindows(13)  # batches of 8 and 5
    unlabelled = [10 * i + digit for i in (0, 3, 4, 12) for digit in (0, 2)]
    unlabelled += [1000 + 10 * i + 1 for i in range(13)]
    training = training_spec(batch_windows=8, epochs=2.0)
    of_ranks = plans(windows, training, num_ranks, size, label_mask(unlabelled))
    seen = []
    for step in range(4):
        batches = [plan.batch(step) for plan in of_ranks]
        micros = [micro for batch in batches for micro in batch.micro_batches]
        labels = [label for micro in micros for label in micro.labels_N.tolist()]
        labels = [label for label in labels if label != IGNORED_LABEL]
        assert {batch.num_labelled for batch in batches} == {len(labels)}
        assert sum(int(micro.valid_N.sum()) for micro in micros) == 5 * batches[0].num_windows
        seen += labels
    # Each window has the labels 1 to 4 of its five tokens, but for those left out.
    everything = [1000 * e + 10 * i + j for e in (0, 1) for i in range(13) for j in range(1, 5)]
    assert sorted(seen) == [token for token in everything if token not in unlabelled]


def test_labels_are_the_next_tokens_and_padding_has_none() -> None:
    tokens_BS = torch.tensor([[5, 6, 7], [8, 9, 1], [2, 3, 4]])
    micro = micro_batch(tokens_BS, torch.tensor([True, False, True]))
    none = IGNORED_LABEL
    assert micro.labels_N.tolist() == [6, 7, none, none, none, none, 3, 4, none]
    assert micro.valid_N.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert micro.labels_N.dtype == torch.int64
    assert micro.valid_N.dtype == torch.bool
    assert torch.equal(micro.input_ids_BS, tokens_BS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 10 windows in batches of 4 are 3 steps an epoch; a batch has 4 × 6 = 24 tokens.
        ({"epochs": 1.0}, 3),
        ({"epochs": 4.0}, 12),
        ({"epochs": 2.5}, 8),  # 7.5: the last step is begun
        ({"epochs": 0.1}, 1),
        ({"epochs": 4.0, "max_steps": 5}, 5),
        ({"epochs": 1.0, "max_steps": 5}, 3),
        ({"epochs": 4.0, "max_tokens": 100}, 4),  # 96 tokens; a fifth step would exceed 100
        ({"epochs": 4.0, "max_tokens": 96}, 4),
        ({"epochs": 4.0, "max_tokens": 95}, 3),
        ({"epochs": 4.0, "max_tokens": 1}, 1),
        ({"epochs": 4.0, "max_tokens": 100, "max_steps": 2}, 2),
        ({"epochs": 4.0, "max_tokens": 100_000, "max_steps": 100}, 12),
    ],
)
def test_training_ends_at_the_first_limit(
    changes: dict[str, Any], expected: int, training_spec: Callable[..., Any]
) -> None:
    training = training_spec(batch_windows=4, **changes)
    assert total_steps(training, num_windows=10, length=6) == expected


@pytest.mark.parametrize("tenths", range(1, 60))
def test_a_decimal_number_of_epochs_has_no_step_of_its_rounding(
    tenths: int, training_spec: Callable[..., Any]
) -> None:
    training = training_spec(batch_windows=4, epochs=tenths / 10)
    for steps in (10, 50, 90, 1000):
        assert total_steps(training, num_windows=4 * steps, length=6) == tenths * steps // 10


def test_a_warm_up_longer_than_the_training_is_refused(training_spec: Callable[..., Any]) -> None:
    options = {"batch_windows": 4, "epochs": 2.0}  # 10 windows: three steps an epoch
    check_warmup(training_spec(warmup_steps=5, **options), 10, 6, where="student.training")
    with pytest.raises(JobError) as caught:
        check_warmup(training_spec(warmup_steps=6, **options), 10, 6, where="student.training")
    (problem,) = caught.value.problems
    assert problem.where == "student.training.warmup_steps"
    assert problem.got == "6"
    assert problem.expected == "fewer than the training's 6 optimizer steps"
