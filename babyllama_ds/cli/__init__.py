"""The command line: words enter, an exit status leaves.

parser      what can be typed
commands    what it does
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from babyllama_ds.cli.commands import check, is_first_of_node, is_lead, run
from babyllama_ds.cli.parser import Parser, add_job_arguments, command_line, parse
from babyllama_ds.errors import EXIT_CODE, Stopped, UserError

__all__ = ["Parser", "add_job_arguments", "check", "exit_code_of", "main", "parse", "run"]


def main(words: Sequence[str] | None = None) -> int:
    """`babyllama-ds COMMAND ...`."""
    arguments = parse(command_line(), words)
    command: Callable[[argparse.Namespace], None] = arguments.command
    return exit_code_of(lambda: command(arguments))


def exit_code_of(work: Callable[[], None]) -> int:
    """Do `work`; an expected end is told once, by rank 0, and becomes the exit status.

    0: done. 2: an error that a user can mend, told by whom it says. 128 + signal: stopped as
    asked. 1: our own mistake, with its trace from the rank where it happened. (75, where another
    node is gone, comes from `engine.watching`, which ends the process by itself.)
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
        # On the other ranks the same failure arrives as a RemoteError: one trace is enough.
        if type(error).__name__ != "RemoteError":
            traceback.print_exc()
        return 1
    return 0
