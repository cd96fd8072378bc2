"""The command line: words enter, an exit status leaves.

parser      what can be typed
commands    what it does
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from babyllama_ds.cli.commands import check, is_first_of_node, is_lead, run
from babyllama_ds.cli.parser import Parser, add_job_arguments, command_line, parse
from babyllama_ds.errors import EXIT_CODE, Problem, Stopped, UserError

__all__ = ["Parser", "add_job_arguments", "check", "exit_code_of", "main", "parse", "run"]


def main(words: Sequence[str] | None = None) -> int:
    """`babyllama-ds COMMAND ...`."""
    arguments = parse(command_line(), words)
    command: Callable[[argparse.Namespace], None] = arguments.command
    return exit_code_of(lambda: command(arguments))


def exit_code_of(work: Callable[[], None]) -> int:
    """Do `work`; an expected end is told once, by rank 0, and becomes the exit status.

    0: done. 2: an error that a user can mend, told by whom it says (a path that may not be used: by
    the rank that came to it). 128 + signal: stopped as asked, or nobody reads any more what is
    printed (`| head`). 1: our own mistake, with its trace from the rank where it happened. (75,
    where another node is gone, comes from `engine.watching`, which ends the process by itself.)
    """
    try:
        work()
        sys.stdout.flush()
    except UserError as error:
        others = {"rank 0": False, "each node": is_first_of_node(), "each rank": True}
        if is_lead() or others[error.told_by]:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except Stopped as stop:
        if is_lead():
            print(f"stopped ({stop}); the same command goes on from here", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:  # of a run, only until its signals are heeded (`StopRequest`)
        if is_lead():
            print("stopped (SIGINT)", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if isinstance(error, OSError) and (problem := _refused_path(error)) is not None:
            print(f"error: {problem}", file=sys.stderr)
            return EXIT_CODE
        # On the other ranks the same failure arrives as a RemoteError: one trace is enough.
        if type(error).__name__ != "RemoteError":
            traceback.print_exc()
        return 1
    return 0


def _nobody_reads() -> bool:
    """Whether the reader of what is printed has gone; if so, what is left goes nowhere."""
    printed = select.poll()
    printed.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in printed.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _refused_path(error: OSError) -> Problem | None:
    """A path that the system does not let this user use, wherever it was come to."""
    lacking = "`namei -l PATH` shows where the right to it is lacking"
    hints = {
        errno.EACCES: lacking,
        errno.EPERM: lacking,
        errno.EROFS: "choose a place that can be written to",
        errno.ENAMETOOLONG: "is a word missing before it?",
    }
    if error.errno not in hints or error.filename is None:
        return None
    return Problem(
        where=str(error.filename),
        got=error.strerror or str(error),
        expected="a path that this user may use",
        hint=hints[error.errno],
    )
