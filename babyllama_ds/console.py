"""What a person at the terminal sees: log records enter; lines that spare a progress bar leave."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import NoReturn

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


class BatchBar:
    """A progress bar of batches on a terminal: `with BatchBar() as tell: tell(done, of)`.

    Another number of batches, or fewer done than before, is the next piece of work.
    """

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> BatchBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, done: int, of: int) -> None:
        """Show that `done` batches of `of` are."""
        bar = self._bar
        if bar is None or of != bar.total or done < bar.n:
            self._close()
            bar = tqdm(total=of, unit="batch", leave=False, file=sys.stderr, disable=None)
        bar.update(done - bar.n)
        self._bar = bar

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
