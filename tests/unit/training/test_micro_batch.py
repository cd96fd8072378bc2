"""`micro_batch: auto`: the largest that fits, on all ranks the same, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from babyllama_ds import ranks
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.errors import MachineError
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training import micro_batch as room
from babyllama_ds.training.batches import Batch
from babyllama_ds.training.batches import micro_batch as make_micro
from babyllama_ds.training.objective import LossParts, Objective
from babyllama_ds.training.step import train_step

VOCAB, LENGTH = 61, 120
MIB = 2**20


@pytest.mark.parametrize(
    ("share", "limit", "expected"),
    [(12, 5, 4), (12, 12, 12), (12, 100, 12), (12, 0, None), (7, 6, 1), (7, 7, 7), (1, 1, 1)],
)
def test_the_largest_divisor_that_fits(share: int, limit: int, expected: int | None) -> None:
    tried: list[int] = []

    def fits(windows: int) -> bool:
        tried.append(windows)
        return windows <= limit

    assert room.largest_fitting(share, fits) == expected
    assert len([windows for windows in tried if windows > limit]) <= 1


def test_what_does_not_fit_on_another_rank_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    other_rank = iter([0, 0, 1])
    monkeypatch.setattr(ranks, "max_int", lambda value: max(value, next(other_rank)))
    assert room.largest_fitting(8, lambda _: True) == 2


# -- the host's memory -----------------------------------------------------------------------------


def pretend_free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(room, "available_host_bytes", lambda: int(num_bytes))
    monkeypatch.setenv("LOCAL_SIZE", "1")


def test_the_peak_is_the_most_allocated_at_one_time() -> None:
    def run() -> None:
        first = torch.zeros(3 * MIB, dtype=torch.uint8)
        second = torch.zeros(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.zeros(MIB, dtype=torch.uint8)
        del second, third

    assert room.peak_host_bytes(run) == 5 * MIB


@pytest.mark.parametrize("fixed_bytes", [0, 4 * MIB])
def test_nothing_is_tried_that_could_exceed_the_hosts_memory(
    fixed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 21 * MIB
    pretend_free(monkeypatch, free / (1 - room.SPARED))
    taken: list[int] = []

    def trial(windows: int) -> None:
        taken.append(fixed_bytes + windows * MIB)
        torch.zeros(taken[-1], dtype=torch.uint8)

    host = room.HostRoom()
    found = room.largest_fitting(32, lambda windows: host.fits(windows, trial))
    assert found == 16
    assert max(taken) <= free


def test_ranks_share_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_free(monkeypatch, 20 * MIB)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    host = room.HostRoom()

    def fits(windows: int) -> bool:
        return host.fits(windows, lambda n: torch.zeros(n * MIB, dtype=torch.uint8))

    assert room.largest_fitting(16, fits) == 4


# -- a card's memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out_of_memory_at", "free_after", "expected"),
    [(8, {}, 4), (100, {}, 16), (100, {4: 0.05}, 2), (100, {16: 0.09}, 8)],
)
def test_a_card_is_tried_out(
    out_of_memory_at: int,
    free_after: dict[int, float],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial may fail for memory, or leave too little of it."""
    last = 0

    def trial(windows: int) -> None:
        nonlocal last
        last = windows
        if windows >= out_of_memory_at:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def mem_get_info(_: torch.device) -> tuple[int, int]:
        return int(1000 * free_after.get(last, 0.5)), 1000

    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(last))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    card = room.CardRoom(torch.device("cuda"))
    assert room.largest_fitting(16, lambda windows: card.fits(windows, trial)) == expected
    assert emptied[-1] == last, "what the last trial reserved was not given back"


