"""Three real gloo ranks on two nodes, of one and of two. Run as a script, this is one of the ranks.

A node is a working folder: the same relative path is another file there. The ranks start once and
go through all of `SCENARIOS` in order; each test looks at what came of one on all ranks. The second
node's ranks have no right to pass over the rights of a folder, as root has, so that a folder can be
one that they cannot write.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from babyllama_ds import files, ranks
from babyllama_ds.errors import JobError, MachineError, RunError, UserError
from babyllama_ds.rundir import RunDirectory
from babyllama_ds.storages import (
    Storages,
    find_storages,
    finding,
    leads,
    sending,
    storages_of_nodes,
)

LIMIT_S = 90
NODE_OF = (0, 1, 1)
LOCAL_RANKS = (0, 0, 1)
WITHOUT_ROOTS_RIGHT = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
ENTRY = Path("store") / "kind" / "key"
FILES = {"a.bin": bytes(range(256)) * 10, "deep/b.txt": b"text", "empty": b""}


def write_entry(directory: Path, contents: dict[str, bytes] = FILES) -> None:
    for name, content in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    files.write_manifest(directory, fingerprint="key", stage="a stage")


def found(directory: Path) -> Callable[[], Path | None]:
    return lambda: directory if files.read_manifest(directory) else None


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def fresh(node: int | None = None) -> bool:
    """Begin with no store; whether this rank leads (the given node)."""
    ranks.barrier()
    here = NODE.mine
    if NODE.led_here:
        shutil.rmtree("store", ignore_errors=True)
        shutil.rmtree("runs", ignore_errors=True)
    ranks.barrier()
    return NODE.led_here and node in (None, here)


def outcome_of(work: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> Any:
    try:
        result = work()
    except Exception as error:
        ranks.barrier()
        return {"error": type(error).__name__, "text": str(error), "after": after()}
    ranks.barrier()
    return {"result": result, "after": after()}


# -- what the ranks do ----------------------------------------------------------------------------

NODE = Storages()


def who_is_who() -> Any:
    return NODE.leads, NODE.mine, NODE.readers, NODE.led_here, list(NODE.share_of(5))


def on_each_node() -> Any:
    return NODE.on_each(lambda: (ranks.rank(), Path.cwd().name))


def failing_on_the_second() -> Any:
    def work() -> None:
        if NODE.mine == 1:
            raise JobError.of("a.key", got="this", expected="that")

    return outcome_of(lambda: NODE.on_each(work))


def result_that_cannot_travel() -> Any:
    return outcome_of(lambda: NODE.on_each(threading.Lock))


def held_by_leads() -> Any:
    held: list[str] = []

    @contextmanager
    def manager() -> Any:
        held.append("in")
        yield
        held.append("out")

    with NODE.held(manager()):
        inside = list(held)
    return inside, held


def held_in_the_order_of_hosts() -> Any:
    """The second node's name comes first, so its lead waits for no one; then the first fails."""
    order = replace(NODE, hosts=("b", "a"))

    @contextmanager
    def manager() -> Any:
        Path(f"../entered-{ranks.rank()}").touch()
        if ranks.rank() == 0 and Path("../entered-1").exists():
            raise RunError.of("a lock", got="held", expected="free")
        yield

    def enter() -> None:
        with order.held(manager()):
            raise AssertionError("entered")

    return outcome_of(enter)


def nowhere() -> Any:
    fresh()
    return outcome_of(lambda: NODE.everywhere(found(ENTRY)))


def sent(node: int) -> Callable[[], Any]:
    def work() -> Any:
        if fresh(node):
            write_entry(ENTRY)
            (ENTRY / "README.md").write_text("not in the manifest")
        if NODE.led_here and NODE.mine != node:
            ENTRY.mkdir(parents=True)
            (ENTRY / "half").write_text("of another start")
        ranks.barrier()
        sending._BLOCK_BYTES = 1000
        return outcome_of(lambda: NODE.everywhere(found(ENTRY)), lambda: contents(Path("store")))

    return work


def different() -> Any:
    if fresh():
        write_entry(ENTRY, FILES | ({"deep/b.txt": b"TEXT"} if NODE.mine else {}))
    ranks.barrier()
    return outcome_of(lambda: NODE.everywhere(found(ENTRY)))


def damaged_at_its_source() -> Any:
    if fresh(1):
        write_entry(ENTRY)
        (ENTRY / "deep" / "b.txt").write_bytes(b"tekst")
    ranks.barrier()
    return outcome_of(
        lambda: NODE.everywhere(found(ENTRY)),
        lambda: contents(Path("store")) if NODE.mine == 0 else None,
    )


