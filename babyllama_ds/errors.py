"""The family of errors that a user can cause.

Enters: what a check found wrong. Leaves: one exception that names every place, what was got,
what was expected and how to mend it. The command line prints it once and exits with `EXIT_CODE`.
Elsewhere it is caught only where work goes on without what failed, or to say more of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self

EXIT_CODE = 2
"""Exit status of every rank after a `UserError`."""

LOST_EXIT_CODE = 75
"""Exit status of the ranks that are left when a node is gone: sysexits.h's "try again later"."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    `where` is a key path (`student.training.warmup_steps`), a path on disk, or a stage;
    `source` is `file:line` when the place came from a file.
    """

    where: str
    got: str
    expected: str
    hint: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        place = f"{self.source}: {self.where}" if self.source else self.where
        text = f"{place}: got {self.got}, expected {self.expected}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class UserError(Exception):
    """Base of the family: one or more `Problem`s, printed together."""

    told_by: Literal["rank 0", "each node", "each rank"] = "rank 0"
    """Who speaks: rank 0 for all, which raise it together; one rank of each node, where rank 0 may
    not be there; or each rank that raises it, by itself, while others are at work."""

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error without a problem says nothing"
        self.problems: tuple[Problem, ...] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[Problem, ...]]:
        return type(self), self.problems

    @classmethod
    def of(
        cls,
        where: object,
        *,
        got: object,
        expected: object,
        hint: str | None = None,
        source: str | None = None,
    ) -> Self:
        """The error with a single problem."""
        problem = Problem(
            where=str(where), got=str(got), expected=str(expected), hint=hint, source=source
        )
        return cls(problem)

    @classmethod
    def all_of(cls, problems: Sequence[Problem]) -> Self:
        """The error with several problems, reported together."""
        return cls(*problems)


def first_line(error: BaseException) -> str:
    """What another's error says, in a line; of one that says nothing, its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def told_by_each_node() -> Iterator[None]:
    """Within, ranks have not met: an error may be one node's alone, whose first rank tells it."""
    try:
        yield
    except UserError as error:
        error.told_by = "each node"
        raise


class JobError(UserError):
    """The job file, an override, or the DeepSpeed configuration is wrong."""


class DataError(UserError):
    """Text, tokenizer, token shards or evaluation files are missing or unfit."""


class HubError(UserError):
    """A name stands for no model or tokenizer, neither here nor on the hub."""


class ModelError(UserError):
    """A model cannot be built, loaded, or used beside the others."""


class MachineError(UserError):
    """The machine lacks what the job asks for by name."""


class NoRoomError(MachineError):
    """Memory ran out in the middle of the work, on this rank at least."""

    told_by = "each rank"


class MeetingError(MachineError):
    """The ranks of several processes do not find each other, or differ in what they run."""

    told_by = "each node"


class RunError(UserError):
    """The run directory belongs to another job, is in use, damaged or unwritable."""


class TrainingError(UserError):
    """Training cannot go on: a loss or gradient is not finite."""


class Stopped(Exception):  # noqa: N818 - an end that was asked for, not an error
    """The run was asked to stop (`reason`) and did so at a safe point (`at`)."""

    def __init__(self, reason: str, exit_code: int = 143, at: str | None = None) -> None:
        self.reason = reason
        self.exit_code = exit_code
        self.at = at
        super().__init__(f"{reason}, at {at}" if at else reason)

    def __reduce__(self) -> tuple[type[Stopped], tuple[str, int, str | None]]:
        return type(self), (self.reason, self.exit_code, self.at)
