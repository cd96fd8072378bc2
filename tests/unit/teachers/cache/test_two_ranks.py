"""Two real gloo ranks build one cache. Run as a script, this file is one of the ranks."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from babyllama_ds import ranks
from babyllama_ds.errors import ModelError, Stopped, UserError
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache import opening
from babyllama_ds.teachers.cache.layout import Layout
from babyllama_ds.teachers.cache.opening import Surroundings, Wanted, open_cache
from babyllama_ds.teachers.cache.tiers import Room

# Seven shards: in the last round only one rank has work.
LAYOUT = Layout(num_windows=27, record_bytes=16, forward_windows=2, shard_windows=4)
ALL = list(range(27))


class Numbers:
    """Computes the record of window w: its number, sixteen times; or fails at a window."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: set[int] = set()
        self.fail_at = fail_at

    def __call__(self, windows_B: NDArray[np.int64]) -> torch.Tensor:
        if self.fail_at in windows_B:
            raise ModelError.of("teachers/a", got="a failure", expected="none")
        self.asked |= set(windows_B.tolist())
        return torch.from_numpy(windows_B).to(torch.uint8)[:, None].expand(-1, 16)


# -- what the ranks do -----------------------------------------------------------------------------


class StoppedHere(StopRequest):
    """Asked to stop on rank 1 alone, at the third question; the ranks agree on it."""

    asked = 0

    def requested(self) -> str | None:
        if ranks.rank() == 1:
            StoppedHere.asked += 1
            if StoppedHere.asked == 9:  # within a shard of the second round
                self._signalled = 15
        return super().requested()


def opened(
    folder: Path,
    name: str,
    numbers: Numbers,
    *,
    tier: Any = "disk",
    stop: StopRequest | None = None,
    in_step: bool = False,
) -> dict[str, Any]:
    """What this rank reads from the cache, and what it was asked to compute; or its error."""
    around = Surroundings(
        store=Store(folder),
        stop=stop or StopRequest(),
        device=torch.device("cpu"),
        tier=tier,
        student_bytes=0,
    )
    wanted = Wanted(
        name="cache of teachers/a", key=name, layout=LAYOUT, made_of={}, in_step=in_step
    )
    try:
        records = open_cache(wanted, around, lambda: numbers)
    except (UserError, Stopped) as error:
        return {"error": str(error)}
    return {"read": records.read(np.array(ALL))[:, 7].tolist(), "asked": sorted(numbers.asked)}


def on_disk(folder: Path) -> Any:
    return opened(folder, "disk", Numbers())


def found_again(folder: Path) -> Any:
    return opened(folder, "disk", Numbers(), tier="host")


def without_a_disk(folder: Path) -> Any:
    measure = opening.measure_room
    opening.measure_room = lambda *_: Room(device=None, device_total=0, host=10**9, disk=0)
    found = opened(folder, "memory", Numbers(), tier="auto")
    opening.measure_room = measure
    return {**found, "files": [path.name for path in folder.rglob("shard-*memory*")]}


def one_fails(folder: Path) -> Any:
    """Window 13 is in shard 3: rank 1's, in the second round."""
    return opened(folder, "failing", Numbers(fail_at=13))


def goes_on_after(folder: Path) -> Any:
    return opened(folder, "failing", Numbers())


def one_is_stopped(folder: Path) -> Any:
    return opened(folder, "stopped", Numbers(), stop=StoppedHere())


def goes_on_with_other_work(folder: Path) -> Any:
    return opened(folder, "stopped", Numbers())


def one_damaged(folder: Path) -> Any:
    if ranks.rank() == 0:
        (folder / "teacher_cache" / "disk" / "shard-00002.bin").write_bytes(b"short")
    ranks.barrier()
    return opened(folder, "disk", Numbers())


class Together(Numbers):
    """As a split teacher's: a forward pass is one of both ranks."""

    passes = 0

    def __call__(self, windows_B: NDArray[np.int64]) -> torch.Tensor:
        Together.passes += 1
        assert len(set(ranks.gather_objects(Together.passes))) == 1, "ranks are not in step"
        return super().__call__(windows_B)


def in_step(folder: Path) -> Any:
    Together.passes = 0
    found = opened(folder, "together", Together(), in_step=True)
    return {**found, "passes": Together.passes}


def in_step_without_a_disk(folder: Path) -> Any:
    measure = opening.measure_room
    opening.measure_room = lambda *_: Room(device=None, device_total=0, host=10**9, disk=0)
    found = opened(folder, "together-in-memory", Together(), tier="auto", in_step=True)
    opening.measure_room = measure
    return found


def one_fails_in_step(folder: Path) -> Any:
    return opened(folder, "failing-together", Together(fail_at=13), in_step=True)


def one_is_stopped_in_step(folder: Path) -> Any:
    StoppedHere.asked = 0
    return opened(folder, "stopped-together", Together(), stop=StoppedHere(), in_step=True)