def lost_at_its_source() -> Any:
    if fresh(1):
        write_entry(ENTRY)
        (ENTRY / "deep" / "b.txt").unlink()
    ranks.barrier()
    return outcome_of(
        lambda: NODE.everywhere(found(ENTRY)),
        lambda: contents(Path("store")) if NODE.mine == 0 else None,
    )


def not_writable_where_it_lacks() -> Any:
    if fresh(0):
        write_entry(ENTRY)
    if NODE.led_here and NODE.mine == 1:
        ENTRY.parent.mkdir(parents=True)
        ENTRY.parent.chmod(0o555)
    ranks.barrier()
    result = outcome_of(lambda: NODE.everywhere(found(ENTRY)))
    if NODE.led_here and NODE.mine == 1:
        ENTRY.parent.chmod(0o755)
    return result


def small_file() -> Any:
    if fresh(1):
        Path("store").mkdir()
        Path("store/small").write_bytes(b"small")
    if NODE.led_here and NODE.mine == 0:
        Path("store").mkdir()
    ranks.barrier()
    NODE.copy_file(Path("store/small"), source=1)
    NODE.copy_file(Path("store/nothing"), source=1)
    return contents(Path("store"))


def known_of_earlier_starts() -> Any:
    """Node 0 is new but for one settled value; node 1 has the rest."""
    fresh()
    directory = RunDirectory(Path("runs") / "one")
    if NODE.led_here:
        found = {"student": {"micro_batch": 2}} if NODE.mine == 0 else {}
        known = {"student": {"micro_batch": 4}, "control": {"micro_batch": 8}, **found}
        for where, settled in (known if NODE.mine == 1 else found).items():
            directory.settle(where, settled)
        if NODE.mine == 1:
            files.write_json(directory.path / "environment.json", {"made": "there"})
            files.write_atomic(directory.path / "metrics.jsonl", "long\nlonger\n")
        else:
            files.write_atomic(directory.path / "metrics.jsonl", "long\n")
        files.write_atomic(directory.path / "tensorboard" / "student" / "events", "of it")
    ranks.barrier()
    directory.bring_together(NODE)
    ranks.barrier()
    return directory.settled(), contents(directory.path)


def really_shared() -> Any:
    fresh()
    runs = Path.cwd().parent / "shared"
    return outcome_of(lambda: find_storages("shared", runs).leads, lambda: contents(runs))


def not_shared() -> Any:
    fresh()
    return outcome_of(lambda: find_storages("shared", Path("runs")), lambda: contents(Path()))


def copied_but_not_shared() -> Any:
    """As where somebody had copied the folder, with what a check before had left there."""
    fresh()
    written = finding._written

    def copied(path: Path) -> str:
        content = written(path)
        other = Path.cwd().parent / "node 1" / path
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("x" * len(content))
        return content

    if ranks.rank() == 0:
        finding._written = copied
    result = outcome_of(lambda: find_storages("shared", Path("runs")))
    finding._written = written
    return result


def shared_one_way() -> Any:
    """What the second node writes does not come back."""
    fresh()
    written = finding._written
    if ranks.rank() == 1:
        finding._written = lambda _: "never written"
    runs = Path.cwd().parent / "shared"
    result = outcome_of(lambda: find_storages("shared", runs))
    finding._written = written
    return result


def each_its_own() -> Any:
    fresh()
    return outcome_of(
        lambda: find_storages("node", Path("runs")) == NODE, lambda: contents(Path("runs"))
    )


def one_for_both() -> Any:
    fresh()
    runs = Path.cwd().parent / "shared"
    return outcome_of(lambda: find_storages("node", runs), lambda: contents(runs))


def read_only(kind: Any) -> Callable[[], Any]:
    def work() -> Any:
        fresh()
        runs = Path("runs") if kind == "node" else Path.cwd().parent / "read only"
        if NODE.led_here and (kind == "node" or NODE.mine == 0):
            runs.mkdir()
            if kind == "shared" or NODE.mine == 1:
                runs.chmod(0o555)  # which the first node, as root, passes over
        ranks.barrier()
        return outcome_of(lambda: find_storages(kind, runs))

    return work


def ranks_that_do_not_add_up() -> Any:
    os.environ["LOCAL_RANK"] = "0"
    result = outcome_of(storages_of_nodes)
    os.environ["LOCAL_RANK"] = str(LOCAL_RANKS[ranks.rank()])
    return result


def without_the_nodes_number() -> Any:
    number = os.environ.pop("CROSS_RANK")
    result = storages_of_nodes() == NODE
    os.environ["CROSS_RANK"] = number
    return result


