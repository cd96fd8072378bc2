"""Two real gloo ranks build one cache. Run as a script, this file is one of the ranks."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from babyllama_ds import ranks
from babyllama_ds.errors import ModelError, RunError, Stopped, UserError
from babyllama_ds.files import sha256_file
from babyllama_ds.stopping import StopRequest
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache import build, opening
from babyllama_ds.teachers.cache.layout import Layout, write_shard
from babyllama_ds.teachers.cache.opening import CacheContext, Wanted, open_cache
from babyllama_ds.teachers.cache.sources import Teacher, lent
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
    """Asked to stop on rank 1 alone, in the middle of a shard; the ranks agree on it."""

    asked = 0

    def requested(self) -> str | None:
        if ranks.rank() == 1:
            StoppedHere.asked += 1
            if StoppedHere.asked == 8:  # at the first pass of the second round, of shards 2 and 3
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
    storages: Storages | None = None,
    layout: Layout = LAYOUT,
) -> dict[str, Any]:
    """What this rank reads from the cache, and what it was asked to compute; or its error."""
    context = CacheContext(
        store=Store(folder),
        stop=stop or StopRequest(),
        device=torch.device("cpu"),
        tier=tier,
        student_bytes=0,
        storages=storages or Storages(),
    )
    wanted = Wanted(
        name="cache of teachers/a", key=name, layout=layout, made_of={}, in_step=in_step
    )
    try:
        records = open_cache(wanted, context, lambda: numbers)
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
    numbers = Numbers()
    found = opened(folder, "stopped", numbers, stop=StoppedHere())
    return {**found, "last": max(numbers.asked)}


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


def one_cannot_load(_folder: Path) -> Any:
    """The first of two teachers, once both have read it; to read the second is a collective."""
    begun: list[str] = []

    def load(name: str) -> Any:
        begun.append(name)
        ranks.on_every_rank(lambda: None)
        if ranks.rank() == 1:
            raise MemoryError("no room")

    teachers = [
        Teacher(name=name, weight=1, model_dir=Path(), attention="sdpa", load=partial(load, name))
        for name in ("a", "b")
    ]
    try:
        with lent(teachers) as loaded:
            loaded()
    except (MemoryError, ranks.RemoteError) as error:
        return [type(error).__name__, begun]


# -- the same on two nodes of a rank each ----------------------------------------------------------


def on_nodes(folder: Path, numbers: Numbers | None = None, **changes: Any) -> dict[str, Any]:
    """What a rank read and was asked for; of its own storage the files and their times."""
    me = ranks.rank()
    nodes = Storages(leads=(0, 1), hosts=("a", "b"), mine=me, readers=(me,))
    own = folder / f"node {me}"
    found = opened(own, "nodes", numbers or Numbers(), storages=nodes, **changes)
    paths = sorted(own.rglob("*nodes/*"))
    files = {path.name: sha256_file(path) for path in paths}
    return {**found, "files": files, "entry": (own / "teacher_cache" / "nodes").is_dir()}


def entry_of(folder: Path) -> Path:
    return folder / f"node {ranks.rank()}" / "teacher_cache" / "nodes"


def each_node_gets_all(folder: Path) -> Any:
    return on_nodes(folder)


def a_node_is_replaced(folder: Path) -> Any:
    if ranks.rank() == 1:
        shutil.rmtree(folder / "node 1")
    ranks.barrier()
    return on_nodes(folder)


def the_first_is_replaced(folder: Path) -> Any:
    """Its layout would be another: that of the other node counts."""
    if ranks.rank() == 0:
        shutil.rmtree(folder / "node 0")
    ranks.barrier()
    return on_nodes(folder, layout=replace(LAYOUT, forward_windows=4), tier="host")


def each_lost_a_shard(folder: Path) -> Any:
    """Another one each, and before these one that nobody has any more."""
    for shard in (0, 4 + ranks.rank()):
        (entry_of(folder) / f"shard-{shard:05d}.bin").unlink()
    ranks.barrier()
    return on_nodes(folder)


def one_has_other_records(folder: Path) -> Any:
    """Whole, as made by another machine, but not those that the first node has."""
    if ranks.rank() == 1:
        write_shard(entry_of(folder), 3, torch.full((4, 16), 77, dtype=torch.uint8))
    ranks.barrier()
    return on_nodes(folder)


def one_is_laid_out_otherwise(folder: Path) -> Any:
    """With a shard as long as it should be: not to be taken for the one that the other lost."""
    if ranks.rank() == 0:
        (entry_of(folder) / "shard-00006.bin").unlink()
    else:
        replace(LAYOUT, forward_windows=1).write(entry_of(folder))
        write_shard(entry_of(folder), 6, torch.full((3, 16), 77, dtype=torch.uint8))
    ranks.barrier()
    return on_nodes(folder)


def one_cannot_be_written(folder: Path) -> Any:
    write = build.write_shard

    def refused(directory: Path, shard: int, records: torch.Tensor) -> Any:
        if ranks.rank() == 1 and shard == 2:  # the first node's
            raise RunError.of(directory, got="EROFS", expected="a place that can be written")
        return write(directory, shard, records)

    shutil.rmtree(folder / f"node {ranks.rank()}")
    build.write_shard = refused
    found = on_nodes(folder)
    build.write_shard = write
    return found


def and_then_it_can(folder: Path) -> Any:
    return on_nodes(folder)


class StopsInSending(StopRequest):
    """Asked to stop when two shards were sent; the ranks agree on it before each."""

    asked = 0

    def agreed(self) -> str | None:
        self.asked += 1
        return "SIGTERM" if self.asked == 3 else None


def stopped_in_sending(folder: Path) -> Any:
    if ranks.rank() == 1:
        shutil.rmtree(folder / "node 1")
    ranks.barrier()
    return on_nodes(folder, stop=StopsInSending())


def goes_on_sending(folder: Path) -> Any:
    return on_nodes(folder)


def one_cannot_be_read(folder: Path) -> Any:
    """A shard is lost after it was looked at."""
    read = build._read

    def lost(layout: Layout, directory: Path, shard: int) -> torch.Tensor:
        if shard == 4:
            raise FileNotFoundError(2, "lost", "a shard")
        return read(layout, directory, shard)

    if ranks.rank() == 1:
        shutil.rmtree(folder / "node 1")
    ranks.barrier()
    build._read = lost
    try:
        return on_nodes(folder)
    except (FileNotFoundError, ranks.RemoteError) as error:
        return type(error).__name__
    finally:
        build._read = read


SCENARIOS: list[Callable[[Path], Any]] = [
    each_node_gets_all,
    a_node_is_replaced,
    the_first_is_replaced,
    each_lost_a_shard,
    one_has_other_records,
    one_is_laid_out_otherwise,
    one_cannot_be_written,
    and_then_it_can,
    stopped_in_sending,
    goes_on_sending,
    one_cannot_be_read,
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
    one_cannot_load,
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


def test_the_error_of_one_is_everyones_and_costs_the_shards_of_a_round(
    of_ranks: Callable[[str], list[dict[str, Any]]],
) -> None:
    zero, one = of_ranks("one_fails")
    assert zero == one == {"error": "teachers/a: got a failure, expected none"}
    zero, one = of_ranks("goes_on_after")
    assert zero["read"] == one["read"] == ALL
    # Shards 0 and 1 stood; 2 to 6 are dealt out anew.
    assert zero["asked"] == sorted({0, *shards(2, 4, 6)})
    assert one["asked"] == shards(3, 5)


def test_a_signal_to_one_stops_both(of_ranks: Callable[[str], list[dict[str, Any]]]) -> None:
    zero, one = of_ranks("one_is_stopped")
    # After the same pass: the rank that was not asked does not finish its shard.
    assert zero == {"error": "SIGTERM, at cache of teachers/a", "last": 9}
    assert one == {"error": "SIGTERM, at cache of teachers/a", "last": 13}
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


def test_a_teacher_that_one_cannot_load_ends_both_before_the_next(
    of_ranks: Callable[[str], list[Any]],
) -> None:
    assert of_ranks("one_cannot_load") == [["RemoteError", ["a"]], ["MemoryError", ["a"]]]


# -- on two nodes ----------------------------------------------------------------------------------

OfRanks = Callable[[str], list[dict[str, Any]]]


def assert_same_and_whole(zero: dict[str, Any], one: dict[str, Any]) -> None:
    assert zero["read"] == one["read"] == ALL
    assert zero["files"] == one["files"]
    assert len(zero["files"]) == LAYOUT.num_shards + 2  # the layout and the manifest
    assert zero["entry"]
    assert one["entry"]


def test_nodes_share_the_work_and_have_the_same_files(of_ranks: OfRanks) -> None:
    zero, one = of_ranks("each_node_gets_all")
    assert_same_and_whole(zero, one)
    assert zero["asked"] == shards(0, 2, 4, 6)
    assert one["asked"] == shards(1, 3, 5)


@pytest.mark.parametrize(
    "scenario",
    [
        "a_node_is_replaced",
        "the_first_is_replaced",
        "one_has_other_records",
    ],
)
def test_what_one_node_has_is_sent_not_computed(scenario: str, of_ranks: OfRanks) -> None:
    zero, one = of_ranks(scenario)
    assert_same_and_whole(zero, one)
    assert zero["files"] == of_ranks("each_node_gets_all")[0]["files"]
    assert zero["asked"] == one["asked"] == []


def test_only_what_no_node_has_is_computed(of_ranks: OfRanks) -> None:
    zero, one = of_ranks("each_lost_a_shard")
    assert_same_and_whole(zero, one)
    assert zero["asked"] == shards(0)
    assert one["asked"] == []


def test_shards_of_another_layout_are_not_taken_for_these(of_ranks: OfRanks) -> None:
    zero, one = of_ranks("one_is_laid_out_otherwise")
    assert_same_and_whole(zero, one)
    assert zero["files"] == of_ranks("each_node_gets_all")[0]["files"]
    assert zero["asked"] == sorted({*shards(6), 0})
    assert one["asked"] == []


def test_a_disk_that_refuses_names_its_node_and_costs_no_shard(of_ranks: OfRanks) -> None:
    zero, one = of_ranks("one_cannot_be_written")
    assert zero["error"] == one["error"]
    assert zero["error"].startswith("node 1, host b: ")
    zero, one = of_ranks("and_then_it_can")
    assert_same_and_whole(zero, one)
    assert {*zero["asked"], *one["asked"]} == {*shards(4, 5, 6), 0}


def test_a_stop_while_shards_are_sent_costs_none(of_ranks: OfRanks) -> None:
    zero, one = of_ranks("stopped_in_sending")
    assert zero["error"] == one["error"] == "SIGTERM, at cache of teachers/a, sent to other nodes"
    assert sorted(one["files"]) == ["layout.json", "shard-00000.bin", "shard-00001.bin"]
    zero, one = of_ranks("goes_on_sending")
    assert_same_and_whole(zero, one)
    assert zero["asked"] == one["asked"] == []


def test_a_sender_that_fails_leaves_no_one_waiting(of_ranks: OfRanks) -> None:
    assert of_ranks("one_cannot_be_read") == ["FileNotFoundError", "RemoteError"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
