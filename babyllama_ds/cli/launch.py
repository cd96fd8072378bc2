"""What the `deepspeed` launcher starts on every rank: arguments in, `run_job` out.

deepspeed --num_gpus 2 --module babyllama_ds.cli.launch JOB [KEY=VALUE ...] [--runs DIR] [--check]

needs no checkout; in one, `launcher/run.py` is the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from babyllama_ds.cli import Parser, add_job_arguments, check, exit_code_of, parse, run


def main() -> int:
    """The exit status of this rank; the same on every rank."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_job_arguments(parser)
    parser.add_argument("--check", action="store_true", help="validate and print the job, no more")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    arguments = parse(parser, None)
    if arguments.check:
        return exit_code_of(lambda: check(arguments.job, arguments.overrides))
    runs: Path = arguments.runs
    return exit_code_of(lambda: run(arguments.job, arguments.overrides, runs=runs))


if __name__ == "__main__":
    sys.exit(main())
