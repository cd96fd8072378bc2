"""Plain `torch.distributed`: who am I, small agreements, and errors that all ranks raise together.

Enters: small Python values and work that may fail. Leaves: the same value, or the same error, on
every rank. Everything goes over one control group (gloo, CPU) whose time-out is weeks: long
preparation on one rank must not run under the time-out of a gradient collective. Without an
initialised process group there is one rank and nothing is communicated.

Every function that communicates is collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from babyllama_ds.errors import Problem, Stopped, UserError

T = TypeVar("T")

_log = logging.getLogger(__name__)

_BROKE_OFF = re.compile("Connection closed by peer|Connection reset by peer|Broken pipe|ncclRemote")
"""How gloo and NCCL say it."""

CONTROL_TIMEOUT = timedelta(days=20)
"""In effect none; in milliseconds it still fits 32 bits, which the socket layer polls with."""

# (world group it was made under, control group): a new world needs a new control group.
_control: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


class RemoteError(RuntimeError):
    """Work failed on another rank, which tells the whole story; this names rank and error."""

    def __init__(self, rank: int, kind: str, message: str) -> None:
        self.rank, self.kind, self.message = rank, kind, message
        super().__init__(f"rank {rank} failed with {kind}: {message}")

    def __reduce__(self) -> tuple[type[RemoteError], tuple[int, str, str]]:
        return type(self), (self.rank, self.kind, self.message)


def raised_by_all(error: BaseException) -> bool:
    """Whether every rank raises it, rank 0 among them; else it may be this rank's alone."""
    if isinstance(error, UserError):
        return error.told_by == "rank 0"
    return isinstance(error, Stopped | RemoteError)


def another_ended(error: BaseException) -> bool:
    """Whether a collective broke off because the process of another rank is gone."""
    return isinstance(error, RuntimeError) and bool(_BROKE_OFF.search(str(error)))


# -- who am I -----------------------------------------------------------------------------------


def rank() -> int:
    """This process among all, from 0."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """Processes in all."""
    return dist.get_world_size() if _initialized() else 1


def local_rank() -> int:
    """This process among those of its node, from 0: the index of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes on this node, as the launcher says; one without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def node_number() -> str | None:
    """This process's node, as DeepSpeed's launcher, torchrun or Slurm number it; else none."""
    names = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def start_control_group() -> None:
    """Make the control group (collective); nothing to do when it stands or there is one rank.

    Called right after the process group is initialised, while all ranks are at the same place.
    """
    if world_size() > 1:
        _control_group()


def forget_control_group() -> None:
    """Let go of the control group, for whoever destroys the process group.

    Gloo joins its threads when the last reference to a group goes. Those of a group still held
    when the interpreter ends may abort the process: freeing their last work takes Python's lock.
    """
    global _control
    _control = None


# -- small agreements ---------------------------------------------------------------------------


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier(group=_control_group())


def broadcast_object(value: T | None, source: int = 0) -> T:
    """The `value` of rank `source` (pickled), on every rank; the other ranks' is ignored."""
    if world_size() == 1:
        return value  # type: ignore[return-value]  # the source's value is a T
    box = [value]
    dist.broadcast_object_list(box, src=source, group=_control_group())
    return box[0]  # type: ignore[return-value]


def broadcast_tensor(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """The CPU `tensor` of rank `source`, written into every other rank's of the same shape."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source, group=_control_group())
    return tensor


def send_bytes(content: bytes | None, targets: Sequence[int]) -> None:
    """Send bytes, or none, to some ranks, which call `receive_bytes`; no other takes part."""
    size = torch.tensor(-1 if content is None else len(content))
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else None
    for target in targets:
        dist.send(size, target, group=_control_group())
        if tensor is not None:
            dist.send(tensor, target, group=_control_group())


def send_made(make: Callable[[], bytes | None], targets: Sequence[int]) -> None:
    """Send what `make` gives; where it fails none is sent, for nobody must wait for it."""
    content = None
    try:
        content = make()
    finally:
        send_bytes(content, targets)


def receive_bytes(source: int) -> bytes | None:
    """What rank `source` sent to this one."""
    size = torch.tensor(0)
    dist.recv(size, source, group=_control_group())
    if size < 0:
        return None
    content = torch.empty(int(size), dtype=torch.uint8)
    if size > 0:
        dist.recv(content, source, group=_control_group())
    return content.numpy().tobytes()


def gather_objects(value: T) -> list[T]:
    """Every rank's `value` (pickled), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_control_group())
    return gathered  # type: ignore[return-value]  # every slot has been filled


def sum_floats(*values: float) -> list[float]:
    """Each value summed over ranks, in float64: one all-reduce, the same result everywhere."""
    total = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=_control_group())
    return [float(x) for x in total.tolist()]