def goes_on_in_step(folder: Path) -> Any:
    return opened(folder, "stopped-together", Together(), in_step=True)


SCENARIOS: list[Callable[[Path], Any]] = [
    on_disk,
    found_again,
    without_a_disk,
    one_fails,
    goes_on_after,
    one_is_stopped,
    goes_on_with_other_work,
    one_damaged,
    in_step,
    in_step_without_a_disk,
    one_fails_in_step,
    one_is_stopped_in_step,
    goes_on_in_step,
]


def main(folder: Path) -> None:
    logging.basicConfig(level=logging.WARNING)
    dist.init_process_group("gloo")
    found = {scenario.__name__: scenario(folder / "store") for scenario in SCENARIOS}
    (folder / f"rank-{ranks.rank()}.json").write_text(json.dumps(found))
    ranks.barrier()
    ranks.forget_control_group()
    dist.destroy_process_group()


# -- what came of it -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any]) -> Path:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    made = tmp_path_factory.mktemp("two ranks")
    world = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    envs = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    start([[sys.executable, __file__, made]] * 2, envs).end().assert_done()
    return made


@pytest.fixture(scope="module")
def of_ranks(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return lambda scenario: [of_rank[scenario] for of_rank in found]


def shards(*numbers: int) -> list[int]:
    return sorted({w for shard in numbers for w in LAYOUT.windows(shard).tolist()})


@pytest.mark.parametrize("scenario", ["on_disk", "without_a_disk"])
def test_each_makes_its_shards_and_reads_all(
    scenario: str, of_ranks: Callable[[str], list[dict[str, Any]]]
) -> None:
    zero, one = of_ranks(scenario)
    assert zero["read"] == one["read"] == ALL
    assert zero["asked"] == shards(0, 2, 4, 6)  # and window 0, which fills the last pass up
    assert one["asked"] == shards(1, 3, 5)


def test_without_a_disk_nothing_is_written(
    of_ranks: Callable[[str], list[dict[str, Any]]], folder: Path
) -> None:
    place = folder / "store" / "teacher_cache" / ".building-memory"
    assert [path.name for path in place.iterdir()] == ["layout.json"]


def test_nothing_is_computed_again(of_ranks: Callable[[str], list[dict[str, Any]]]) -> None:
    for of_rank in of_ranks("found_again"):
        assert of_rank == {"read": ALL, "asked": []}


def test_the_error_of_one_is_everyones_and_costs_its_shard_alone(
    of_ranks: Callable[[str], list[dict[str, Any]]],
) -> None:
    zero, one = of_ranks("one_fails")
    assert zero == one == {"error": "teachers/a: got a failure, expected none"}
    zero, one = of_ranks("goes_on_after")
    assert zero["read"] == one["read"] == ALL
    # Shards 0, 1 and 2 stood; 3 to 6 are dealt out anew.
    assert zero["asked"] == shards(3, 5)
    assert one["asked"] == sorted({0, *shards(4, 6)})


def test_a_signal_to_one_stops_both(of_ranks: Callable[[str], list[dict[str, Any]]]) -> None:
    zero, one = of_ranks("one_is_stopped")
    assert zero["error"].startswith("SIGTERM")
    assert zero == one
    zero, one = of_ranks("goes_on_with_other_work")
    assert zero["read"] == one["read"] == ALL
    assert 0 < len(set(zero["asked"]) | set(one["asked"])) < 27


def test_only_the_damaged_shard_is_computed(
    of_ranks: Callable[[str], list[dict[str, Any]]],
) -> None:
    zero, one = of_ranks("one_damaged")
    assert zero == {"read": ALL, "asked": shards(2)}
    assert one == {"read": ALL, "asked": []}


@pytest.mark.parametrize("scenario", ["in_step", "in_step_without_a_disk"])
def test_ranks_of_a_split_teacher_go_in_step(
    scenario: str, of_ranks: Callable[[str], list[dict[str, Any]]]
) -> None:
    """Seven shards of at most two passes, on two ranks: four rounds; in the last, rank 1 has no
    shard, and rank 0 one of a pass and a half."""
    zero, one = of_ranks(scenario)
    assert zero["read"] == one["read"] == ALL
    assert zero["asked"] == shards(0, 2, 4, 6)  # and window 0, which fills the last pass up
    assert one["asked"] == sorted({0, *shards(1, 3, 5)})  # and it, which stands for no shard
    assert zero.get("passes") == one.get("passes") == (8 if scenario == "in_step" else None)


def test_in_step_the_error_of_one_and_a_signal_to_one_end_both(
    of_ranks: Callable[[str], list[dict[str, Any]]],
) -> None:
    zero, one = of_ranks("one_fails_in_step")
    assert zero == one == {"error": "teachers/a: got a failure, expected none"}
    zero, one = of_ranks("one_is_stopped_in_step")
    assert zero["error"].startswith("SIGTERM")
    assert zero == one
    assert [of_rank["read"] for of_rank in of_ranks("goes_on_in_step")] == [ALL, ALL]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
