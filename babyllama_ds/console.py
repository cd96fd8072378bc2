"""What a person at the terminal sees: log records enter; lines that spare a progress bar leave."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


class _BarFriendlyHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def configure_logging(*, rank: int) -> None:
    """Rank 0 tells what happens; the others speak only of warnings, with their number."""
    handler = _BarFriendlyHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s  {prefix}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("babyllama_ds")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
