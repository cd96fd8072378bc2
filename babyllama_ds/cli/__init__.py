"""The command line: words enter, an exit status leaves.

parser      what can be typed
commands    what it does
"""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Sequence

from babyllama_ds.cli.commands import check, is_first_of_node, is_lead, run
from babyllama_ds.cli.parser import Parser, add_job_arguments, command_line, parse
from babyllama_ds.errors import EXIT_CODE, Problem, Stopped, UserError

NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""What a system says of a path that a user gave, wherever a command comes to it first."""

__all__ = ["Parser", "add_job_arguments", "check", "exit_code_of", "main", "parse", "run"]


def main(words: Sequence[str] | None = None) -> int:
    """`babyllama-ds COMMAND ...`."""
    arguments = parse(command_line(), words)
    command: Callable[[argparse.Namespace], None] = arguments.command
    return exit_code_of(lambda: command(arguments))


def exit_code_of(work: Callable[[], None]) -> int:
    """Do `work`; an expected end is told once, by rank 0, and becomes the exit status.

    0: done. 2: an error that a user can mend, told by whom it says (a path that may not be used: by
    the rank that came to it). 128 + signal: stopped as asked. 1: our own mistake, with its trace
    from the rank where it happened. (75, where another node is gone, comes from `engine.watching`,
    which ends the process by itself.)
    """
    try:
        work()
    except UserError as error:
        others = {"rank 0": False, "each node": is_first_of_node(), "each rank": True}
        if is_lead() or others[error.told_by]:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except Stopped as stop:
        if is_lead():
            print(f"stopped ({stop}); the same command goes on from here", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOT_ALLOWED and error.filename:
            print(f"error: {_of_a_path(error)}", file=sys.stderr)
            return EXIT_CODE
        # On the other ranks the same failure arrives as a RemoteError: one trace is enough.
        if type(error).__name__ != "RemoteError":
            traceback.print_exc()
        return 1
    return 0


def _of_a_path(error: OSError) -> Problem:
    return Problem(
        where=str(error.filename),
        got=(error.strerror or str(error)).lower(),
        expected="a path that can be used",
        hint="choose another, or have its owner allow it (`ls -ld` shows who may do what)",
    )
