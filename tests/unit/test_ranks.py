"""Two real gloo ranks agree, and fail together. Run as a script, this file is one of the ranks.

The ranks start once and go through all of `SCENARIOS` in order; each test looks at what came of
one on both ranks. A rank that hangs fails every test, within `LIMIT_S`.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, JobError, Problem, Stopped, UserError

LIMIT_S = 90


def problem(where: str) -> Problem:
    return Problem(where=where, got="this", expected="that")


# -- what the ranks do --------------------------------------------------------------------------

calls: list[str] = []


def fail_with(*errors: BaseException | None) -> Callable[[], str]:
    """Work that fails on the ranks for which there is an error, by position."""

    def work() -> str:
        calls.append("work")
        if (error := errors[ranks.rank()]) is not None:
            raise error
        return f"done by {ranks.rank()}"

    return work


def small_agreements() -> Any:
    me = ranks.rank()
    ranks.barrier()
    return {
        "rank": me,
        "world_size": ranks.world_size(),
        "local_rank": ranks.local_rank(),
        "from 0": ranks.broadcast_object("zero" if me == 0 else None),
        "from 1": ranks.broadcast_object({"big": "x" * 100_000} if me == 1 else None, source=1),
        "gathered": ranks.gather_objects(("rank", me)),
        "sums": ranks.sum_floats(0.1 + me, -2.0, 1e17 * me, 1.0),
        "max": ranks.max_int((1 << 40) - 5 * me),
        "max of negatives": ranks.max_int(-2 - me),
    }


def control_group_is_made_once_and_patient() -> Any:
    ranks.start_control_group()
    group = ranks._control_group()
    ranks.start_control_group()
    options = group._get_backend(torch.device("cpu")).options
    return ranks._control_group() is group, options._timeout, dist.get_backend(group)


def rank_zero_result() -> Any:
    calls.clear()
    return ranks.on_rank_zero(fail_with(None, None)), list(calls)


def problems_of_both() -> Any:
    data = DataError.all_of([problem("a"), problem("shared")])
    job = JobError.all_of([problem("shared"), problem("b")])
    return ranks.on_every_rank(fail_with(data, job))


def crash_beside_a_user_error() -> Any:
    logging.getLogger("babyllama_ds").addHandler(handler := Recorder())
    try:
        return ranks.on_every_rank(fail_with(JobError(problem("a")), ZeroDivisionError("oops")))
    except JobError as error:
        return error.problems, handler.messages


def sent_bytes() -> Any:
    """Something, nothing, none; then a maker that fails."""
    contents = [bytes(range(256)) * 1000, b"", None]
    if ranks.rank() == 1:
        return [ranks.receive_bytes(0) for _ in range(len(contents) + 1)]
    for content in contents:
        ranks.send_bytes(content, [1])
    try:
        ranks.send_made(lambda: b"%d" % (1 // 0), [1])
    except ZeroDivisionError:
        return contents


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def second_world() -> Any:
    """A process group made after another was destroyed gets a control group of its own."""
    ranks.barrier()
    dist.destroy_process_group()
    alone = ranks.world_size(), ranks.gather_objects("me")
    join_world(Path(sys.argv[2]) / "second")
    return alone, ranks.gather_objects(ranks.rank())


def peer_dies() -> Any:
    if ranks.rank() == 1:
        return "gone"
    return ranks.barrier()


SCENARIOS: dict[str, Callable[[], Any]] = {
    "small agreements": small_agreements,
    "sent bytes": sent_bytes,
    "control group": control_group_is_made_once_and_patient,
    "zero: result": rank_zero_result,
    "zero: user error": lambda: ranks.on_rank_zero(fail_with(JobError(problem("a")), None)),
    "zero: stopped": lambda: ranks.on_rank_zero(fail_with(Stopped("SIGINT", 130), None)),
    "zero: crash": lambda: ranks.on_rank_zero(fail_with(ZeroDivisionError("oops"), None)),
    "zero: interrupt": lambda: ranks.on_rank_zero(fail_with(KeyboardInterrupt(), None)),
    "zero: unpicklable": lambda: ranks.on_rank_zero(lambda: lambda: 1),
    "every: results": lambda: ranks.on_every_rank(fail_with(None, None)),
    "every: user error on 1": lambda: ranks.on_every_rank(fail_with(None, JobError(problem("a")))),
    "every: user errors": problems_of_both,
    "every: stopped": lambda: ranks.on_every_rank(fail_with(None, Stopped("SIGTERM"))),
    "every: crash on 1": lambda: ranks.on_every_rank(fail_with(None, ZeroDivisionError("oops"))),
    "every: two crashes": lambda: ranks.on_every_rank(fail_with(KeyError("k"), OSError("o"))),
    "every: crash beside a user error": crash_beside_a_user_error,
    "second world": second_world,
    "peer dies": peer_dies,
}


def join_world(meeting_point: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=int(sys.argv[1]), world_size=2
    )


def run_as_rank() -> None:
    """Every scenario's (value, error) on this rank, pickled into the folder."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    join_world(folder / "first")
    outcomes: dict[str, tuple[Any, BaseException | None]] = {}
    for name, scenario in SCENARIOS.items():
        try:
            outcomes[name] = (scenario(), None)
        except BaseException as error:
            outcomes[name] = (None, error)
    (folder / sys.argv[1]).write_bytes(pickle.dumps(outcomes))
    os._exit(0)  # without goodbye, as a killed rank


# -- what came of it ----------------------------------------------------------------------------

Outcome = tuple[Any, BaseException | None]
Both = Callable[[str], list[Outcome]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=LIMIT_S) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outcomes = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)]
    return lambda name: [outcomes[rank][name] for rank in range(2)]