SCENARIOS: list[Callable[[], Any]] = [
    who_is_who,
    on_each_node,
    failing_on_the_second,
    result_that_cannot_travel,
    held_by_leads,
    held_in_the_order_of_hosts,
    nowhere,
    different,
    damaged_at_its_source,
    lost_at_its_source,
    not_writable_where_it_lacks,
    small_file,
    known_of_earlier_starts,
    really_shared,
    not_shared,
    copied_but_not_shared,
    shared_one_way,
    each_its_own,
    one_for_both,
    ranks_that_do_not_add_up,
    without_the_nodes_number,
]
NAMED = {scenario.__name__: scenario for scenario in SCENARIOS} | {
    "sent from 0": sent(0),
    "sent from 1": sent(1),
    "read only, shared": read_only("shared"),
    "read only, node": read_only("node"),
}


def run_as_rank() -> None:
    """Every scenario's result on this rank, pickled into the folder."""
    global NODE
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'world'}", rank=rank, world_size=3
    )
    finding.SEEN_WITHIN_S = 0.5
    NODE = storages_of_nodes()
    outcomes = {name: scenario() for name, scenario in NAMED.items()}
    (folder / str(rank)).write_bytes(pickle.dumps(outcomes))
    ranks.barrier()
    os._exit(0)


# -- what came of it ------------------------------------------------------------------------------

Of = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Of:
    folder = tmp_path_factory.mktemp("storages")
    processes = []
    for rank, (node, local_rank) in enumerate(zip(NODE_OF, LOCAL_RANKS, strict=True)):
        place = folder / f"node {node}"
        place.mkdir(exist_ok=True)
        told = {"CROSS_RANK": str(node), "LOCAL_RANK": str(local_rank), "OMP_NUM_THREADS": "1"}
        before = WITHOUT_ROOTS_RIGHT if node == 1 and os.geteuid() == 0 else []
        command = [*before, sys.executable, str(Path(__file__)), str(rank), str(folder)]
        processes.append(subprocess.Popen(command, env={**os.environ, **told}, cwd=place))
    try:
        assert [process.wait(timeout=LIMIT_S) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outcomes = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(3)]
    return lambda name: [outcome[name] for outcome in outcomes]


def text_of(outcomes: list[Any], error: type[UserError]) -> str:
    """The error that all ranks raised, the same on each."""
    assert [outcome.get("error") for outcome in outcomes] == [error.__name__] * 3, outcomes
    texts = {outcome["text"] for outcome in outcomes}
    assert len(texts) == 1
    return str(texts.pop())


def test_each_rank_knows_its_nodes_lead_and_its_share(of: Of) -> None:
    assert of("who_is_who") == [
        ((0, 1), 0, (0,), True, [0, 1, 2, 3, 4]),
        ((0, 1), 1, (1, 2), True, [0, 2, 4]),
        ((0, 1), 1, (1, 2), False, [1, 3]),
    ]
    assert of("without_the_nodes_number") == [True] * 3


def test_local_ranks_that_do_not_add_up_are_refused(of: Of) -> None:
    text = text_of(of("ranks_that_do_not_add_up"), MachineError)
    assert "LOCAL_RANK: got [0, 0] for ranks [1, 2] on host" in text
    assert "hint: start ranks with the deepspeed launcher" in text


def test_every_lead_works_and_all_ranks_have_all_results(of: Of) -> None:
    assert of("on_each_node") == [[(0, "node 0"), (1, "node 1")]] * 3


def test_an_error_is_everyones_and_names_its_node(of: Of) -> None:
    text = text_of(of("failing_on_the_second"), JobError)
    assert text.startswith("node 1, host ")
    assert text.endswith(": a.key: got this, expected that")


def test_a_result_that_cannot_travel_hangs_no_one(of: Of) -> None:
    kinds = [outcome["error"] for outcome in of("result_that_cannot_travel")]
    assert kinds == ["TypeError", "TypeError", "RemoteError"]


def test_every_lead_holds_a_lock_for_its_node(of: Of) -> None:
    led, not_led = (["in"], ["in", "out"]), ([], [])
    assert of("held_by_leads") == [led, led, not_led]


def test_locks_are_taken_host_by_host_and_let_go_of_together(of: Of) -> None:
    assert "a lock: got held" in text_of(of("held_in_the_order_of_hosts"), RunError)


def test_what_no_node_has_is_nowhere(of: Of) -> None:
    assert of("nowhere") == [{"result": None, "after": None}] * 3


@pytest.mark.parametrize("source", [0, 1])
def test_what_a_node_lacks_is_sent_whole(of: Of, source: int) -> None:
    zero, one, other = of(f"sent from {source}")
    assert zero["result"] == one["result"] == other["result"] == ENTRY
    with_card, without = (zero, one) if source == 0 else (one, zero)
    assert with_card["after"].pop("kind/key/README.md")
    assert with_card["after"] == without["after"], "manifest included, and nothing half"
    assert {name: without["after"][f"kind/key/{name}"] for name in FILES} == FILES
    assert set(without["after"]) == {f"kind/key/{name}" for name in (*FILES, "manifest.json")}