def max_int(value: int) -> int:
    """The largest `value` of all ranks (63 bits): one all-reduce, to agree on a flag."""
    largest = torch.tensor(value, dtype=torch.int64)
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_control_group())
    return int(largest.item())


# -- errors that all ranks raise together -------------------------------------------------------


def on_rank_zero(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 only; its result (pickled) or its error reaches every rank.

    A `UserError` or `Stopped` is raised as it is on every rank; any other error as it is on
    rank 0 and as `RemoteError` elsewhere.
    """
    if world_size() == 1:
        return work()
    if rank() == 0:
        return _work_and_tell(work)
    failure, content = broadcast_object((None, b""))
    if failure is not None:
        _raise_together([failure], own=None)
    result: T = pickle.loads(content)
    return result


def on_every_rank(work: Callable[[], T]) -> T:
    """Do `work` on every rank; if it fails on any, every rank raises.

    The first failing rank decides. Its `Stopped` is raised everywhere; its `UserError` too, with
    the problems of all ranks, each once. Any other error is raised as it is where it happened
    (each failing rank its own), and as `RemoteError` elsewhere.
    """
    if world_size() == 1:
        return work()
    own: BaseException | None = None
    try:
        result = work()
    except BaseException as error:  # whatever it is, the others must not wait for this rank
        own = error
    if max_int(0 if own is None else 1):  # one number where all went well, as it mostly does
        outcomes = gather_objects(None if own is None else _Failure.of(own))
        _raise_together([failure for failure in outcomes if failure is not None], own)
    return result


@contextmanager
def held_by_rank_zero(manager: AbstractContextManager[Any]) -> Iterator[None]:
    """A context that rank 0 holds for all; its error at entry reaches every rank."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(manager)

        on_rank_zero(enter)
        yield


# -- helpers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """An error on its way: `error` itself if it is of the family, else only its description."""

    rank: int
    error: UserError | Stopped | None
    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        travels = error if isinstance(error, UserError | Stopped) else None
        return cls(rank(), travels, type(error).__qualname__, str(error))


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _control_group() -> dist.ProcessGroup:
    global _control
    world = dist.group.WORLD
    assert world is not None
    if _control is None or _control[0] is not world:
        _control = (world, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    return _control[1]


def _work_and_tell(work: Callable[[], T]) -> T:
    """Rank 0's part of `on_rank_zero`. Pickled here, so that failing to is told like the rest."""
    try:
        result = work()
        content = pickle.dumps(result)
    except BaseException as error:  # whatever it is, the others must not wait for this rank
        broadcast_object((_Failure.of(error), b""))
        raise
    broadcast_object((None, content))
    return result


def _raise_together(failures: Sequence[_Failure], own: BaseException | None) -> NoReturn:
    """Raise what `on_every_rank` promises; `failures` in rank order, `own` this rank's error."""
    first = failures[0]
    if first.error is None:
        raise RemoteError(first.rank, first.kind, first.message) if own is None else own
    if own is not None and not isinstance(own, UserError | Stopped):
        _log.error("rank %d also failed, outside the family of errors", rank(), exc_info=own)
    if isinstance(first.error, UserError):
        raise _merged(first.error, failures) from own
    raise first.error from own


def _merged(first: UserError, failures: Sequence[_Failure]) -> UserError:
    problems: dict[Problem, None] = {}  # a set that keeps the order
    for failure in failures:
        if isinstance(failure.error, UserError):
            problems.update(dict.fromkeys(failure.error.problems))
    return type(first)(*problems)