def values(outcomes: list[Outcome]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


def errors(outcomes: list[Outcome]) -> list[BaseException]:
    assert all(error is not None for _, error in outcomes), f"no error: {outcomes}"
    return [error for _, error in outcomes if error is not None]


def test_small_agreements(both: Both) -> None:
    zero, one = values(both("small agreements"))
    assert [zero.pop("rank"), one.pop("rank")] == [0, 1]
    assert [zero.pop("local_rank"), one.pop("local_rank")] == [0, 1]
    assert zero == one
    assert zero["world_size"] == 2
    assert zero["from 0"] == "zero"
    assert len(zero["from 1"]["big"]) == 100_000
    assert zero["gathered"] == [("rank", 0), ("rank", 1)]
    assert zero["sums"] == [0.1 + 1.1, -4.0, 1e17, 2.0]
    assert zero["max"] == 1 << 40
    assert zero["max of negatives"] == -2


def test_bytes_go_from_one_rank_to_another(both: Both) -> None:
    sent, received = values(both("sent bytes"))
    assert received == [*sent, None], "of what could not be made none comes, and nobody waits"


def test_control_group_is_made_once_and_outlasts_long_preparation(both: Both) -> None:
    for once, timeout, backend in values(both("control group")):
        assert once
        assert timeout.days > 7
        assert backend == "gloo"


def test_rank_zero_works_for_all(both: Both) -> None:
    (zero, zero_calls), (one, one_calls) = values(both("zero: result"))
    assert zero == one == "done by 0"
    assert (zero_calls, one_calls) == (["work"], [])


@pytest.mark.parametrize("name", ["zero: user error", "every: user error on 1"])
def test_user_error_is_the_same_on_both_ranks(both: Both, name: str) -> None:
    for error in errors(both(name)):
        assert type(error) is JobError
        assert error.problems == (problem("a"),)


def test_user_errors_of_both_ranks_are_told_together_once(both: Both) -> None:
    for error in errors(both("every: user errors")):
        assert type(error) is DataError
        assert error.problems == (problem("a"), problem("shared"), problem("b"))


@pytest.mark.parametrize(
    ("name", "reason", "code"),
    [("zero: stopped", "SIGINT", 130), ("every: stopped", "SIGTERM", 143)],
)
def test_stopped_reaches_both_ranks(both: Both, name: str, reason: str, code: int) -> None:
    for error in errors(both(name)):
        assert isinstance(error, Stopped)
        assert (error.reason, error.exit_code) == (reason, code)


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    [
        ("zero: crash", 0, ZeroDivisionError),
        ("zero: interrupt", 0, KeyboardInterrupt),
        ("every: crash on 1", 1, ZeroDivisionError),
    ],
)
def test_crash_is_original_where_it_happened_and_remote_elsewhere(
    both: Both, name: str, where: int, kind: type[BaseException]
) -> None:
    outcome = errors(both(name))
    assert type(outcome[where]) is kind
    remote = outcome[1 - where]
    assert isinstance(remote, ranks.RemoteError)
    assert not isinstance(remote, UserError)
    assert (remote.rank, remote.kind, remote.message) == (
        where,
        kind.__name__,
        str(outcome[where]),
    )
    assert f"rank {where} failed with {kind.__name__}" in str(remote)


def test_result_that_cannot_travel_fails_everywhere(both: Both) -> None:
    zero, one = errors(both("zero: unpicklable"))
    assert not isinstance(zero, ranks.RemoteError)
    assert isinstance(one, ranks.RemoteError)
    assert one.rank == 0


def test_every_rank_keeps_its_own_result(both: Both) -> None:
    assert values(both("every: results")) == ["done by 0", "done by 1"]


def test_each_crashed_rank_raises_its_own(both: Both) -> None:
    zero, one = errors(both("every: two crashes"))
    assert (type(zero), type(one)) == (KeyError, OSError)


def test_crash_beside_a_user_error_is_logged_where_it_happened(both: Both) -> None:
    zero, one = values(both("every: crash beside a user error"))
    assert zero == ((problem("a"),), [])
    assert one[0] == (problem("a"),)
    assert one[1] == ["rank 1 also failed, outside the family of errors"]


def test_second_process_group_gets_its_own_control_group(both: Both) -> None:
    for alone, together in values(both("second world")):
        assert alone == (1, ["me"])
        assert together == [0, 1]


def test_dead_peer_is_an_error_not_a_wait(both: Both) -> None:
    (_, zero), (one, _) = both("peer dies")
    assert one == "gone"
    assert isinstance(zero, RuntimeError)


# -- one process, no process group --------------------------------------------------------------


def test_alone_nothing_is_communicated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not dist.is_initialized()
    ranks.start_control_group()
    ranks.barrier()
    marker = object()  # not even pickled
    assert (ranks.rank(), ranks.world_size()) == (0, 1)
    assert (ranks.local_rank(), ranks.local_world_size()) == (0, 1)
    assert ranks.broadcast_object(marker) is marker
    assert ranks.gather_objects(marker) == [marker]
    assert ranks.sum_floats(0.1, 2) == [0.1, 2.0]
    assert ranks.sum_floats() == []
    assert ranks.max_int(-7) == -7
    assert ranks.on_rank_zero(lambda: marker) is marker
    assert ranks.on_every_rank(lambda: marker) is marker


@pytest.mark.parametrize("together", [ranks.on_rank_zero, ranks.on_every_rank])
def test_alone_errors_pass_unchanged(together: Callable[[Callable[[], str]], str]) -> None:
    error = ZeroDivisionError("oops")
    with pytest.raises(ZeroDivisionError) as caught:
        together(fail_with(error))
    assert caught.value is error


if __name__ == "__main__":
    run_as_rank()