def test_nodes_that_hold_different_things_are_named_with_the_file(of: Of) -> None:
    text = text_of(of("different"), RunError)
    assert text.startswith("node 1, host ")
    assert f"{ENTRY}/deep/b.txt: got 4 bytes, SHA-256 " in text
    assert "as on node 0, host " in text
    assert f"hint: delete the folder {ENTRY} on one of the two" in text


def test_what_is_damaged_or_lost_where_it_comes_from_arrives_nowhere(of: Of) -> None:
    for name, got in (("damaged", "got SHA-256 "), ("lost", "got No such file")):
        outcomes = of(f"{name}_at_its_source")
        text = text_of(outcomes, RunError)
        assert "deep/b.txt" in text
        assert got in text
        assert outcomes[0]["after"] == {}


def test_a_disk_that_refuses_what_is_sent_is_everyones_error(of: Of) -> None:
    text = text_of(of("not_writable_where_it_lacks"), RunError)
    assert text.startswith("node 1, host ")
    assert "EACCES" in text


def test_a_small_file_is_copied_where_it_is(of: Of) -> None:
    assert of("small_file") == [{"small": b"small"}] * 3


def test_earlier_starts_are_known_on_all_nodes(of: Of) -> None:
    for node, (settled, contents) in zip(NODE_OF, of("known_of_earlier_starts"), strict=True):
        assert settled == {"student": {"micro_batch": 2}, "control": {"micro_batch": 8}}
        assert b"there" in contents["environment.json"]
        assert contents["metrics.jsonl"] == b"long\nlonger\n", node
        # TensorBoard's files of the node that had fewer steps tell of those alone.
        assert ("tensorboard/student/events" in contents) == (node == 1)


def test_a_folder_that_all_share_is_one_storage(of: Of) -> None:
    assert of("really_shared") == [{"result": (0,), "after": {}}] * 3


def test_a_folder_that_is_not_shared_is_refused(of: Of) -> None:
    outcomes = of("not_shared")
    text = text_of(outcomes, RunError)
    assert text.startswith("node 1, host ")
    assert "got no such file, expected what node 0, host " in text
    assert text.endswith("keep runs on each node with deepspeed.storage=node")
    assert [outcome["after"] for outcome in outcomes] == [{}] * 3, "nothing is left"


def test_a_copy_of_the_folder_does_not_pass_for_it(of: Of) -> None:
    assert "got another content" in text_of(of("copied_but_not_shared"), RunError)


def test_what_every_node_writes_must_come_to_the_first(of: Of) -> None:
    text = text_of(of("shared_one_way"), RunError)
    assert text.startswith("node 0, host ")
    assert "expected what node 1, host " in text


def test_a_folder_of_each_nodes_own_is_a_storage_each(of: Of) -> None:
    assert of("each_its_own") == [{"result": True, "after": {}}] * 3


def test_one_folder_for_both_nodes_is_refused_where_each_should_have_its_own(of: Of) -> None:
    outcomes = of("one_for_both")
    text = text_of(outcomes, RunError)
    assert "got the folder of node 1, host " in text
    assert "hint: set deepspeed.storage=shared" in text
    assert outcomes[0]["after"] == {}


@pytest.mark.parametrize("kind", ["shared", "node"])
def test_a_folder_that_one_node_cannot_write_is_refused(of: Of, kind: str) -> None:
    text = text_of(of(f"read only, {kind}"), RunError)
    assert "node 1, host " in text
    assert "EACCES" in text
    assert "hint: choose another directory (for runs: --runs)" in text


# -- one process ----------------------------------------------------------------------------------


def test_on_one_node_nothing_is_asked_or_written(tmp_path: Path) -> None:
    for kind in ("shared", "node"):
        assert find_storages(kind, tmp_path / "runs") == Storages()  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    alone, marker = Storages(), object()
    assert alone.on_each(lambda: marker) == [marker]
    assert alone.everywhere(lambda: tmp_path) == tmp_path
    assert list(alone.share_of(3)) == [0, 1, 2]
    assert alone.led_here


@pytest.mark.parametrize(
    ("numbers", "local_ranks", "expected"),
    [
        (["0", "0", "1"], [0, 1, 0], [[0, 1], [2]]),
        (["0", "1", "0", "1"], [0, 0, 1, 1], [[0, 2], [1, 3]]),  # dealt out, as Slurm can
        ([None, None, None], [0, 1, 0], [[0, 1], [2]]),
        (["0", None, None], [0, 0, 1], [[0], [1, 2]]),
    ],
)
def test_ranks_by_node(
    numbers: list[str | None], local_ranks: list[int], expected: list[list[int]]
) -> None:
    assert leads._nodes(numbers, local_ranks) == expected


if __name__ == "__main__":
    run_as_rank()