@pytest.mark.parametrize(("taken", "expected"), [(0, 4), (499, 2), (701, None)])
def test_a_card_spares_what_the_cache_will_take(
    taken: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 0

    def trial(windows: int) -> None:
        nonlocal last
        last = windows

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000 - 200 * last, 1000))
    card = room.CardRoom(torch.device("cuda"), taken)
    assert room.largest_fitting(16, lambda windows: card.fits(windows, trial)) == expected


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_a_library_that_could_not_allocate_had_no_room(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def trial(_: int) -> None:
        raise RuntimeError(message)

    assert not room.CardRoom(torch.device("cuda")).fits(1, trial)


@pytest.mark.parametrize("message", ["shapes differ", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"])
def test_other_errors_of_a_trial_are_not_taken_for_lack_of_memory(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def trial(_: int) -> None:
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        room.CardRoom(torch.device("cuda")).fits(1, trial)


# -- a real student and teacher --------------------------------------------------------------------


@pytest.fixture
def distilled(
    alone: torch.device, tiny_model: Callable[..., Any]
) -> tuple[Objective, Ensemble, Callable[..., int]]:
    """A student, its teacher, and the search for them."""
    objective = Objective(
        tiny_model("llama", num_hidden_layers=1), vocab_size=VOCAB, distillation=DistillationSpec()
    )
    frozen = FrozenModel(tiny_model("gpt2", seed=1), device=alone, dtype=torch.float32)
    return objective, Ensemble([Member("t", frozen, 1.0)]), room.find_micro_batch


@pytest.fixture
def search(
    distilled: tuple[Objective, Ensemble, Callable[..., int]],
    alone: torch.device,
    training_spec: Callable[..., Any],
    engine_config: Callable[..., dict[str, Any]],
) -> Callable[..., int]:
    objective, ensemble, find = distilled
    training = training_spec(batch_windows=16, micro_batch="auto")

    def run(**changes: Any) -> int:
        return find(
            objective,
            ensemble,
            training=training,
            deepspeed=engine_config(training),
            share=16,
            length=LENGTH,
            device=alone,
            where="student.training",
            **changes,
        )

    return run


def test_less_memory_gives_smaller_micro_batches(
    search: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_free(monkeypatch, 2**40)
    peaks: list[int] = []
    measure = room.peak_host_bytes

    def measured(run: Callable[[], None]) -> int:
        peaks.append(measure(run))
        return peaks[-1]

    monkeypatch.setattr(room, "peak_host_bytes", measured)
    assert search() == 16
    assert len(peaks) == 5, "of 1, 2, 4, 8 and 16 windows"
    assert peaks[4] > 1.5 * peaks[3] > 2 * peaks[2]
    pretend_free(monkeypatch, 1.1 * peaks[3] / (1 - room.SPARED))
    assert search() == 8
    pretend_free(monkeypatch, (1.1 * peaks[3] + 100 * MIB) / (1 - room.SPARED))
    assert search(cache_bytes=100 * MIB) == 8, "a cache that is not there yet"


def test_a_pass_is_tried_as_a_logged_step_makes_it(
    search: Callable[..., int],
    distilled: tuple[Objective, Ensemble, Callable[..., int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With how teachers and student agree measured: else the first logged step would not fit."""
    pretend_free(monkeypatch, 2**40)
    objective, _, _ = distilled
    watched: list[bool] = []

    def forward(*given: Any, **options: Any) -> LossParts:
        parts = Objective.forward(objective, *given, **options)
        watched.append(parts.agreement is not None)
        return parts

    monkeypatch.setattr(objective, "forward", forward)
    search()
    assert watched == [True] * 5, "of 1, 2, 4, 8 and 16 windows"


def test_documents_are_tried_with_their_mask(
    search: Callable[..., int],
    distilled: tuple[Objective, Ensemble, Callable[..., int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the first batch with a boundary would not fit."""
    pretend_free(monkeypatch, 2**40)
    peaks: list[int] = []
    measure = room.peak_host_bytes

    def measured(run: Callable[[], None]) -> int:
        peaks.append(measure(run))
        return peaks[-1]

    monkeypatch.setattr(room, "peak_host_bytes", measured)
    search()
    search(within_documents=True)
    whole, apart = peaks[4], peaks[9]  # of 16 windows
    assert apart >= whole + 16 * LENGTH * LENGTH


def test_free_memory_is_read_when_all_ranks_have_their_engines(
    search: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Engine(room.TrainingEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            order.append("engine")

        def destroy(self) -> None:
            super().destroy()
            order.append("destroyed")

    def free_bytes() -> int:
        order.append("read")
        return 2**40

    monkeypatch.setattr(room, "TrainingEngine", Engine)
    monkeypatch.setattr(room, "available_host_bytes", free_bytes)
    monkeypatch.setattr(ranks, "barrier", lambda: order.append("barrier"))
    search()
    assert order[order.index("engine") :][:3] == ["engine", "barrier", "read"]
    assert order[-1] == "destroyed", "the training's own engine finds the memory taken"


def test_no_room_at_all_is_an_error(
    search: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_free(monkeypatch, 1000)
    with pytest.raises(MachineError) as caught:
        search()
    (problem,) = caught.value.problems
    assert problem.where == "student.training.micro_batch"
    assert problem.got == "no room for a forward and backward pass of one window of 120 tokens"
    assert problem.expected == "memory for it, with 10% of all to spare"
    assert "windows.length" in (problem.hint or "")
    with pytest.raises(MachineError) as caught:
        search(cache_bytes=5_000)
    (problem,) = caught.value.problems
    assert problem.expected.endswith("10% of all to spare, beside 5,000 bytes of the teacher cache")
    assert (problem.hint or "").startswith("set distillation.cache_tier=disk, take")


def test_training_afterwards_is_as_if_nothing_had_been_tried(
    search: Callable[..., int],
    distilled: tuple[Objective, Ensemble, Callable[..., int]],
    training_spec: Callable[..., Any],
    make_engine: Callable[..., Any],
    tiny_model: Callable[..., Any],
) -> None:
    objective, ensemble, _ = distilled
    untouched = Objective(
        tiny_model("llama", num_hidden_layers=1), vocab_size=VOCAB, distillation=DistillationSpec()
    )
    assert search() == 16
    weights = []
    for module in (objective, untouched):
        engine = make_engine(module, training_spec(batch_windows=2))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            tokens_BS = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
            micro = make_micro(tokens_BS, torch.ones(2, dtype=torch.bool))
            ids = torch.arange(2).numpy()
            batch = Batch(epoch=0, window_ids=ids, length=LENGTH, micro_batches=(micro,))
            train_step(engine, module, ensemble, batch, rate=1e-2, seed=1, step=step)
        weights.append([weight.detach().clone() for weight in module.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))
